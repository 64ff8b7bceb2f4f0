"""Weights and checkpoints on the disk: whole, checked, and never unpickled."""

import math
import os
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from predoc_lib import checkpoint
from predoc_lib.checkpoint import CheckpointError, WeightsError, load_weights, must_be_same, save_weights

leaves = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=5)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(trees)
def test_any_state_of_plain_values_comes_back_as_it_was(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("state")
    assert same(checkpoint.load(checkpoint.save(folder, 1, {"x": tree}))["x"], tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_tensors_of_every_kind_come_back_bit_by_bit(tmp_path, dtype, shape):
    x = (torch.randn(shape) * 3).to(dtype)
    state = {"deep": [{0: (x, x.T if x.ndim == 2 else x)}]}
    assert same(checkpoint.load(checkpoint.save(tmp_path, 1, state)), state)


@pytest.mark.parametrize(
    "state",
    [
        {1: 0, "1": 1, 1.5: 2},
        {None: 0, "None": 1, True: 2, "True": 3},
        {"a/b": 0, "a": {"b": 1, "b'": 2}, "a/b'": 3},
        {(1, "x"): 0, "(1, 'x')": 1},
        {"": 0, "/": {"": 1}},
        {"$tensor": 0, "$tuple": 1, "$items": {"$tensor": 2}},
    ],
    ids=str,
)
def test_a_tensor_is_found_under_any_key_and_next_to_any_other(tmp_path, state):
    """Keys that are the same as text, or as a path, still name tensors of their own."""

    def filled(tree):
        if isinstance(tree, dict):
            return {key: filled(value) for key, value in tree.items()}
        return torch.full((tree + 1,), float(tree))

    state = filled(state)
    found = checkpoint.load(checkpoint.save(tmp_path, 1, {"x": state}))["x"]
    assert [type(key) for key in found] == [type(key) for key in state]
    assert same(found, state)


def test_a_tensor_that_is_a_view_is_saved_alone(tmp_path):
    x = torch.arange(10_000.0)
    path = checkpoint.save(tmp_path, 1, {"x": x[:3]})
    assert path.stat().st_size < 2000


def test_the_state_of_an_optimizer_and_its_schedule_comes_back(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)

    def step(model, optimizer, schedule, n):
        for i in range(n):
            optimizer.zero_grad()
            model(torch.full((1, 3), float(i))).square().sum().backward()
            optimizer.step()
            schedule.step()

    things = build()
    step(*things, 5)
    path = checkpoint.save(tmp_path, 5, {"things": [thing.state_dict() for thing in things]})
    step(*things, 5)
    others = build()
    for thing, state in zip(others, checkpoint.load(path)["things"], strict=True):
        thing.load_state_dict(state)
    step(*others, 5)
    assert torch.equal(things[0].weight, others[0].weight)


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot hold 'a/0/b', a object"):
        checkpoint.save(tmp_path, 1, {"a": [{"b": object()}]})
    assert list(tmp_path.iterdir()) == []


def test_the_last_two_are_kept_and_the_newest_is_the_one_of_the_highest_step(tmp_path):
    for step in (5, 100, 20):
        checkpoint.save(tmp_path, step, {"step": step})
    assert [path.name for path in checkpoint.paths(tmp_path)] == [
        "step-00000020.safetensors", "step-00000100.safetensors"
    ]  # fmt: skip
    os.utime(tmp_path / "step-00000100.safetensors", (0, 0))  # a clock that went backwards
    assert checkpoint.newest(tmp_path)["step"] == 100


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def flip(position):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(bytes(content))

    return damage


def in_the_state(path):
    """A digit of the JSON in the header: still a valid file, another content."""
    content = path.read_bytes()
    assert content.count(b"12345") == 1
    path.write_bytes(content.replace(b"12345", b"12346"))


@pytest.mark.parametrize(
    "damage", [truncate, empty, flip(-1), flip(3), flip(40), in_the_state],
    ids=["truncated", "empty", "tensor bit", "length bit", "header bit", "another number"],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, {"step": step, "x": torch.randn(50), "n": 12345})
    damage(path)
    with pytest.warns(UserWarning, match=r"step-00000002\.safetensors .*The checkpoint before it is used\."):
        assert checkpoint.newest(tmp_path)["step"] == 1


def test_if_every_checkpoint_is_damaged_it_says_so_and_what_to_do(tmp_path):
    for step in (1, 2):
        empty(checkpoint.save(tmp_path, step, {"step": step}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=r"Every checkpoint in .* is damaged\. Delete that folder"):
            checkpoint.newest(tmp_path)


def test_without_checkpoints_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_the_rest_of_a_killed_save_is_cleared_away_and_never_read(tmp_path):
    (tmp_path / ".step-00000007.safetensors.99").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, 8, {"step": 8})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008.safetensors"]


def test_the_summary_is_the_state_without_its_tensors(tmp_path):
    path = checkpoint.save(tmp_path, 3, {"step": 3, "history": [{"loss": 0.5}], "model": {"w": torch.ones(3)}})
    assert checkpoint.summary(path) == {"step": 3, "history": [{"loss": 0.5}], "model": {"w": None}}
    empty(path)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoint.summary(path)


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.summary])
@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "3", '{"step": 3}', '{"$items": 3}', '{"$items": [1]}', '{"$items": [[[], 1]]}', "[" * 100_000],
    ids=lambda text: text[:20],
)
def test_a_header_that_holds_something_else_is_refused_in_one_sentence(tmp_path, read, content):
    path = tmp_path / "step-00000001.safetensors"
    metadata = {"state": content, "sha256": checkpoint._checksum(content, {})}
    safetensors.torch.save_file({}, path, metadata=metadata)
    with pytest.raises(CheckpointError) as refused:
        read(path)
    assert str(refused.value) == f"{path} cannot be read as a checkpoint: its header holds no state of a run."


