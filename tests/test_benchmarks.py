"""Benchmarks run, and say on what; what they measure is for a quiet machine and is not tested."""

import json
import subprocess
import sys

import pytest

from predoc_lib.results import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "tables"),
    [
        ("msflow", ["--quick"], 3),
        ("latent_ode", ["--rounds", "1", "--batch-size", "2"], 1),
        ("precision", ["--quick"], 1),
        ("flow_warp", ["--only", "speed", "--rounds", "1"], 1),
        ("mimic", ["--quick"], 1),
        ("yolo_drives", ["--sets", "2", "--drives", "2", "--skipped", "0"], 3),
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
