"""How much memory a process says that it took."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from featstore.pipelines.memory import peak_rss_bytes, rss_bytes

SAY = "from featstore.pipelines.memory import peak_rss_bytes; print(peak_rss_bytes())"
TAKE = "import numpy as np; taken = np.ones(40 * 2**20, np.uint8); del taken; "


def _said(code: str) -> int:
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_a_child_does_not_count_what_its_parent_held() -> None:
    held = np.ones(600 * 2**20, np.uint8)
    assert peak_rss_bytes() > held.nbytes
    assert _said(SAY) < held.nbytes / 2


def test_what_was_given_back_still_counts_for_the_peak() -> None:
    assert _said(TAKE + SAY) > _said(SAY) + 30 * 2**20


def test_what_is_held_now_counts() -> None:
    before = rss_bytes()
    held = np.ones(200 * 2**20, np.uint8)
    assert rss_bytes() - before > 0.9 * held.nbytes