def test_a_safetensors_file_without_a_header_of_its_own_is_refused(tmp_path):
    save_weights(nn.Linear(1, 1), tmp_path / "weights.safetensors")
    for read in (checkpoint.load, checkpoint.summary):
        with pytest.raises(CheckpointError, match="its header holds no state of a run"):
            read(tmp_path / "weights.safetensors")


def test_other_runs_are_told_by_the_fields_that_differ(tmp_path):
    mine = {"experiment": "a", "seed": 1, "device": "cpu", "new": 3}
    must_be_same(mine, mine | {"device": "cuda"}, tmp_path)
    with pytest.raises(CheckpointError, match="new is 'absent' there and 3 here; seed is 2 there and 1 here"):
        must_be_same(mine, {"experiment": "a", "seed": 2, "device": "cpu"}, tmp_path)


def test_random_generators_go_on_where_they_were(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    np.random.randn()  # leaves a second Gaussian in store
    state = checkpoint.random_state()
    path = checkpoint.save(tmp_path, 1, {"random": state})
    checkpoint.set_random_state(state)
    expected = draw()
    draw()
    checkpoint.set_random_state(checkpoint.load(path)["random"])
    assert draw() == expected


# ---------------------------------------------------------------- weights


class Evil:
    """What a pickle does when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_weights_that_are_a_pickle_are_refused_and_never_opened(tmp_path, write):
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        write(Evil(tmp_path / "harm"), file)
    with pytest.raises(WeightsError, match=r"cannot be read as safetensors weights.* a pickle is never opened"):
        load_weights(nn.Linear(1, 1), path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_come_back_in_the_models_own_type(tmp_path, dtype):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_weights(model, tmp_path / "w.safetensors", dtype)
    load_weights(other, tmp_path / "w.safetensors")
    assert other.weight.dtype == torch.float32
    assert torch.equal(other.weight, model.weight.to(dtype).float())


def test_tied_weights_are_kept(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "w.safetensors")
    with torch.no_grad():
        expected = model[0].weight.add(0).clone()
        model[0].weight.zero_()
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[1].weight, expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), r"it has \[2\] for 'bias', the model \[3\]"),
        (nn.Linear(3, 2, bias=False), r"it has \[2\] for 'bias', the model nothing"),
        (nn.Sequential(nn.Linear(3, 2)), r"it has nothing for '0.bias', the model \[2\]"),
    ],
)
def test_weights_of_another_model_are_refused_with_both_shapes(tmp_path, model, message):
    save_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(WeightsError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_weights_that_are_absent_or_damaged_are_named(tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=str(path)):
        load_weights(nn.Linear(1, 1), path)


def test_a_save_that_fails_leaves_the_old_weights(tmp_path, monkeypatch):
    path, model = tmp_path / "w.safetensors", nn.Linear(2, 2)
    save_weights(model, path)
    old = path.read_bytes()

    def half(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        save_weights(nn.Linear(2, 2), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
