"""AdamW, or Muon for the matrices and AdamW for the rest. Called by setup.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn


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
    muon = torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW([rest], lr=learning_rate, fused=True)


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
