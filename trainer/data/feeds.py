"""Where batches come from: a memory-mapped store read ahead by threads, or a copy held on the device. Used by
batches.py.
"""

from __future__ import annotations

import resource
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...pipeline.cache.store import Store
from ...pipeline.core.errors import EclipseError
from ..model.bins import Bins, SizeClasses
from ..model.transformer import PackedText

StatesFrom = Callable[[np.ndarray], PackedText]
COLD_BATCHES = 16
FILL_ROWS = 8192  # rows copied to the device at a time when a cache becomes resident


@dataclass(frozen=True)
class Batch:
    """B samples on the device.

    image_embedding, text_embedding: (B, D) float32, raw CLIP outputs. text: the B captions, packed.
    rows: (B,) int64 rows of the store, on the CPU. Where a feed was asked for bins, text.bins is set, and embeddings
    and states are float16 as the cache has them: whoever copies them into place converts them in the same pass.
    """

    image_embedding: Tensor
    text_embedding: Tensor
    text: PackedText
    rows: np.ndarray


class Buffers:
    """Reusable host memory for one batch: float16, aligned, pinned for CUDA."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self._sent: torch.cuda.Event | None = None

    def fill(self, rows: np.ndarray, *, states: bool) -> tuple[Tensor, Tensor, PackedText | None]:
        """Gather rows: image embedding (n, D), text embedding (n, D), packed states; views valid until the next."""
        if self._sent is not None:
            self._sent.synchronize()
        store, n, dim = self._store, len(rows), self._store.embedding_dim
        image, text = self._get("image", n, dim), self._get("text", n, dim)
        store.image_embeddings(rows, out=image.numpy())
        store.text_embeddings(rows, out=text.numpy())
        if not states:
            return image, text, None
        room = self._get("states", int(store.token_counts(rows).sum()), store.text_width)
        _, offsets = store.token_states(rows, out=room.numpy())
        kept = self._get("offsets", 1, n + 1, torch.int64)[0]
        kept.copy_(torch.from_numpy(offsets))
        return image, text, PackedText(room, kept)

    def sent(self, event: torch.cuda.Event) -> None:
        """Nothing may be overwritten before `event`, recorded behind the copies to the device, has happened."""
        self._sent = event

    def _get(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.float16) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.numel() < rows * width:
            size = rows * width * 9 // 8  # ragged batches differ a little: leave room, pinning is slow
            memory = self._memory[name] = torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda")
        return memory[: rows * width].view(rows, width)


class Recycled:
    """Host memory of delivered tensors, used again for later ones as soon as nobody holds them any more.

    New memory costs a page fault every 4 KB: for a batch of token states several times what copying them costs.
    """

    def __init__(self) -> None:
        self._free: dict[str, list[np.ndarray]] = {}

    def copy(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """`source` as `dtype`, in memory that was last used under this name or is new. From any thread."""
        free, size = self._free.setdefault(name, []), source.numel() * dtype.itemsize
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if memory.size < size:
            memory = np.empty(size * 9 // 8, np.uint8)
        lent = memory[:size]
        target = torch.from_numpy(lent).view(dtype).view(source.shape)
        # The tensor, and whatever is a view of it, holds `lent` and nothing else does.
        weakref.finalize(lent, free.append, memory).atexit = False
        return target.copy_(source)


class StoreFeed:
    """Batches gathered from the store by threads, in the order of the requests.

    On CUDA the copies run on a stream of their own, ahead of the computation; on a CPU the threads convert as well.
    dtype: of the token states. states_from: makes the captions of the given rows where no states are stored, in these
    threads too. classes: lay captions out in bins, of these size classes.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        dtype: torch.dtype,
        *,
        threads: int,
        depth: int,
        states_from: StatesFrom | None,
        classes: SizeClasses | None = None,
    ) -> None:
        self._store, self._device, self._dtype, self._states_from = store, device, dtype, states_from
        self._classes = classes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batches")
        self._cold = COLD_BATCHES  # batches yet to be asked for ahead, because the last ones had to wait for the disk
        self._free = deque(Buffers(store, device) for _ in range(depth))
        self._pending: deque[tuple[np.ndarray, Buffers, Future]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._delivered = Recycled()

    def wants_more(self) -> bool:
        """Whether a buffer is free for another request."""
        return bool(self._free)

    def request(self, rows: np.ndarray) -> None:
        """Start gathering a batch of these rows, ascending where it should be fast."""
        buffers = self._free.popleft()
        self._pending.append((rows, buffers, self._pool.submit(self._load, rows, buffers)))

    def prefetch(self, rows: np.ndarray) -> None:
        """Have the kernel read these rows into memory, in the background."""
        self._pool.submit(self._store.will_need, rows)

    def next(self) -> Batch:
        """The batch of the oldest request. Raises what went wrong in the thread, as EclipseError."""
        rows, buffers, future = self._pending.popleft()
        try:
            image, text, packed, event = future.result()
        except EclipseError:
            raise
        except Exception as error:
            where = f"rows {int(rows.min())}..{int(rows.max())}"
            raise EclipseError(f"reading a batch failed: {error}", where=where, hint="run `eclipse doctor`") from error
        if event is not None:
            self._receive(event, image, text, packed)
        if self._classes is None:
            image, text, packed = image.float(), text.float(), PackedText(packed.states.to(self._dtype), packed.offsets)
        self._free.append(buffers)
        return Batch(image, text, packed, rows)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _load(self, rows: np.ndarray, buffers: Buffers) -> tuple:
        if self._cold > 0:
            self._store.will_need(rows)
        waits = _disk_waits()
        image, text, packed = buffers.fill(rows, states=self._states_from is None)
        # A batch asked for ahead waits no more, so one wait stands for several batches.
        self._cold = COLD_BATCHES if _disk_waits() > waits else self._cold - 1
        bins = None if self._classes is None or packed is None else self._classes.lay_out(packed.n_tokens.numpy())
        if self._stream is None:
            if packed is None:
                packed = self._live(rows)
            elif bins is not None:
                packed = PackedText(packed.states.clone(), packed.offsets.clone(), bins)
            else:
                packed = PackedText(self._delivered.copy("states", packed.states, self._dtype), packed.offsets.clone())
            dtype = torch.float32 if self._classes is None else torch.float16
            return *(self._delivered.copy(*x, dtype) for x in (("image", image), ("text", text))), packed, None
        with torch.cuda.stream(self._stream):
            image, text = (x.to(self._device, non_blocking=True) for x in (image, text))
            if packed is None:
                packed = self._live(rows)
            else:
                bins = None if bins is None else bins.pinned()
                packed = PackedText(packed.states, packed.offsets, bins).to(self._device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        buffers.sent(event)
        return image, text, packed, event

    def _live(self, rows: np.ndarray) -> PackedText:
        """The captions of rows, made now, on the device."""
        assert self._states_from is not None
        made = self._states_from(rows)
        bins = None
        if self._classes is not None:
            bins = self._classes.lay_out(made.n_tokens.cpu().numpy()).to(self._device)
        dtype = self._dtype if bins is None else torch.float16
        return PackedText(made.states.to(self._device, dtype), made.offsets.to(self._device), bins)

    def _receive(self, event: torch.cuda.Event, image: Tensor, text: Tensor, packed: PackedText) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        laid_out = [] if packed.bins is None else packed.bins.tensors()
        for tensor in (image, text, packed.states, packed.offsets, *laid_out):
            # Else the allocator would give this memory to the copying stream while the step still reads it.
            tensor.record_stream(current)  # allocated on the copying stream, used on this one


class ResidentFeed:
    """The whole selected cache held on the device as float16; batches are gathered there. Needs no threads.

    Raises EclipseError if it does not fit in the free memory of a CUDA device, with the sizes.
    """

    def __init__(
        self,
        store: Store,
        rows: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
        classes: SizeClasses | None = None,
    ) -> None:
        self._rows, self._device, self._dtype, self._classes = rows, device, dtype, classes
        counts = store.token_counts(rows).astype(np.int64)
        self._bounds = np.concatenate([[0], np.cumsum(counts)])
        shapes = ((len(rows), store.embedding_dim),) * 2 + ((int(self._bounds[-1]), store.text_width),)
        _require_room(sum(2 * a * b for a, b in shapes), device)
        self._image, self._text, self._states = (torch.empty(s, dtype=torch.float16, device=device) for s in shapes)
        buffers = Buffers(store, torch.device("cpu"))
        for start in range(0, len(rows), FILL_ROWS):
            stop = min(start + FILL_ROWS, len(rows))
            image, text, packed = buffers.fill(rows[start:stop], states=True)
            assert packed is not None
            self._image[start:stop], self._text[start:stop] = image, text
            self._states[self._bounds[start] : self._bounds[stop]] = packed.states
        self._pending: deque[np.ndarray] = deque()

    def wants_more(self) -> bool:
        return not self._pending

    def request(self, rows: np.ndarray) -> None:
        self._pending.append(rows)

    def prefetch(self, rows: np.ndarray) -> None:
        """Nothing to read ahead: everything is here."""

    def next(self) -> Batch:
        rows = self._pending.popleft()
        index = np.searchsorted(self._rows, rows)
        starts = self._bounds[index]
        counts = self._bounds[index + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(counts)])
        bins = None if self._classes is None else self._classes.lay_out(counts)
        laid_out = [] if bins is None else [x.numpy() for x in bins.tensors()]
        at, shift, n, bounds, *sent = self._send(index, starts - offsets[:-1], counts, offsets, *laid_out)
        total = int(offsets[-1])
        token = torch.repeat_interleave(shift, n, output_size=total) + torch.arange(total, device=self._device)
        image, text, states = (
            x.index_select(0, where) for x, where in ((self._image, at), (self._text, at), (self._states, token))
        )
        if bins is not None:
            return Batch(image, text, PackedText(states, bounds, Bins(*sent, texts=bins.texts)), rows)
        return Batch(image.float(), text.float(), PackedText(states.to(self._dtype), bounds), rows)

    def close(self) -> None:
        """Nothing to stop."""

    def _send(self, *arrays: np.ndarray) -> list[Tensor]:
        """Whole numbers to the device in one copy that nobody waits for, as int64."""
        together = torch.from_numpy(np.concatenate(arrays, dtype=np.int64, casting="safe"))
        if self._device.type == "cuda":
            together = together.pin_memory()
        return list(together.to(self._device, non_blocking=True).split([len(array) for array in arrays]))


def _disk_waits() -> int:
    """Page faults of this thread that had to wait for the disk."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def _require_room(size: int, device: torch.device) -> None:
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if size > 0.8 * free:  # the rest is for the model, its optimizer and the activations
        raise EclipseError(
            f"the selected cache takes {size / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free on {device}",
            hint="train without keeping the cache on the device: it is then read ahead from memory and disk",
        )
