"""Networks in bfloat16, and nothing else."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn

PRECISIONS = ("float32", "bfloat16")


@contextlib.contextmanager
def lower_precision(networks: list[nn.Module], precision: str, device: str) -> Iterator[None]:
    """Run the networks in bfloat16 inside the block; what they return is float32 again."""
    if precision == "float32":
        yield
        return

    def lowered(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def call(*args: Any, **options: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return convert_to_fp32(forward(*args, **options))

        return call

    for network in networks:
        network.forward = lowered(network.forward)
    try:
        yield
    finally:
        for network in networks:
            del network.forward
