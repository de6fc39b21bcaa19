"""Samples → pictures ready for the encoder, and the processes that do it where a GPU waits for them. Used by lane.py.

Threads of one process cannot feed a fast GPU, whatever the cores: reading, decoding, resizing and tokenizing a picture
hold Python's lock for 0.7 ms, and give it back 70 times, each time for another thread to wake up and take it. Sixteen
of them beside an H200 made 526 pictures a second, where it could take 2,000.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.forkserver
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch

from ..images.decode import BadPictureError, Sample, open_picture, thumbnail
from ..images.rejects import Reject
from ..images.shards import ImageShard
from .preprocess import Preprocessing
from .reader import GROUP, Items, groups_of
from .tokens import CaptionTokenizer
from .writer import Picture

LONGEST_SIDES = 1000  # a picture this many times longer than wide would be blown up by the resize before the crop
NO_PIXELS = np.empty((0, 0, 3), np.uint8)
NO_THUMBNAIL = np.zeros(256, np.uint8)  # of rows without a picture: flat, and so like no other


@dataclass(frozen=True)
class Preparation:
    """Decode, resize, tokenize: all that needs no device. Picklable."""

    preprocess: Preprocessing
    tokenize: CaptionTokenizer

    def __call__(self, items: Items) -> list[Picture | Reject]:
        outcomes: list[Picture | Reject] = []
        for item in items:
            outcomes += [item] if isinstance(item, Reject) else self._pictures(item)
        pictures = [outcome for outcome in outcomes if isinstance(outcome, Picture)]
        tokens = self.tokenize([c for picture in pictures for c in picture.sample.captions])
        ids, n_tokens, truncated = tokens.ids.numpy(), tokens.n_tokens.numpy(), tokens.truncated.numpy()
        first = 0
        for picture in pictures:
            own = slice(first, first + len(picture.sample.captions))
            picture.tokens, picture.n_tokens = ids[own], n_tokens[own]
            picture.truncated = int(truncated[own].sum())
            first = own.stop
        return outcomes

    def _pictures(self, sample: Sample) -> list[Picture] | list[Reject]:
        """The sample, decoded; a Reject for each of its captions if that cannot be done."""
        if sample.embedded is not None:
            pixels = NO_PIXELS
            with suppress(BadPictureError):
                pixels = self.preprocess(open_picture(sample.data)) if sample.data else NO_PIXELS
            return [Picture(replace(sample, data=b""), sample.embedded.size, pixels, NO_THUMBNAIL)]
        try:
            image = open_picture(sample.data)
        except BadPictureError as error:
            return sample.rejects(error.reason)
        if max(image.size) > LONGEST_SIDES * min(image.size):
            return sample.rejects("too_narrow")
        # The file's bytes go: a chunk waits for thousands of pictures.
        return [Picture(replace(sample, data=b""), image.size, self.preprocess(image), thumbnail(image))]


class Feeders:
    """Processes that feed a lane: one reads shards, `decoders` others run a Preparation on what it read.

    Pixels come back through memory that a decoder shares with the lane. If one dies SystemExit is raised, for whoever
    started the lane's process to put another in its place. They end with the lane's process, however that ends.
    """

    def __init__(self, prepare: Preparation, decoders: int) -> None:
        self.import_ahead()
        self._context = multiprocessing.get_context("forkserver")
        self._processes: list[BaseProcess] = []
        self._idle: queue.SimpleQueue[tuple[Connection, np.ndarray]] = queue.SimpleQueue()
        width, height = prepare.preprocess.size
        shape = (GROUP, height, width, 3)
        for _ in range(decoders):
            memory = self._context.RawArray("B", math.prod(shape))
            decoder = self._start(_decode_groups, prepare, memory, shape)
            self._idle.put((decoder, np.frombuffer(memory, np.uint8).reshape(shape)))
        self._shards = self._start(_read_shards)
        self._threads = ThreadPoolExecutor(decoders, "decode")

    @staticmethod
    def import_ahead() -> None:
        """Have what the processes import, which takes seconds, imported once for all of them while others work."""
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
        multiprocessing.forkserver.ensure_running()

    def _start(self, work: Callable[..., None], *arguments: Any) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        return ours

    def read(self, shard: ImageShard) -> Iterator[Items]:
        """The shard's groups, to the end: the next shard's come after them. Raises what reading it does."""
        try:
            self._shards.send(shard)
            while (items := self._shards.recv()) is not None:
                if isinstance(items, Exception):
                    raise items
                yield items
        except (EOFError, ConnectionError):
            raise SystemExit("the process that reads image shards died") from None

    def decode(self, items: Items) -> Future[list[Picture | Reject]]:
        """Start on a group, of at most GROUP items, as soon as a decoder is free."""
        return self._threads.submit(self._decode, items)

    def _decode(self, items: Items) -> list[Picture | Reject]:
        decoder, memory = worker = self._idle.get()
        try:
            decoder.send(items)
            outcomes, shown = decoder.recv()
            for pixels, place in zip(memory[: len(shown)].copy(), shown, strict=True):
                outcomes[place].pixels = pixels
        except (EOFError, ConnectionError):
            raise SystemExit("a process that decodes pictures died") from None
        finally:
            self._idle.put(worker)  # a dead one as well: whoever takes it next is told the same, and does not wait
        return outcomes

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.join()


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the lane's process to take: they end when it does
    torch.set_num_threads(1)


def _read_shards(lane: Connection) -> None:
    """The reading process: shards come, their groups go, and None after each."""
    _begin()
    with suppress(EOFError, ConnectionError):  # the lane is gone
        while True:
            shard = lane.recv()
            try:
                for items in groups_of(shard):
                    lane.send(items)
                lane.send(None)
            except ConnectionError:
                raise
            except Exception as error:
                lane.send(error)


def _decode_groups(lane: Connection, prepare: Preparation, memory: Any, shape: tuple[int, ...]) -> None:
    """A decoding process: groups come; what becomes of them goes, and which of it has its pixels in the memory."""
    _begin()
    room = np.frombuffer(memory, np.uint8).reshape(shape)
    with suppress(EOFError, ConnectionError):  # the lane is gone
        while True:
            outcomes, shown = prepare(lane.recv()), []
            for place, outcome in enumerate(outcomes):
                if isinstance(outcome, Picture) and outcome.pixels.size:
                    room[len(shown)] = outcome.pixels
                    outcome.pixels = NO_PIXELS
                    shown.append(place)
            lane.send((outcomes, shown))
