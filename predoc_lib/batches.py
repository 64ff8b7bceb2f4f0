"""Who computes which rows of which batch, with which noise: functions of seed and step, so no state is to be kept."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a step's batch that one call of the loss computes, and noise for them.

    The noise depends on the seed, the step and the row alone: it is the same however many processes share the batch.

    Attributes:
        step: of the run, from 1.
        start: the first row.
        stop: the row after the last one.
        batch: rows of the whole batch, over all processes.
        generator: of this step.
    """

    step: int
    start: int
    stop: int
    batch: int
    generator: torch.Generator

    def randn(self, *shape: int) -> Tensor:
        """Standard normal noise [stop - start, *shape]; another call gives other noise."""
        return self._mine(torch.randn, shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform noise in [0, 1), [stop - start, *shape]; another call gives other noise."""
        return self._mine(torch.rand, shape)

    def _mine(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        everyones = draw(self.batch, *shape, generator=self.generator, device=self.generator.device)
        return everyones[self.start : self.stop]


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process computes of every batch: ``accumulate`` parts of equal size, one after the other.

    Args:
        batch: samples of a step, over all processes.
        accumulate: parts into which a process divides its share.
        processes: how many there are.
        rank: the number of this one.
        seed: of the order of the data and of the rows' noise.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """

    batch: int
    accumulate: int
    processes: int
    rank: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch % (self.processes * self.accumulate):
            raise ValueError(
                f"batch_size must be a multiple of processes times accumulate, {self.processes} x {self.accumulate}, "
                f"got {self.batch}."
            )

    def rows(self, step: int, part: int, device: torch.device) -> Rows:
        """The rows of one part of a step's batch."""
        size = self.batch // (self.processes * self.accumulate)
        start = (self.rank * self.accumulate + part) * size
        mixed = int(np.random.SeedSequence((self.seed, step)).generate_state(1, np.uint64)[0] >> 1)
        return Rows(step, start, start + size, self.batch, torch.Generator(device).manual_seed(mixed))

    def load(self, data: Any, steps: range, workers: int) -> DataLoader:
        """The batches of all parts of these steps."""
        collate = getattr(data, "collate", None)
        return DataLoader(
            data,
            batch_sampler=_Order(self, data, steps),
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_apart,
            generator=torch.Generator().manual_seed(self.seed),  # else it draws from the one that a model may use
        )


def _apart(worker: int) -> None:
    """Ctrl-C, and a SIGTERM to a whole process group, are for the process that trains: it still needs its workers."""
    os.setpgrp()


class _Order(Sampler):
    """The numbers of the samples in each part: one permutation of the data an epoch; of endless data 0, 1, 2, ..."""

    def __init__(self, share: Share, data: Any, steps: range) -> None:
        self.share, self.steps = share, steps
        self.n = len(data) if hasattr(data, "__len__") else None

    def __iter__(self) -> Iterator[list[int]]:
        @functools.lru_cache(2)
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((self.share.seed, epoch)).permutation(self.n)

        size = self.share.batch // (self.share.processes * self.share.accumulate)
        for step in self.steps:
            for part in range(self.share.accumulate):
                first = (step - 1) * self.share.batch + (self.share.rank * self.share.accumulate + part) * size
                numbers = range(first, first + size)
                if self.n is None:
                    yield list(numbers)
                else:
                    yield [int(permutation(k // self.n)[k % self.n]) for k in numbers]


def count_steps(data: Any, steps: int | None, epochs: float | None, batch: int) -> int:
    """The steps of a run that is given in steps or in passes through the data.

    Raises:
        ValueError: both or none are given, or epochs of endless data.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"Give steps or epochs, one of them: got steps={steps} and epochs={epochs}.")
    if steps is not None:
        return steps
    if not hasattr(data, "__len__"):
        raise ValueError("Endless data have no epochs: give steps.")
    return math.ceil(epochs * len(data) / batch)
