"""One device's lane: image shards in, embedding parts out; reading, decoding, encoding and writing overlap.

Run by embed.py in its own process on a CPU, by embed_worker.py in one process a device, and by tasks on a cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..cache.part import PartMeta
from ..images.decode import Sample, decode, thumbnail
from ..images.rejects import Reject
from .clip import Encoder
from .heads import LinearHead, load_head
from .reader import LaneReader
from .tasks import Advanced, Event, ShardTask
from .writer import Chunk, LaneWriter, Row, Shard

CHUNK_ROWS = 4096  # rows held until their captions are sorted by length, encoded and written
TOKENS_PER_PICTURE = 32  # a batch of text holds this many tokens for each picture in a batch of pictures
AHEAD = 3  # batches queued on a GPU, or for each thread of a CPU, beyond the last one that is known to be done
LONGEST_SIDES = 1000  # a picture this many times longer than wide would be blown up by the resize before the crop
NO_PIXELS = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class LaneSpec:
    """All that a worker needs to make the same features as every other: picklable."""

    model: str
    pretrained: str | None
    precision: str
    heads: tuple[tuple[str, str], ...]  # kind, aesthetic or safety, and file
    text_states: bool
    card: str
    decode_threads: int

    def build(self, device: str) -> Lane:
        """Load encoder and heads. Raises what Encoder.load and load_head raise."""
        encoder = Encoder.load(self.model, self.pretrained, precision=self.precision, device=device)
        heads = {f"{kind}_score": load_head(kind, file, encoder.embedding_dim, device) for kind, file in self.heads}
        meta = PartMeta(
            encoder=" ".join(filter(None, (self.model, self.pretrained))),
            encoder_fingerprint=encoder.fingerprint,
            preprocessing=encoder.preprocessing,
            precision=encoder.precision,
            embedding_dim=encoder.embedding_dim,
            text_width=encoder.text_width,
            card=self.card,
            text_states=self.text_states,
            **dict.fromkeys(heads, True),
        )
        return Lane(encoder, heads, meta, decode_threads=self.decode_threads)


@dataclass
class _Encoding:
    """What the encoder has of the shard in its hands: rows waiting for a full batch, and rows of the open chunk."""

    waiting: list[Row] = field(default_factory=list)
    encoded: list[Row] = field(default_factory=list)
    images: list[Future[Tensor]] = field(default_factory=list)


class Lane:
    """Embeds shard after shard, in order, each into its own part.

    A batch never spans two shards: a part's bytes depend on its shard, the encoder and the batch size alone, whatever
    was interrupted and whoever worked beside. The next shard is read while this one is encoded: no device waits.

    A GPU is fed by the main thread while the pool decodes. On a CPU the pool encodes as well, one batch a thread, each
    thread computing alone: that leaves no core idle and costs less than splitting every operation over the cores.
    """

    def __init__(self, encoder: Encoder, heads: dict[str, LinearHead], meta: PartMeta, *, decode_threads: int) -> None:
        self.encoder = encoder
        self.heads = heads
        self.meta = meta
        self._cuda = encoder.device.type == "cuda"
        self._threads = decode_threads if self._cuda else torch.get_num_threads()
        self._events: deque[torch.cuda.Event] = deque()
        self._encodes: deque[Future[Any]] = deque()

    def run(self, tasks: Iterable[ShardTask], report: Callable[[Event], None]) -> None:
        """Embed every shard of `tasks`; `report` is called from several threads, with ShardDone after the commit.

        A shard that fails is reported and the others go on; a broken device raises.
        """
        ahead = 2 * self._threads + 16
        with (
            self._one_thread_each(),
            ThreadPoolExecutor(self._threads, "pool") as self._pool,
            ThreadPoolExecutor(1, "finish") as self._finisher,
            LaneWriter(self.meta, report) as writer,
            LaneReader(tasks, lambda items: self._pool.submit(self._prepare, items), ahead) as reader,
        ):
            state = _Encoding()
            for shard, group in reader:
                try:
                    self._step(shard, group, state, writer, report)
                except torch.OutOfMemoryError as error:
                    shard.error = error
                    torch.cuda.empty_cache()
                if group is None:
                    writer.put(shard, None)
                    state = _Encoding()

    @contextmanager
    def _one_thread_each(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        try:
            if not self._cuda:
                torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)

    def _compute(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run on the device: at once on a GPU, where it is only queued; in the pool on a CPU."""
        if self._cuda:
            done: Future[Any] = Future()
            done.set_result(function(*arguments))
            return done
        self._encodes.append(self._pool.submit(function, *arguments))
        if len(self._encodes) > AHEAD * self._threads:
            wait([self._encodes.popleft()])
        return self._encodes[-1]

    def _prepare(self, items: list[Sample | Reject]) -> list[Row | Reject]:
        """Decode, resize, tokenize: all that needs no device. Runs in the decode threads."""
        outcomes = [self._row(item) if isinstance(item, Sample) else item for item in items]
        rows = [outcome for outcome in outcomes if isinstance(outcome, Row)]
        tokens = self.encoder.tokenize_captions([row.sample.caption for row in rows])
        columns = (tokens.ids.numpy(), tokens.n_tokens.tolist(), tokens.truncated.tolist())
        for row, *values in zip(rows, *columns, strict=True):
            row.tokens, row.n_tokens, row.truncated = values
        return outcomes

    def _row(self, sample: Sample) -> Row | Reject:
        picture = decode(sample)
        if isinstance(picture, Reject):
            return picture
        if max(picture.size) > LONGEST_SIDES * min(picture.size):
            return Reject(sample.shard, sample.key, "too_narrow", sample.url, sample.caption)
        return Row(sample, picture.size, self.encoder.preprocess(picture), thumbnail(picture))

    def _step(
        self,
        shard: Shard,
        group: Future[list[Row | Reject]] | None,
        state: _Encoding,
        writer: LaneWriter,
        report: Callable[[Event], None],
    ) -> None:
        """Take in one decoded group, or the shard's end (None); encode what makes full batches."""
        outcomes = group.result() if group is not None else []
        rejects = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        shard.fate.rejected += rejects
        if rejects:
            report(Advanced(0, len(rejects)))
        if shard.error is not None:
            return
        state.waiting += [outcome for outcome in outcomes if isinstance(outcome, Row)]
        size = shard.task.batch_size
        while len(state.waiting) >= size or (group is None and state.waiting):
            batch, state.waiting = state.waiting[:size], state.waiting[size:]
            state.images.append(self._compute(self._encode_images, batch, report))
            state.encoded += batch
            if len(state.encoded) >= CHUNK_ROWS:
                self._flush(shard, state, writer)
        if group is None and state.encoded:
            self._flush(shard, state, writer)

    def _encode_images(self, rows: list[Row], report: Callable[[Event], None]) -> Tensor:
        """(B, D) float32 on the device, on a GPU perhaps still being computed."""
        shape = (len(rows), *rows[0].pixels.shape)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda)
        np.stack([row.pixels for row in rows], out=pixels.numpy())
        for row in rows:
            row.pixels = NO_PIXELS
        embedding = self.encoder.encode_images(pixels)
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            if len(self._events) > AHEAD:
                self._events.popleft().synchronize()
        report(Advanced(len(rows), 0))
        return embedding

    def _flush(self, shard: Shard, state: _Encoding, writer: LaneWriter) -> None:
        """Encode the captions of the open chunk, shortest first, and hand it to the writer."""
        rows, images = state.encoded, state.images
        state.encoded, state.images = [], []
        n_tokens = np.array([row.n_tokens for row in rows])
        order = np.argsort(n_tokens, kind="stable")
        budget = shard.task.batch_size * TOKENS_PER_PICTURE
        texts = [
            self._compute(self._encode_text, [rows[i] for i in order[batch]])
            for batch in _batches_of_tokens(n_tokens[order], budget)
        ]
        if self._cuda:
            chunk = self._compute(self._finish, rows, order, images, texts)
        else:  # it waits for its pieces: in the pool, it would keep a thread from encoding meanwhile
            chunk = self._finisher.submit(self._finish, rows, order, images, texts)
        writer.put(shard, chunk)

    def _encode_text(self, rows: list[Row]) -> tuple[Tensor, Tensor | None]:
        ids = torch.from_numpy(np.stack([row.tokens for row in rows]))
        features = self.encoder.encode_text(ids, torch.tensor([row.n_tokens for row in rows]))
        return features.embedding, features.states.half() if self.meta.text_states else None

    @torch.inference_mode()
    def _finish(
        self,
        rows: list[Row],
        order: np.ndarray,
        images: list[Future[Tensor]],
        texts: list[Future[tuple[Tensor, Tensor | None]]],
    ) -> Chunk:
        """Put the pieces of a chunk together, once they are there, and score its pairs."""
        image = torch.cat([future.result() for future in images])
        embeddings, states = zip(*(future.result() for future in texts), strict=True)
        text = torch.empty_like(image)
        text[torch.from_numpy(order).to(text.device)] = torch.cat(embeddings)
        unit = normalize(image, dim=-1)
        return Chunk(
            rows=rows,
            image=image.half(),
            text=text.half(),
            states=torch.cat(states) if self.meta.text_states else None,
            order=order,
            clip_score=(unit * normalize(text, dim=-1)).sum(-1),
            head_scores={name: head(unit) for name, head in self.heads.items()},
        )


def _batches_of_tokens(lengths: np.ndarray, budget: int) -> list[slice]:
    """Cut ascending lengths into runs whose padded size (rows × longest) stays within `budget` tokens, at least one."""
    batches, start = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * lengths[end] > budget:
            batches.append(slice(start, end))
            start = end
    return batches
