"""A GPU that is not there: tensors that say `cuda`, compute on the CPU and refuse to mix with tensors of the CPU.

It sees what a CPU hides: operands on two devices, and how often the host waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
# Where values cross over, one operand may be on the host; and a number (a tensor without dimensions) may be anywhere.
CROSSING = ("to", "_to_copy", "copy_", "set_")


class PretendTensor(Tensor):
    """On `cuda` for all who ask; `numbers` holds its numbers, on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device("meta"),  # a true cuda tensor would ask the driver for its stream
            requires_grad=False,
        )
        made.numbers = numbers
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} outside pretend_gpu()")


class PretendGpu(TorchDispatchMode):
    """waits: how often the host waited for the device, by the operator that made it wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        if name == "_has_compatible_shallow_copy_type":
            return False
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        pretended = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        on_host = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.ndim]
        if pretended and on_host and name not in CROSSING:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        targets = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.device)]
        to_gpu = targets[0].type in ("cuda", "meta") if targets else bool(pretended)  # meta: `x.to(pretended)`
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if name == "is_pinned":
            return False
        if name == "_pin_memory":
            return args[0].clone()
        blocking = not kwargs.get("non_blocking", False)
        if pretended and (
            name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
            or (name in ("to", "_to_copy") and not to_gpu)
            or (name in ("index", "repeat_interleave") and _unknown_size(name, args, kwargs))
        ):
            self.waits[name] += 1
        if not pretended and to_gpu and name in ("to", "_to_copy") and blocking:
            self.waits["copy from pageable memory"] += 1
        if name == "copy_" and isinstance(args[0], PretendTensor) != isinstance(args[1], PretendTensor):
            self.waits["copy_"] += 1

        def unwrap(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return x.numbers if isinstance(x, PretendTensor) else x

        out = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if name.endswith("_") and not name.startswith("_") and isinstance(args[0], PretendTensor):
            return args[0]
        return tree_map(lambda x: PretendTensor(x) if isinstance(x, Tensor) else x, out) if to_gpu else out


def _unknown_size(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the size of what comes out depends on values."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


@contextmanager
def pretend_gpu(monkeypatch: Any) -> Iterator[PretendGpu]:
    """Within the block `device="cuda"` works, for inference. What is moved there and back keeps its numbers."""

    def made_here_first(make: Any) -> Any:
        return lambda data, *args, device=None, **options: make(data, *args, **options).to(device or "cpu")

    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch, "tensor", made_here_first(torch.tensor))  # these two never ask a dispatch mode
    monkeypatch.setattr(torch, "as_tensor", made_here_first(torch.as_tensor))
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    with torch.inference_mode(), PretendGpu() as mode:
        yield mode
