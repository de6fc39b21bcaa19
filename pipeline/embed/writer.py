"""The end of a lane: encoded chunks → columns → one part per shard, with the account of its inputs. Used by lane.py."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..cache.part import PartMeta, PartWriter
from ..images.decode import Sample
from ..images.rejects import Reject
from .fates import Fate
from .tasks import Event, ShardDone, ShardFailed, ShardTask

NO_USE_TRYING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(slots=True)
class Picture:
    """One picture with its k captions, ready for the encoder.

    pixels: (H, W, 3) uint8; thumbnail: (256,) uint8; tokens: (k, context) int64 with n_tokens (k,) real ones;
    truncated: how many of the captions were cut to the context. The sample's own bytes are gone.
    """

    sample: Sample
    size: tuple[int, int]
    pixels: np.ndarray
    thumbnail: np.ndarray
    tokens: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    n_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    truncated: int = 0


@dataclass
class Chunk:
    """Encoded pictures of one shard with their n pairs, in the order of the shard; tensors on the encoder's device.

    owner: (n,) the picture of each pair; image: (pictures, D) float16; text: (n, D) float16; states: (N, W) float16 in
    the order `order` (caption after caption, shortest first), None if states are not stored; n_tokens: (n,);
    clip_score: (n,) float32; head_scores: by column, (pictures,) float32 each.
    """

    pictures: list[Picture]
    owner: np.ndarray
    image: Tensor
    text: Tensor
    states: Tensor | None
    n_tokens: np.ndarray
    order: np.ndarray
    clip_score: Tensor
    head_scores: dict[str, Tensor]


@dataclass(eq=False)
class Shard:
    """A shard on its way through a lane. A set `error` makes everything after it skip the rest."""

    task: ShardTask
    fate: Fate
    error: BaseException | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    writer: PartWriter | None = None

    @classmethod
    def begin(cls, task: ShardTask) -> Shard:
        shard = cls(task, Fate(task.shard.name, ""))
        try:
            shard.fate.content = task.shard.content()
        except Exception as error:
            shard.error = error
        return shard


class LaneWriter:
    """A thread that writes chunks while the encoder goes on. Holds at most two of them. Use as a context manager.

    failed: called if it cannot even report what became of a shard, for which whoever reads ahead would wait for ever.
    """

    def __init__(
        self, meta: PartMeta, report: Callable[[Event], None], failed: Callable[[BaseException], None]
    ) -> None:
        self._meta = meta
        self._report, self._failed = report, failed
        self._queue: queue.Queue[tuple[Shard, Future[Chunk] | None] | None] = queue.Queue(maxsize=2)
        self._failure: BaseException | None = None
        self._abort = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="write")

    def __enter__(self) -> LaneWriter:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        """On an error nothing more is committed: half-written parts are removed."""
        self._abort = error[0] is not None
        self._queue.put(None)
        self._thread.join()
        if self._failure is not None and error[0] is None:
            raise self._failure

    def put(self, shard: Shard, chunk: Future[Chunk] | None) -> None:
        """Hand over the next chunk of `shard`, in order; None ends the shard."""
        if self._failure is not None:
            raise self._failure
        self._queue.put((shard, chunk))

    def _run(self) -> None:
        open_shards: list[Shard] = []
        while (item := self._queue.get()) is not None:
            shard, chunk = item
            if self._failure is not None:
                continue
            try:
                if shard not in open_shards:
                    open_shards.append(shard)
                self._handle(shard, chunk)
                if chunk is None:
                    open_shards.remove(shard)
            except BaseException as failure:
                self._failure = failure
                self._failed(failure)
        for shard in open_shards:
            _discard(shard, shard.error or InterruptedError())

    def _handle(self, shard: Shard, chunk: Future[Chunk] | None) -> None:
        try:
            if self._abort:
                raise InterruptedError
            if shard.error is None and chunk is not None:
                self._part(shard).write(self._columns(shard, chunk.result()))
            elif shard.error is None:
                part = self._part(shard)
                shard.fate.rows = part.rows
                shard.fate.check()
                part.account = shard.fate.to_dict()  # in the part's own footer: they appear together or not at all
                shard.stack.close()
        except Exception as error:
            shard.error = error
        if shard.error is not None:
            _discard(shard, shard.error)
        if chunk is None and not self._abort:
            self._report(_outcome(shard))

    def _part(self, shard: Shard) -> PartWriter:
        if shard.writer is None:
            shard.writer = shard.stack.enter_context(PartWriter(shard.task.part, self._meta))
        return shard.writer

    def _columns(self, shard: Shard, chunk: Chunk) -> dict[str, Any]:
        """One row per pair: what belongs to the picture is repeated for each of its captions."""
        pictures, owner, counts = chunk.pictures, chunk.owner, chunk.n_tokens
        arrays = {
            "n_tokens": counts,
            "thumbnail": np.stack([picture.thumbnail for picture in pictures])[owner],
            "width": np.array([picture.size[0] for picture in pictures], np.int32)[owner],
            "height": np.array([picture.size[1] for picture in pictures], np.int32)[owner],
            "image_embedding": chunk.image.cpu().numpy()[owner],
            "text_embedding": chunk.text.cpu().numpy(),
            "clip_score": chunk.clip_score.cpu().numpy(),
        }
        arrays |= {name: scores.cpu().numpy()[owner] for name, scores in chunk.head_scores.items()}
        states = None if chunk.states is None else unsort(chunk.states.cpu().numpy(), chunk.order, counts)
        samples = [pictures[i].sample for i in owner]
        strings: dict[str, list[Any]] = {
            "uid": [uid for picture in pictures for uid in picture.sample.uids],
            "key": [sample.key for sample in samples],
            "url": [sample.url for sample in samples],
            "caption": [caption for picture in pictures for caption in picture.sample.captions],
            "image_sha256": [sample.image_sha256 for sample in samples],
        }
        shard.fate.truncated += sum(picture.truncated for picture in pictures)
        finite = np.isfinite(arrays["image_embedding"]).all(1) & np.isfinite(arrays["text_embedding"]).all(1)
        if states is not None and not np.isfinite(states).all():
            finite &= np.logical_and.reduceat(np.isfinite(states).all(1), np.cumsum(counts) - counts)
        if not finite.all():
            for row in np.flatnonzero(~finite):
                sample, caption = samples[row], strings["caption"][row]
                shard.fate.rejected.append(
                    Reject(sample.shard, sample.key, "embedding_not_finite", sample.url, caption)
                )
            arrays = {name: values[finite] for name, values in arrays.items()}
            strings = {
                name: [v for v, good in zip(values, finite, strict=True) if good] for name, values in strings.items()
            }
            states = None if states is None else states[np.repeat(finite, counts)]
        if states is not None:
            arrays["text_states"] = states
        return {**arrays, **strings}


def unsort(states: np.ndarray, order: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(N, W) states of captions in the order `order` → in the order 0, 1, …; counts: (n,) tokens of caption 0, 1, …"""
    sorted_starts = np.empty(len(counts), np.int64)
    sorted_starts[order] = np.cumsum(counts[order]) - counts[order]
    starts = np.cumsum(counts) - counts
    return states[np.repeat(sorted_starts - starts, counts) + np.arange(int(counts.sum()))]


def _discard(shard: Shard, error: BaseException) -> None:
    shard.writer = None
    with suppress(Exception):  # on a full disk closing the file fails as well; what is half-written is removed anyway
        shard.stack.__exit__(type(error), error, error.__traceback__)


def _outcome(shard: Shard) -> Event:
    error = shard.error
    if error is None:
        return ShardDone(shard.task.number)
    fatal = isinstance(error, OSError) and error.errno in NO_USE_TRYING
    return ShardFailed(shard.task.number, f"{error}" or type(error).__name__, fatal)
