"""What products of half precision a piece of code makes: slow on most CPUs, and unnoticed on those that have them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "convolution", "einsum")
HALF = (torch.bfloat16, torch.float16)


class Products(TorchDispatchMode):
    """Counts this thread's products while the block runs, backward passes included: `made`, by operator and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].strip("_")
        if name in PRODUCTS or "attention" in name or "convolution" in name or "linear" in name:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    self.made[name, x.dtype] += 1
        return func(*args, **(kwargs or {}))

    @property
    def half(self) -> list[tuple[str, torch.dtype]]:
        return [(name, dtype) for name, dtype in self.made if dtype in HALF]
