"""One training update as one captured CUDA graph: small networks are bound by launches. Called by lab/build_further."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WARM_UP = 3


def captured(update: Callable[[], None], state: Callable[[], Sequence[Tensor]]) -> Callable[[], None]:
    """`update` as a graph that replays it; on a CPU `update` itself. `state` names every tensor that it changes and
    that must be as before once capturing has run it a few times; tensors that did not exist before become zero.
    """
    if not torch.cuda.is_available() or not next(iter(state())).is_cuda:
        return update
    kept = {tensor: tensor.detach().clone() for tensor in state()}
    # Nodes of a graph keep the priority of the stream they were captured on.
    side = torch.cuda.Stream(priority=torch.cuda.current_stream().priority)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        update()
    with torch.no_grad():
        for tensor in state():
            tensor.copy_(kept[tensor]) if tensor in kept else tensor.zero_()
    return graph.replay
