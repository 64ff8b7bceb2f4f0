"""Benchmarks run, and say on what; the times that they measure are for a quiet machine and are not tested."""

import json
import runpy
import subprocess
import sys

import pytest

from predoc_lib.experiments.yolo_clips import drawn_unseen
from predoc_lib.experiments.yolo_dynamics import load
from predoc_lib.experiments.yolo_measures import precisions
from predoc_lib.results import RESULTS, ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "tables"),
    [
        ("msflow", ["--quick"], 3),
        ("latent_ode", ["--rounds", "1", "--batch-size", "2"], 1),
        ("precision", ["--quick"], 1),
        ("flow_warp", ["--only", "speed", "--rounds", "1"], 1),
        ("mimic", ["--quick"], 1),
        ("yolo_drives", ["--sets", "2", "--drives", "2", "--skipped", "0"], 4),
        ("yolo", ["--rounds", "1", "--sizes", "96", "--cfg", ROOT / "predoc_lib/yolo/road.cfg"], 1),
    ],
)
def test_a_benchmark_prints_ratios_and_writes_where_they_come_from(tmp_path, name, options, tables):
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *options, "--out", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ratio" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"device", "revision", "torch"} <= found.keys()
    assert sum(isinstance(value, dict) for value in found.values()) == tables


@pytest.mark.slow
def test_sets_of_drives_and_all_as_one_have_the_figures_of_these_drives():
    drives = runpy.run_path(str(ROOT / "benchmarks" / "yolo_drives.py"))
    found = drives["measure"](drives["Settings"](sets=2, drives=3, skipped=1))
    (ode, network, _), (gru, *_) = (load(RESULTS / "yolo_dynamics" / f"road-{kind}-seed0") for kind in ("ode", "gru"))
    for name, skip in (("all", 1), ("2", 4)):
        unseen = drawn_unseen(network, 7, "test", skip=skip)
        wanted = precisions(network, {"ode": ode, "gru": gru}, unseen, 0)
        assert found[name].keys() == wanted.keys()
        for ahead, row in wanted.items():
            for method, figures in row.items():
                assert found[name][ahead][method] == pytest.approx(figures, abs=1e-6), (name, ahead, method)
