from __future__ import annotations

import pytest

from tests.pipelines.cluster.processes import processes


@pytest.fixture(scope="module")
def cluster(weights_root, tmp_path_factory):
    """A scheduler with two workers, for whom `reference` is the tiny model."""
    with processes(tmp_path_factory.mktemp("cluster")) as made:
        made.start_workers(2, FEATSTORE_WEIGHTS=str(weights_root))
        yield made


@pytest.fixture
def empty_cluster(tmp_path_factory):
    """A scheduler without workers."""
    with processes(tmp_path_factory.mktemp("cluster")) as made:
        yield made
