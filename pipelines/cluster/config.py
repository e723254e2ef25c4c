"""What the user asks of a cluster."""

from __future__ import annotations

import dataclasses

from featstore.errors import BadRequestError
from featstore.store.urls import scheme_of

_MAX_WORKERS = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Where blocks are computed."""

    workers: int = 0
    """Processes that are started on this machine; 0: none."""
    scheduler: str | None = None
    """Address of a running Dask scheduler, e.g. ``tcp://10.0.0.1:8786``; None: none."""
    connect_seconds: float = 8.0
    """How long the scheduler is tried to be reached."""
    worker_seconds: float = 60.0
    """How long a first worker is waited for."""
    block_seconds: float | None = None
    """Time after which a worker that has not ended a block is taken for hung; None: as `Window` estimates it."""
    tries: int = 3
    """How often a block is tried before its images count as failed."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything is started."""
        if self.workers < 0 or self.workers > _MAX_WORKERS:
            raise BadRequestError(f"--workers {self.workers} is outside 0..{_MAX_WORKERS}")
        if self.workers and self.scheduler is not None:
            raise BadRequestError(
                f"--workers {self.workers} and --scheduler {self.scheduler} are both given",
                hint="--workers starts processes on this machine, --scheduler uses those of a cluster: leave out one",
            )
        if self.scheduler is not None and not self.scheduler.rpartition(":")[2].isdigit():
            raise BadRequestError(
                f"--scheduler {self.scheduler!r} is no address with a port",
                hint="as in --scheduler tcp://10.0.0.1:8786",
            )
        if self.tries < 1:
            raise BadRequestError(f"{self.tries} tries of a block are too few")

    @property
    def asked(self) -> bool:
        """Whether there is to be a cluster at all."""
        return bool(self.workers) or self.scheduler is not None


def check_store(url: str) -> None:
    """Refuse a store that no other process can see.

    Raises:
        BadRequestError: for ``memory://``.
    """
    if scheme_of(url) == "memory":
        raise BadRequestError(
            f"store {url!r} lies in the memory of this process, where no worker can write",
            hint="name a folder that all workers see, or a bucket such as s3://bucket/path",
        )
