"""The example in one file against the library: the same densities and the same samples of the same fields."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from predoc_lib.data.photos import reduced
from predoc_lib.msflow import MSFlow

FILE = Path(__file__).parents[2] / "examples" / "msflow_in_150_lines.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scales(example):
    """Trained for a moment, with fields that are no trivial ones."""
    torch.manual_seed(0)
    return example.train(example.photographs()[0], steps=100)


class Given(nn.Module):
    """A field of the example, as the library calls it."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, t, x, cond=None):
        return self.scale(t.reshape(-1), x, cond)


@pytest.fixture
def library(scales):
    waiting = iter(scales)
    model = MSFlow(16, 3, 3, lam=None, field=lambda *_: Given(next(waiting)), rtol=1e-6, atol=1e-6)
    for whitening, scale in zip(model.bands, scales, strict=True):
        whitening.mean.copy_(scale.mean)
        whitening.factor.copy_(scale.factor)
    model.trained.fill_(True)
    return model


def test_it_has_at_most_150_lines_that_are_not_blank_and_needs_torch_and_pictures_alone():
    text = FILE.read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 150
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else name.name).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "PIL", "skimage", "sklearn"}


def test_its_bits_per_dim_are_the_librarys(example, scales, library):
    images = example.crops(example.photographs()[1], 6, augment=False)
    torch.manual_seed(1)
    mine = example.bits_per_dim(scales, images)
    torch.manual_seed(1)
    theirs = library.bits_per_dim(images.byte())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0.005)


def test_its_loss_is_the_librarys(example, scales, library):
    levels = example.crops(example.photographs()[1], 6)
    torch.manual_seed(3)
    parts = zip(scales, example.bands(levels), strict=True)
    mine = sum(scale.loss(*part) * part[0][0].numel() for scale, part in parts) / levels[0].numel()
    torch.manual_seed(3)
    torch.testing.assert_close(mine, library.loss(levels.byte()), rtol=1e-4, atol=0)


def test_its_samples_are_the_librarys(example, scales, library):
    torch.manual_seed(2)
    mine = example.sample(scales, 4)
    torch.manual_seed(2)
    theirs = library.sample(4)
    assert (mine.int() - theirs.int()).abs().float().mean() < 0.5


def test_training_gains_bits_and_the_pictures_are_the_books(example, scales):
    train, test = example.photographs()
    assert torch.equal(train[0].byte(), torch.from_numpy(reduced("astronaut")))
    untrained = nn.ModuleList(example.Scale(*part) for part in example.bands(example.crops(train, 500)))
    images = example.crops(test, 16, augment=False)
    before, after = (example.bits_per_dim(model, images).mean() for model in (untrained, scales))
    assert after < before - 0.2, (before, after)
