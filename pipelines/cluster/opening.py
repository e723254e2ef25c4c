"""Whether there is a cluster at all: asked by every pipeline that can use one, before `distributed` is imported."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from featstore.pipelines.cluster.config import ClusterConfig, check_store
from featstore.pipelines.progress import Progress

if TYPE_CHECKING:
    from featstore.pipelines.cluster.connect import Cluster


def open_cluster(
    config: ClusterConfig | None, progress: Progress, *, store: str
) -> contextlib.AbstractContextManager[Cluster | None]:
    """The processes that ``config`` asks for; None if that is this one alone.

    Args:
        config: which processes.
        progress: told of what the user should see.
        store: URL of the store that they are to write.

    Raises:
        BadRequestError: for a store that no other process can see.
        StorageError: if a scheduler is out of reach, on entering.
    """
    if config is None or not config.asked:
        return contextlib.nullcontext()
    check_store(store)
    # Only now: `distributed` takes half a second.
    from featstore.pipelines.cluster.connect import Cluster

    return Cluster(config, progress.note)
