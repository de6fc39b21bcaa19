"""Token states made while training, for caches that store none (`--no-text-states`). Called by run.py and
evaluate.py; batches.py takes it as `states_from`.

Disk against time: a caption of n tokens takes 2·n·W bytes in the cache (33 KB for COCO's 13 tokens at W = 1280), or
the text tower's forward pass every time it is seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from ...pipeline.cache.store import Store
from ...pipeline.core.errors import EclipseError
from ..model.transformer import PackedText
from .feeds import StatesFrom

if TYPE_CHECKING:
    from ...pipeline.core.sections import EncoderSection
    from ...pipeline.embed.clip import Encoder

CHUNK = 256  # captions of about one length that go through the text tower together


class LiveText:
    """Rows (B,) of the store → their captions' token states, float16 as the cache would hold them.

    All captions are kept in memory, their bytes and 8 more a row. Raises EclipseError if `encoder` is not the one that
    made the cache.
    """

    def __init__(self, store: Store, encoder: Encoder) -> None:
        if encoder.fingerprint != store.meta.encoder_fingerprint:
            raise EclipseError(
                "the card's encoder is not the one that made this cache",
                where=f"{store.parts[0].path}: {store.meta.encoder}",
                hint="name that encoder in the card, or run `eclipse embed --overwrite`",
            )
        self._encoder = encoder
        captions = store.column("caption").cast(pa.large_string()).combine_chunks()
        self._captions = captions if isinstance(captions, pa.Array) else captions.chunk(0)

    def __call__(self, rows: np.ndarray) -> PackedText:
        """States (N, W) on the encoder's device, in the order of `rows`."""
        tokens, n_tokens = self._encoder.tokenize(self._captions.take(pa.array(rows)).to_pylist())
        order = n_tokens.argsort(stable=True)  # neighbours of one length: little is computed for nothing
        pieces = [self._encoder.encode_text(tokens[some], n_tokens[some]).states for some in order.split(CHUNK)]
        states = torch.cat(pieces).half()
        offsets = torch.cat([n_tokens.new_zeros(1), n_tokens.cumsum(0)])
        begin = torch.empty_like(n_tokens)  # where each caption's states lie in the sorted pieces
        begin[order] = n_tokens[order].cumsum(0) - n_tokens[order]
        source = torch.repeat_interleave(begin - offsets[:-1], n_tokens) + torch.arange(len(states))
        # Taking also makes an ordinary tensor of one from inference mode, which gradients could not pass by.
        return PackedText(states.index_select(0, source.to(states.device)), offsets.to(states.device))


def live_text(store: Store, section: EncoderSection, device: torch.device) -> StatesFrom | None:
    """What `Batches` needs as states_from: None for a cache that stores states, else a loaded encoder's LiveText."""
    if store.has_text_states:
        return None
    from ...pipeline.embed.clip import Encoder

    names, where = (section.model, section.pretrained), str(device)
    return LiveText(store, Encoder.load(*names, precision=section.precision, device=where, text_only=True))
