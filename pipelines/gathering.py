"""Vectors of a few pixels of many images, gathered block by block: by threads of this process, or on a Dask cluster.

A cluster reads and interpolates; what travels is the vectors, straight from workers to this process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from featstore.errors import BadRequestError, FeatstoreError, StorageError
from featstore.pipelines.progress import Progress

if TYPE_CHECKING:
    from distributed import Client

    from featstore.heads import SegmentationTask
    from featstore.heads.sampled import Gathering, PixelSample
    from featstore.pipelines.cluster.connect import Cluster
    from featstore.pipelines.reading import OpenBucket

_TASK_BYTES = 16 << 20
"""Bytes of vectors that a task gives at most, if it is of several images."""
_AHEAD = 2
_THREADS = 2
_TRIES = 3


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Images of one block, and which of their pixels are wanted."""

    first: int
    """Place of its first pixel among all."""
    rows: tuple[int, ...]
    pixels: tuple[np.ndarray, ...]


def gather_sample(
    bucket: OpenBucket,
    task: SegmentationTask,
    count: int,
    *,
    seed: int,
    cluster: Cluster | None,
    progress: Progress,
) -> PixelSample:
    """``count`` labelled pixels of each training image, the same wherever they are gathered.

    Args:
        bucket: whose maps are read.
        task: labels and training rows.
        count: pixels of an image.
        seed: of the draw.
        cluster: whose workers read; None: this process does.
        progress: told of every image.

    Raises:
        BadRequestError: if the vectors do not fit into memory; before anything is read.
        FeatstoreError: what reading raises; StorageError if workers do not see the store.
    """
    from featstore.heads.sampled import Gathering, PixelSample, draw_pixels

    gathering = Gathering(
        runs=tuple({name: run.reader(name) for name in bucket.maps} for run in bucket.runs),
        beside={f"{one.title}/{name}": one.run.reader(name) for one in bucket.beside for name in one.layers},
        size=task.masks.shape[1:],  # type: ignore[arg-type] # (h, w)
    )
    rows = np.unique(np.asarray(task.train_rows, np.int64)).tolist()
    _require_memory(gathering, len(rows) * count)
    pixels, labels = [], []
    for row in rows:
        mask = task.masks[row]
        pixels.append(draw_pixels(mask, count, seed=seed, row=row, ignore_label=task.ignore_label))
        labels.append(mask.reshape(-1)[pixels[-1]])
    runs, beside = gather_pixels(gathering, bucket.runs[0].block_length, rows, pixels, cluster, progress)
    truth = np.concatenate([*labels, np.empty(0, np.uint8)])
    return PixelSample(runs=runs, beside=beside, labels=truth, images=len(rows))


