"""Every text notebook runs from top to bottom in a fresh kernel, and its cells keep the code's style."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "_build" / "nbval"


@pytest.fixture(scope="module")
def folder() -> Path:
    """A folder with every text notebook of the book as .ipynb, which is what nbval and ruff read."""
    for page in (ROOT / "book").rglob("*.md"):
        if page.read_text().startswith("---\njupytext:"):
            target = BUILD / page.relative_to(ROOT).with_suffix(".ipynb")
            target.parent.mkdir(parents=True, exist_ok=True)
            jupytext.write(jupytext.read(page), target)
    return BUILD


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_cells_are_linted_and_formatted(folder):
    run("ruff", "check", "--no-force-exclude", str(folder))
    run("ruff", "format", "--check", "--no-force-exclude", str(folder))


@pytest.mark.slow
def test_every_notebook_runs_in_a_fresh_kernel(folder):
    # One process a notebook (loadscope), or nbval would spread the cells of one over two kernels.
    options = "-p no:cacheprovider -o addopts= --nbval-lax --nbval-current-env --nbval-cell-timeout=300"
    workers = f"-n {min(2, os.cpu_count())} --dist loadscope"
    run("pytest", *options.split(), *workers.split(), str(folder), PREDOC_PRESET="smoke", OMP_NUM_THREADS="1")
