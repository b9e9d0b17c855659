"""CUDA graphs: a step whose work on the GPU is recorded once and from then on replayed with a single launch.

A decoding step of the 7B reads its weights in 3.3 ms; at 5 us each, a host needs half of that to launch 300 kernels one by one.
A recording holds kernels with their addresses and numbers, not what Python did. So a function that is to be recorded

    * reads nothing back, and has the same shapes and branches every time;
    * takes what differs from call to call as tensors, or finds it in tensors that stay where they are (KVCache.lengths);
    * gives its result in the same memory every time: it is overwritten by the next call.

Whether all that holds is tested without a GPU (tests/test_graphs.py). No GPU has run it yet, so it is off unless asked for.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Graph:
    """A function of tensors, recorded for each of the shapes it is called with.

    The first call of a shape runs as it is written: kernels are compiled, tile lists built. The second is recorded. Whatever
    else the function reads has to outlive the recording, which is why a Graph holds on to the function.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.recorded: dict[tuple, tuple | None] = {}  # shapes -> (inputs, what replays, result), None after the first call

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = None
            return self.function(*inputs)
        if self.recorded[shapes] is None:
            own = [x.clone() for x in inputs]
            self.recorded[shapes] = own, *capture(self.function, own)
        own, replay, result = self.recorded[shapes]
        for mine, x in zip(own, inputs, strict=True):
            mine.copy_(x)
        replay()
        return result


def capture(function: Callable, inputs: list[Tensor]) -> tuple[Callable[[], None], Tensor | tuple[Tensor, ...]]:
    """(what replays, where the result then lies). Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*inputs)
    return graph.replay, result
