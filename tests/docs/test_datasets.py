"""docs/datasets.md says of every known data set what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from featstore.datasets import DATASETS
from featstore.datasets.archives import ARCHIVES, BY_HAND

TEXT = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")


def table(first_heading):
    """The rows of the table whose first column is called so, cells without their quotes."""
    _, _, rest = TEXT.partition(f"| {first_heading} |")
    rows = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_data_set_has_a_row_with_its_folder_and_how_it_is_got():
    rows = {name.strip("`"): (what, folder.strip("`"), how) for name, what, folder, how in table("name")}
    assert set(rows) == set(DATASETS)
    for name, (what, folder, how) in rows.items():
        assert len(what) > 20
        if name in ARCHIVES:
            assert (folder, how) == (ARCHIVES[name].folders[name], "fetch")
        elif name in BY_HAND:
            assert folder == DATASETS[name].folder
            assert how.startswith("by hand: ")
        else:
            assert folder == "-"
            assert how.startswith("nothing: ")


def test_every_archive_has_a_row_with_its_name_its_size_and_what_it_is_compared_with():
    rows = table("set")
    assert len(rows) == len({archive.url for archive in ARCHIVES.values()})
    for sets, archive_text, size, compared in rows:
        archive = ARCHIVES[re.findall("`(.+?)`", sets)[0]]
        assert f"`{archive.name}`" in archive_text
        assert size == f"{archive.download_bytes / 1e6:.0f} MB"
        algorithm = (archive.digest or "").partition(":")[0]
        assert (algorithm or "first download") in compared.lower().replace("-", "")
