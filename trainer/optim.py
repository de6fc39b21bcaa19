"""AdamW, or Muon for the matrices and AdamW for the rest. Called by run.py."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .distributed import multiplies_bfloat16

# Newton–Schulz iteration of Keller Jordan's Muon: an odd polynomial that is steep at 0 and stays near 1 afterwards.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95
RMS = 0.2  # of AdamW's updates, about: what arXiv 2502.16982 scales Muon's to


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: of each matrix's update all singular values are brought near 1 (arXiv 2502.16982).

    The same as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but for two things. All matrices of one shape are
    orthogonalised in one batched call: small products cost their launch on a GPU, their preparation on a CPU. And
    products are made in bfloat16 only where the device has them in hardware: most CPUs do not, and take fifty times as
    long over them as over float32.

    found_inf, where set, is GradScaler's seam: a tensor () that is 1 where this step must leave no trace.
    """

    found_inf: Tensor | None = None

    def __init__(self, matrices: Iterable[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same[parameter.shape].append(parameter)
            for shape, parameters in same.items():
                buffers = [self._buffer(parameter) for parameter in parameters]
                gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
                rate: float | Tensor = group["lr"]
                if self.found_inf is not None:  # then the momentum stays, and nothing moves
                    bad = self.found_inf > 0
                    gradients = [torch.where(bad, b, g) for b, g in zip(buffers, gradients, strict=True)]
                    rate = rate * (1 - self.found_inf)
                torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
                ahead = torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM))  # Nesterov's
                step = orthogonalised(ahead).mul_(-RMS * max(shape) ** 0.5 * rate)
                torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
                torch._foreach_add_(parameters, list(step.unbind()))

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalised(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(n, a, b) → U·S·Vᵀ of each, singular values S all within about 0.7 and 1.2. dtype: of the products."""
    a, b, c = COEFFICIENTS
    if dtype is None:
        dtype = torch.bfloat16 if multiplies_bfloat16(matrices.device) else torch.float32
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)  # so that no singular value is above 1
    if dtype == torch.float32 and 2 * x.shape[-2] <= x.shape[-1]:
        x = _factor(x @ x.mT) @ x
    else:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _factor(gram: Tensor) -> Tensor:
    """What the iteration multiplies a wide X by, from X·Xᵀ alone: small square products in place of wide ones.

    Each step multiplies X by some P and so X·Xᵀ by P·P, all of which commute. Half precision has too few digits for it.
    """
    a, b, c = COEFFICIENTS
    factor = None
    for i in range(ITERATIONS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = p if factor is None else factor @ p
        if i < ITERATIONS - 1:
            gram = p @ (p @ gram)
    assert factor is not None
    return factor


def make_optimizers(
    network: nn.Module, kind: Literal["adamw", "muon"], *, learning_rate: float, weight_decay: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Optimizers that together own every trained parameter; decay on the matrices of linear layers alone.

    muon: those matrices are updated by their orthogonalised momentum (Muon, arXiv 2502.16982), scaled so that learning
    rate and decay mean what they mean to AdamW; biases, norms and embeddings stay with AdamW.
    """
    linear = {layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)}
    trained = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in trained if p in linear]
    rest: dict[str, Any] = {"params": [p for p in trained if p not in linear], "weight_decay": 0.0}
    if kind == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay}, rest]
        return (torch.optim.AdamW(groups, lr=learning_rate, fused=True),)
    return Muon(matrices, learning_rate, weight_decay), torch.optim.AdamW([rest], lr=learning_rate, fused=True)


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], network: nn.Module) -> dict[str, Tensor]:
    """The optimizers' moments and step counts under the names of the parameters they belong to."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {
        f"{names[parameter]}.{kind}": value
        for optimizer in optimizers
        for parameter, moments in optimizer.state.items()
        for kind, value in moments.items()
    }


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], network: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, for parameters on any device."""
    parameters = dict(network.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, value in tensors.items():
        parameter, kind = parameters[name.rpartition(".")[0]], name.rpartition(".")[2]
        owner[parameter].state[parameter][kind] = value.to(parameter.device)
