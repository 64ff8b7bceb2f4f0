"""What a computation costs in memory."""

import itertools
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


def peak_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors made in a call occupy at one time, beyond what was there before it.

    As the allocator says on a GPU, and the profiler, which sees every allocation, on a CPU.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    occupied = itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    return max(occupied, default=0)


class _Kept:
    def __init__(self, x: Tensor) -> None:
        self.x = x