def gather_pixels(
    gathering: Gathering,
    block_length: int,
    rows: Sequence[int],
    pixels: Sequence[np.ndarray],
    cluster: Cluster | None,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of chosen pixels, image by image.

    Args:
        gathering: reads them.
        block_length: images of a block.
        rows: of the images, ascending.
        pixels: of each image.
        cluster: whose workers read; None: this process does.
        progress: told of every image.

    Returns:
        Of the runs (P, K, C) and of what is beside them (P, A), float32; P pixels of all images.
    """
    total = sum(map(len, pixels))
    channels = sum(reader.shape[0] for reader in gathering.runs[0].values())
    runs = np.empty((total, len(gathering.runs), channels), np.float32)
    beside = np.empty((total, gathering.pixel_bytes // 4 - len(gathering.runs) * channels), np.float32)
    pieces = _pieces(rows, pixels, block_length, gathering.pixel_bytes)
    progress.start("gathering pixels", len(rows), "images")
    try:
        found = _here(gathering, pieces) if cluster is None else _there(gathering, pieces, cluster.client("cpu"))
        for piece, (some, other) in found:
            runs[piece.first : piece.first + len(some)] = some
            beside[piece.first : piece.first + len(some)] = other
            progress.advance(len(piece.rows))
    finally:
        progress.stop()
    return runs, beside


def _require_memory(gathering: Gathering, pixels: int) -> None:
    needed, free = pixels * gathering.pixel_bytes, psutil.virtual_memory().available
    if needed > free:
        raise BadRequestError(
            f"the vectors of {pixels:,} pixels take {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB of memory are free",
            hint="take fewer --pixels-per-image, --layers or --techniques",
        )


def _pieces(rows: Sequence[int], pixels: Sequence[np.ndarray], block_length: int, pixel_bytes: int) -> Iterator[_Piece]:
    """Rows block by block, cut where a piece would become too large; images without a pixel are left out."""
    first = begin = size = 0
    held: list[int] = []
    for place, row in enumerate(rows):
        full = size + len(pixels[place]) * pixel_bytes > _TASK_BYTES
        if held and (full or rows[held[-1]] // block_length != row // block_length):
            yield _piece(first, held, rows, pixels)
            first, size, held = begin, 0, []
        if len(pixels[place]):
            held.append(place)
            size += len(pixels[place]) * pixel_bytes
            begin += len(pixels[place])
    if held:
        yield _piece(first, held, rows, pixels)


def _piece(first: int, places: Sequence[int], rows: Sequence[int], pixels: Sequence[np.ndarray]) -> _Piece:
    return _Piece(first, tuple(rows[place] for place in places), tuple(pixels[place] for place in places))


def _here(gathering: Gathering, pieces: Iterable[_Piece]) -> Iterator[tuple[_Piece, Any]]:
    """One piece after the other, read while the last is put away."""
    waiting: dict[Future[Any], _Piece] = {}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="featstore-gather") as pool:
        for piece in pieces:
            waiting[pool.submit(gathering, piece.rows, piece.pixels)] = piece
            if len(waiting) > _AHEAD * _THREADS:
                yield from _ended(waiting)
        while waiting:
            yield from _ended(waiting)


def _ended(waiting: dict[Future[Any], _Piece]) -> Iterator[tuple[_Piece, Any]]:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(future), future.result()


def _there(gathering: Gathering, pieces: Iterable[_Piece], client: Client) -> Iterator[tuple[_Piece, Any]]:
    """Pieces on workers, a bounded number at a time. Reading changes nothing, so Dask's own retries do."""
    from distributed import as_completed

    ahead = iter(pieces)
    piece = next(ahead, None)
    if piece is None:
        return
    _require_sight(gathering, piece, client)
    scattered = client.scatter(gathering, broadcast=True, hash=False)
    room = _AHEAD * max(1, sum(client.nthreads().values()))
    waiting: dict[Any, _Piece] = {}
    done = as_completed(loop=client.loop)
    while piece is not None or waiting:
        while piece is not None and len(waiting) < room:
            future = client.submit(_gather, scattered, piece, pure=False, retries=_TRIES - 1, key=_key(piece))
            waiting[future.key] = piece
            done.add(future)
            piece = next(ahead, None)
        future = next(done)
        yield waiting.pop(future.key), _result(future)


def _gather(gathering: Gathering, piece: _Piece) -> Any:
    return gathering(piece.rows, piece.pixels)


def _key(piece: _Piece) -> str:
    import uuid

    return f"gather-pixels-{piece.rows[0]}-{uuid.uuid4().hex[:8]}"


def _result(future: Any) -> Any:
    from distributed import KilledWorker

    try:
        return future.result()
    except FeatstoreError:
        raise
    except (KilledWorker, OSError, RuntimeError) as error:
        raise StorageError(
            f"workers failed to gather pixels: {' '.join(str(error).split())[:200]}",
            hint="without --workers and --scheduler this process gathers them",
        ) from error


def _require_sight(gathering: Gathering, piece: _Piece, client: Client) -> None:
    """Have every worker read one image.

    Raises:
        StorageError: naming workers that cannot.
    """
    one = _Piece(0, piece.rows[:1], piece.pixels[:1])
    answers = client.run(_gather, gathering, one, on_error="return")
    blind = {worker: answer for worker, answer in answers.items() if isinstance(answer, BaseException)}
    if blind:
        worker, reason = next(iter(sorted(blind.items())))
        error = StorageError(
            f"{len(blind)} of {len(answers)} workers cannot read the store, such as that at {worker}: "
            f"{' '.join(str(reason).split())[:200]}",
            hint="name a store that all machines see: a shared file system, or a bucket such as s3://bucket/path",
        )
        error.exit_code = 2  # Nothing was started.
        raise error
