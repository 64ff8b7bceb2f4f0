"""Networks in bfloat16, or compiled, while they are trained, and nothing else."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn

PRECISIONS = ("float32", "bfloat16")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Convolutions and linear layers: the networks of a model whose work is not all in its ``forward``."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def emulated(precision: str) -> bool:
    """Whether an x86 processor emulates the precision, for want of instructions; False where PyTorch cannot tell."""
    has = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.6 cannot tell
    instructions = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert"))
    return precision == "bfloat16" and has.get("architecture") == "x86_64" and not instructions


@contextlib.contextmanager
def lower_precision(networks: list[nn.Module], precision: str, device: str) -> Iterator[None]:
    """Run the networks in bfloat16 inside the block, or leave them in float32; what they return is float32 again."""

    def lowered(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def call(*args: Any, **options: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return convert_to_fp32(forward(*args, **options))

        return call

    with _changed([] if precision == "float32" else networks, lowered):
        yield


@contextlib.contextmanager
def compiled(modules: list[nn.Module], mode: str = "default") -> Iterator[None]:
    """Run the modules compiled inside the block, in one of ``MODES``, torch.compile's own.

    Outside they are as they were: what is measured after training would be compiled anew, for its own shapes.
    """
    with _changed(modules, functools.partial(torch.compile, mode=mode)):
        yield


@contextlib.contextmanager
def _changed(modules: list[nn.Module], change: Callable[[Callable], Callable]) -> Iterator[None]:
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = change(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
