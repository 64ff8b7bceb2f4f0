"""Networks in bfloat16 or compiled while they are trained, and nothing else."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn

PRECISIONS = ("float32", "bfloat16")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Convolutions and linear layers: the networks of a model whose work is not all in its ``forward``."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@contextlib.contextmanager
def lower_precision(networks: list[nn.Module], precision: str, device: str, compile: bool = False) -> Iterator[None]:
    """Run the networks in bfloat16, or compiled, or both, inside the block; what they return is float32 again.

    Outside they are as they were: what is measured after training would be compiled anew, for its own shapes.
    """

    def lowered(forward: Callable) -> Callable:
        forward = torch.compile(forward) if compile else forward
        if precision == "float32":
            return forward

        @functools.wraps(forward)
        def call(*args: Any, **options: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return convert_to_fp32(forward(*args, **options))

        return call

    changed = networks if compile or precision != "float32" else []
    for network in changed:
        network.forward = lowered(network.forward)
    try:
        yield
    finally:
        for network in changed:
            del network.forward
