"""What a computation costs in memory."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def bytes_kept(forward: Callable[[], Any], device: torch.device | str = "cpu", besides: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward pass keeps for its backward pass: exact on a CPU; on a GPU, what the allocator says.

    Args:
        forward: returns what the backward pass would start from.
        device: that it runs on.
        besides: tensors that are there anyway, parameters say, and do not count on a CPU.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        out = forward()
        kept = torch.cuda.memory_allocated(device) - before
        del out
        return kept
    alive = weakref.WeakSet()

    def keep(x: Tensor) -> "_Kept":
        kept = _Kept(x.detach())  # of a saved output itself, the graph would keep itself alive
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.x):
        out = forward()  # what a rejected step had kept is gone by now
    sizes = {kept.x.untyped_storage().data_ptr(): kept.x.untyped_storage().nbytes() for kept in alive}
    there = {x.untyped_storage().data_ptr() for x in besides}
    del out
    return sum(size for storage, size in sizes.items() if storage not in there)


class _Kept:
    def __init__(self, x: Tensor) -> None:
        self.x = x
