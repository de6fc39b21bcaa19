"""Our prior as the `prior_prior` of diffusers' KandinskyV22CombinedPipeline. Made by `TextToImagePrior.as_diffusers`.

That pipeline samples its prior: it calls it once a timestep with the sample so far, applies guidance to what it says,
and lets a scheduler mix it with noise. A one-pass prior says all it has to say at the first of these calls, where the
sample is the pure noise that it takes. So it is run there once and gives the same answer until the last timestep, at
which the scheduler returns the prediction alone: whatever number of steps (two are the fewest it takes) and whatever
guidance scale are asked for, the pipeline ends in the one pass's prediction, to the 5e-4 that the scheduler's own last
coefficient is off in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from torch import Tensor

from ..trainer.model.prior import PackedText, Prior

# The scheduler clips predictions to a range (5 in Kandinsky 2.2's) made for embeddings that were normalised. Ours are
# raw, so they go through it this much smaller.
SCALE = 64.0


class DiffusersPrior(ModelMixin, ConfigMixin):
    """Takes what `PriorTransformer` takes, padded captions with their mask, and returns what it returns."""

    @register_to_config
    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self._seen: tuple[int, Tensor] | None = None  # the last timestep, and the prediction of this sampling

    @classmethod
    def wrap(cls, prior: Prior) -> DiffusersPrior:
        wrapped = cls(embedding_dim=prior.config.embedding_dim)
        wrapped.prior = prior
        return wrapped.eval()

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | int,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        return_dict: bool = True,
    ) -> PriorTransformerOutput | tuple[Tensor]:
        """hidden_states (B, D), proj_embedding (B, D), encoder_hidden_states (B, 77, W), attention_mask (B, 77) bool,
        true on real tokens → predicted_image_embedding (B, D), divided by SCALE.
        """
        at = int(timestep)
        if self._seen is None or at >= self._seen[0] or len(self._seen[1]) != len(hidden_states):
            prediction = self._predict(hidden_states, proj_embedding, encoder_hidden_states, attention_mask.bool())
        else:
            prediction = self._seen[1]
        self._seen = at, prediction
        return PriorTransformerOutput(predicted_image_embedding=prediction) if return_dict else (prediction,)

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """The raw image embedding, as the decoder takes it."""
        return prior_latents * SCALE

    def _predict(self, noise: Tensor, pooled: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
        prior: Any = self.prior
        prediction = prior(noise, pooled, PackedText(states[mask], offsets)).to(noise.dtype) / SCALE
        # Under guidance the batch is the same noise twice, without and with the text: two answers that are the same
        # leave nothing for it to lead away from.
        with_text = prediction.chunk(2)[-1]
        first, second = noise[: len(noise) // 2], noise[len(noise) // 2 :]
        guided = len(noise) % 2 == 0 and torch.equal(first, second)
        return torch.cat([with_text, with_text]) if guided else prediction
