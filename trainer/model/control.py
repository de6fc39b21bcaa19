"""λ-ECLIPSE's prior (arXiv 2402.05195): ECLIPSE's with a control token. Read by `load_prior`; nothing trains one here.

The network as its authors' inference code has it: one more linear layer, `embedding_control`, whose token stands
between the text's token states and the pooled text embedding: 77 + 4 positions and 34,849,536 parameters.
What is not here is the rest of their method: the states of a subject's word replaced by a picture's embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .prior import Prior
from .transformer import PackedText, PriorConfig, like


class ControlPrior(Prior):
    """One pass like `Prior`, steered by a picture: in λ-ECLIPSE the CLIP image embedding of a Canny edge map."""

    specials = 4

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.embedding_control = nn.Linear(config.embedding_dim, config.width)

    def forward(self, noise: Tensor, text_embedding: Tensor, text: PackedText, control: Tensor | None = None) -> Tensor:
        """noise, text_embedding, control (B, D), text of B captions → raw CLIP image embedding (B, D).

        control None: an all-zero embedding, which leaves the layer's bias. The published code always passes one and
        names no default for pictures without control, so this choice is ours.
        """
        control = torch.zeros_like(text_embedding) if control is None else control
        noise, text_embedding, control = (like(x, self.prd_embedding) for x in (noise, text_embedding, control))
        prd = self.prd_embedding[0].expand(len(noise), -1)
        specials = [self.embedding_control(control), self.embedding_proj(text_embedding), self.proj_in(noise), prd]
        return self.run(specials, text)
