"""One device's lane: image shards in, embedding parts out; reading, decoding, encoding and writing overlap.

Run by run.py in the stage's own process on a CPU, and by core/pool.py in one process per device, here or on a cluster.
"""

from __future__ import annotations

import os
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
from ..core.errors import EclipseError
from ..images.rejects import Reject
from .clip import Encoder
from .heads import LinearHead, load_head
from .prepare import NO_PIXELS, Feeders, Preparation
from .reader import LaneReader
from .tasks import Advanced, Event, ShardTask
from .writer import Chunk, LaneWriter, Picture, Shard

CHUNK_ROWS = 4096  # pairs held until their captions are sorted by length, encoded and written
MOST_DECODERS = 16  # processes of a lane: what they decode keeps its own thread busy
TOKENS_PER_PICTURE = 32  # a batch of text holds this many tokens for each picture in a batch of pictures
AHEAD = 3  # batches queued on a GPU, or for each thread of a CPU, beyond the last one that is known to be done
LEAST_AGREEMENT = 0.98  # median cosine of embeddings that somebody made and this encoder's; another encoder's is near 0


@dataclass(frozen=True)
class LaneSpec:
    """All that a worker needs to make the same features as every other: picklable."""

    model: str
    pretrained: str | None
    precision: str
    heads: tuple[tuple[str, str], ...]  # kind, aesthetic or safety, and file
    text_states: bool
    card: str

    def build(self, device: str, sharing: int = 1) -> Lane:
        """Load encoder and heads, under the same settings wherever it is. Raises what Encoder.load and load_head do.

        sharing: lanes that share the machine it is built on, whose cores decode.
        """
        if device.startswith("cuda"):
            Feeders.import_ahead()
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
            # `benchmark` would choose kernels by timing them, and parts would differ from run to run. A ViT has one
            # convolution, so nothing is lost; a convolutional tower is a little slower for it.
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
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
        if not device.startswith("cuda"):
            return Lane(encoder, heads, meta)
        cores = len(os.sched_getaffinity(0))
        return Lane(encoder, heads, meta, decoders=max(1, min(MOST_DECODERS, cores // sharing)))


@dataclass
class _Encoding:
    """What the encoder has of the shard in its hands: pictures that wait for a full batch, and the open chunk's."""

    waiting: list[Picture] = field(default_factory=list)
    encoded: list[Picture] = field(default_factory=list)
    images: list[Future[Tensor]] = field(default_factory=list)
    rows: int = 0  # pairs of the open chunk


class Lane:
    """Embeds shard after shard, in order, each into its own part.

    A batch never spans two shards: a part's bytes depend on its shard, the encoder and the batch size alone, whatever
    was interrupted and whoever worked beside. The next shard is read while this one is encoded: no device waits.

    A GPU is fed by the main thread while processes read and decode; `decoders` is how many decode. On a CPU a pool of
    threads decodes and encodes, one batch a thread, each thread computing alone: that leaves no core idle and costs
    less than splitting every operation over the cores.
    """

    def __init__(self, encoder: Encoder, heads: dict[str, LinearHead], meta: PartMeta, *, decoders: int = 0) -> None:
        self.encoder = encoder
        self.heads = heads
        self.meta = meta
        self._cuda = encoder.device.type == "cuda"
        self._threads = torch.get_num_threads()
        self._ahead = 2 * (decoders or self._threads) + 16
        self._prepare = Preparation(encoder.preprocess, encoder.tokenize_captions)
        self._feeders = Feeders(self._prepare, decoders) if decoders else None
        self._events: deque[torch.cuda.Event] = deque()
        self._encodes: deque[Future[Any]] = deque()

    def run(self, tasks: Iterable[ShardTask], report: Callable[[Event], None]) -> None:
        """Embed every shard of `tasks`; `report` is called from several threads, with ShardDone after the commit.

        A shard that fails is reported and the others go on; a broken device raises.
        """
        with (
            self._one_thread_each(),
            ThreadPoolExecutor(self._threads, "pool") as self._pool,
            ThreadPoolExecutor(1, "finish") as self._finisher,
            self._reader(tasks) as reader,
            LaneWriter(self.meta, report, reader.fail) as writer,
        ):
            state = _Encoding()
            for shard, group in reader:
                exhausted = ""
                try:
                    self._step(shard, group, state, writer, report)
                except torch.OutOfMemoryError as error:
                    exhausted = str(error)
                if exhausted:
                    # Not in the handler: while the exception lives its traceback holds every frame's activations, and
                    # there would be nothing to give back.
                    shard.error, state = MemoryError(exhausted), _Encoding()
                    torch.cuda.empty_cache()
                if group is None:
                    writer.put(shard, None)
                    state = _Encoding()

    def _reader(self, tasks: Iterable[ShardTask]) -> LaneReader:
        if self._feeders is not None:
            return LaneReader(tasks, self._feeders.decode, self._ahead, self._feeders.read)
        return LaneReader(tasks, lambda items: self._pool.submit(self._prepare, items), self._ahead)

    def close(self) -> None:
        """End the processes that feed it. Those of a process that dies end by themselves."""
        if self._feeders is not None:
            self._feeders.close()

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

    def _step(
        self,
        shard: Shard,
        group: Future[list[Picture | Reject]] | None,
        state: _Encoding,
        writer: LaneWriter,
        report: Callable[[Event], None],
    ) -> None:
        """Take in one decoded group, or the shard's end (None); encode what makes full batches."""
        outcomes = group.result() if group is not None else []
        rejects = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        shard.fate.rejected += rejects
        if rejects:
            report(Advanced(0, len({reject.key for reject in rejects})))  # progress counts pictures, fates pairs
        if shard.error is not None:
            return
        state.waiting += [outcome for outcome in outcomes if isinstance(outcome, Picture)]
        size = shard.task.batch_size
        while len(state.waiting) >= size or (group is None and state.waiting):
            batch, state.waiting = state.waiting[:size], state.waiting[size:]
            state.images.append(self._compute(self._encode_images, batch, report))
            state.encoded += batch
            state.rows += sum(len(picture.n_tokens) for picture in batch)
            if state.rows >= CHUNK_ROWS:
                self._flush(shard, state, writer)
        if group is None and state.encoded:
            self._flush(shard, state, writer)

    def _encode_images(self, pictures: list[Picture], report: Callable[[Event], None]) -> Tensor:
        """(B, D) float32 on the device, on a GPU perhaps still being computed."""
        if pictures[0].sample.embedded is not None:
            report(Advanced(len(pictures), 0))
            return self._embedded_before(pictures)
        shape = (len(pictures), *pictures[0].pixels.shape)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda)
        np.stack([picture.pixels for picture in pictures], out=pixels.numpy())
        for picture in pictures:
            picture.pixels = NO_PIXELS
        embedding = self.encoder.encode_images(pixels)
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            if len(self._events) > AHEAD:
                self._events.popleft().synchronize()
        report(Advanced(len(pictures), 0))
        return embedding

    def _embedded_before(self, pictures: list[Picture]) -> Tensor:
        """(B, D) as somebody made them; checked on the pictures that are there."""
        given = torch.from_numpy(np.stack([e.image for p in pictures if (e := p.sample.embedded)]))
        if given.shape[1] != self.encoder.embedding_dim:
            what = f"these embeddings have {given.shape[1]} dimensions, the card's encoder {self.encoder.embedding_dim}"
            raise EclipseError(what, hint="name the encoder that made them in the card")
        given = given.to(self.encoder.device)
        if shown := [place for place, picture in enumerate(pictures) if picture.pixels.size]:
            seen = self.encoder.encode_images(torch.from_numpy(np.stack([pictures[place].pixels for place in shown])))
            self._require_same("image", given[shown], seen)
            before, after = (float(some.norm(dim=1).median()) for some in (given[shown], seen))
            if not 0.9 < after / max(before, 1e-12) < 1.1:
                what = f"these image embeddings have length {before:.3g}, those of their pictures {after:.4g}"
                raise EclipseError(what, hint=f"set source.image_norm: {after:.4g}")
        return given

    def _require_same(self, kind: str, given: Tensor, ours: Tensor) -> None:
        agreement = float((normalize(given, dim=-1) * normalize(ours, dim=-1)).sum(-1).median())
        if not agreement >= LEAST_AGREEMENT:
            raise EclipseError(
                f"the card's encoder did not make these {kind} embeddings: its own agree with them by a cosine of "
                f"{agreement:.2f}",
                hint="name the encoder that made them in the card"
                + (", and the column of captions they were made from" if kind == "text" else ""),
            )

    def _flush(self, shard: Shard, state: _Encoding, writer: LaneWriter) -> None:
        """Encode the captions of the open chunk, shortest first, and hand it to the writer."""
        pictures, images = state.encoded, state.images
        state.encoded, state.images, state.rows = [], [], 0
        tokens = np.concatenate([picture.tokens for picture in pictures])
        n_tokens = np.concatenate([picture.n_tokens for picture in pictures])
        order = np.argsort(n_tokens, kind="stable")
        budget = shard.task.batch_size * TOKENS_PER_PICTURE
        texts = [
            self._compute(self._encode_text, tokens[order[batch]], n_tokens[order[batch]])
            for batch in _batches_of_tokens(n_tokens[order], budget)
        ]
        if self._cuda:
            chunk = self._compute(self._finish, pictures, n_tokens, order, images, texts)
        else:  # it waits for its pieces: in the pool, it would keep a thread from encoding meanwhile
            chunk = self._finisher.submit(self._finish, pictures, n_tokens, order, images, texts)
        writer.put(shard, chunk)

    def _encode_text(self, tokens: np.ndarray, n_tokens: np.ndarray) -> tuple[Tensor, Tensor | None]:
        features = self.encoder.encode_text(torch.from_numpy(tokens), torch.from_numpy(n_tokens))
        return features.embedding, features.states.half() if self.meta.text_states else None

    @torch.inference_mode()
    def _finish(
        self,
        pictures: list[Picture],
        n_tokens: np.ndarray,
        order: np.ndarray,
        images: list[Future[Tensor]],
        texts: list[Future[tuple[Tensor, Tensor | None]]],
    ) -> Chunk:
        """Put the pieces of a chunk together, once they are there, and score its pairs."""
        image = torch.cat([future.result() for future in images])
        embeddings, states = zip(*(future.result() for future in texts), strict=True)
        owner = np.repeat(np.arange(len(pictures)), [len(picture.n_tokens) for picture in pictures])
        places, owners = self._on_device(order), self._on_device(owner)
        text = torch.empty(len(order), image.shape[1], dtype=image.dtype, device=image.device)
        text[places] = torch.cat(embeddings)
        before = [e.text for i in owner if (e := pictures[i].sample.embedded) and e.text is not None]
        if before:
            given = torch.from_numpy(np.stack(before).astype(np.float32)).to(text.device)
            self._require_same("text", given, text)
        unit = normalize(image, dim=-1)
        return Chunk(
            pictures=pictures,
            owner=owner,
            image=image.half(),
            text=text.half(),
            states=torch.cat(states) if self.meta.text_states else None,
            n_tokens=n_tokens,
            order=order,
            clip_score=(unit[owners] * normalize(text, dim=-1)).sum(-1),
            head_scores={name: head(unit) for name, head in self.heads.items()},
        )

    def _on_device(self, index: np.ndarray) -> Tensor:
        """An index, copied without waiting for what the device is still computing."""
        tensor = torch.from_numpy(index)
        return tensor.pin_memory().to(self.encoder.device, non_blocking=True) if self._cuda else tensor


def _batches_of_tokens(lengths: np.ndarray, budget: int) -> list[slice]:
    """Cut ascending lengths into runs whose padded size (rows × longest) stays within `budget` tokens, at least one."""
    batches, start = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * lengths[end] > budget:
            batches.append(slice(start, end))
            start = end
    return batches
