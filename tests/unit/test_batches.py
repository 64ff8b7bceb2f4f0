"""Who computes which rows: every sample once an epoch, and the same noise however the work is shared."""

import itertools

import pytest
import torch

from predoc_lib.batches import Share, count_steps


class Numbers:
    """A data set whose samples are their numbers."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i


class Endless:
    def __getitem__(self, i):
        return i


def parts(data, batch, steps, processes=1, accumulate=1, seed=0):
    """{(step, rank, part): numbers}."""
    found = {}
    for rank in range(processes):
        loader = iter(Share(batch, accumulate, processes, rank, seed).load(data, steps, workers=0))
        for step, part in itertools.product(steps, range(accumulate)):
            found[step, rank, part] = next(loader).tolist()
        assert next(loader, None) is None
    return found


WAYS = pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])


@WAYS
def test_however_a_batch_is_shared_it_is_the_same_batch(processes, accumulate):
    whole, shared = (parts(Numbers(50), 12, range(1, 9), *way) for way in ((1, 1), (processes, accumulate)))
    for step in range(1, 9):
        joined = [n for r, p in itertools.product(range(processes), range(accumulate)) for n in shared[step, r, p]]
        assert joined == whole[step, 0, 0]


@WAYS
@pytest.mark.parametrize("n", [24, 50, 7])
def test_every_sample_is_seen_once_an_epoch(processes, accumulate, n):
    found = parts(Numbers(n), 12, range(1, n + 1), processes, accumulate)
    order = itertools.product(range(1, n + 1), range(processes), range(accumulate))
    seen = [number for key in order for number in found[key]]
    epochs = [seen[i : i + n] for i in range(0, 12 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_alone_and_can_be_taken_up_anywhere():
    whole, again, other = (parts(Numbers(50), 10, range(1, 21), seed=seed) for seed in (3, 3, 4))
    assert whole == again != other
    late = parts(Numbers(50), 10, range(14, 21), seed=3)
    assert all(late[key] == whole[key] for key in late)


def test_endless_data_are_counted_and_never_seen_again():
    found = parts(Endless(), 6, range(1, 4), processes=2)
    assert found[1, 0, 0] == [0, 1, 2]
    assert found[1, 1, 0] == [3, 4, 5]
    assert sorted(n for numbers in found.values() for n in numbers) == list(range(18))


@pytest.mark.parametrize("draw", ["randn", "rand"])
def test_the_noise_of_a_row_is_the_same_however_the_batch_is_shared(draw):
    def noise(processes, accumulate, step=5, seed=1):
        pieces = []
        for rank, part in itertools.product(range(processes), range(accumulate)):
            rows = Share(12, accumulate, processes, rank, seed).rows(step, part, torch.device("cpu"))
            pieces.append(torch.cat([getattr(rows, draw)(3), getattr(rows, draw)(2)], 1))
        return torch.cat(pieces)

    assert noise(1, 1).shape == (12, 5)
    for way in ((2, 1), (1, 4), (3, 2)):
        assert torch.equal(noise(*way), noise(1, 1))
    assert not torch.equal(noise(1, 1, step=6), noise(1, 1))
    assert not torch.equal(noise(1, 1, seed=2), noise(1, 1))
    assert not torch.equal(noise(1, 1)[:, :2], noise(1, 1)[:, 3:])


def test_the_noise_is_gaussian_or_uniform():
    rows = Share(50_000, 1, 1, 0, 0).rows(1, 0, torch.device("cpu"))
    normal, uniform = rows.randn(), rows.rand()
    assert abs(normal.mean()) < 0.02
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("batch", "accumulate", "processes"), [(10, 3, 1), (10, 1, 4), (12, 2, 5), (0, 1, 1)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(batch, accumulate, processes):
    with pytest.raises(
        ValueError, match=rf"multiple of processes times accumulate, {processes} x {accumulate}, got {batch}"
    ):
        Share(batch, accumulate, processes, 0, 0)


def test_epochs_are_steps_that_see_every_sample():
    assert count_steps(Numbers(100), None, 2, 30) == 7
    assert count_steps(Numbers(100), None, 0.3, 30) == 1
    assert count_steps(Numbers(100), 5, None, 30) == 5
    with pytest.raises(ValueError, match="Endless data have no epochs"):
        count_steps(Endless(), None, 1, 30)
    for steps, epochs in ((None, None), (3, 1)):
        with pytest.raises(ValueError, match="Give steps or epochs, one of them"):
            count_steps(Numbers(100), steps, epochs, 30)
