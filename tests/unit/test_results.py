"""Records of runs on the disk."""

import dataclasses
import json
import math
import pathlib

import pytest
import torch

from predoc_lib import results
from predoc_lib.results import ResultError


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 7
    steps: int = 3


def record(**changes):
    options = {
        "device": torch.device("cpu"),
        "wall_time_s": 61.26,
        "evaluations": 40,
        "data": {"name": "digits", "sha256": 4 * "0123456789abcdef"},
        "history": [{"step": 3, "loss": 1.5}],
    }
    return results.record("latent_ode", Config(), {"prediction": {"ode": {"psnr": 20.0}}}, **options) | changes


def test_a_record_holds_all_that_is_needed_to_make_it_again():
    rec = record()
    assert set(rec) == set(results.KEYS)
    assert rec["config"] == {"seed": 7, "steps": 3}
    assert rec["seed"] == 7
    assert rec["wall_time_s"] == 61.3
    assert torch.__version__.startswith(rec["versions"]["torch"])
    assert "thread" in rec["device"]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    rec = record()
    results.save(tmp_path / "new" / "run", rec)
    assert results.load(tmp_path / "new" / "run") == rec
    assert [p.name for p in (tmp_path / "new" / "run").iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("key", results.KEYS)
def test_a_record_that_lacks_a_key_is_neither_saved_nor_loaded(tmp_path, key):
    rec = record()
    del rec[key]
    with pytest.raises(ResultError, match=rf"it lacks {key}\."):
        results.save(tmp_path, rec)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.json").write_text(json.dumps(rec))
    with pytest.raises(ResultError, match=rf"metrics\.json: .* it lacks {key}\."):
        results.load(tmp_path)


@pytest.mark.parametrize("content", ['{"experiment": "latent_ode", "met', "", b"\xff\xfe\x00", "[1, 2]", "null"])
def test_a_damaged_record_is_named(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ResultError, match=str(path)):
        results.load(tmp_path)


def test_an_absent_record_is_named(tmp_path):
    with pytest.raises(ResultError, match=str(tmp_path / "nowhere" / "metrics.json")):
        results.load(tmp_path / "nowhere")


def test_a_save_that_fails_half_way_leaves_the_old_record(tmp_path, monkeypatch):
    results.save(tmp_path, record())
    write = pathlib.Path.write_text

    def half(path, text, *args):
        write(path, text[:20])
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        results.save(tmp_path, record(seed=8))
    monkeypatch.undo()
    assert results.load(tmp_path)["seed"] == 7


def test_recorded_runs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name, seed in (("b", 2), ("a", 1)):
        results.save(tmp_path / "latent_ode" / name, record(seed=seed))
    results.save(tmp_path / "another" / "c", record())
    found = results.recorded("latent_ode")
    assert [(name, rec["seed"]) for name, rec in found.items()] == [("a", 1), ("b", 2)]
    assert results.recorded("unheard_of") == {}


def test_every_record_in_the_repository_is_whole():
    folders = [path.parent for path in results.RESULTS.glob("*/*/metrics.json")]
    for folder in folders:
        rec = results.load(folder)
        assert rec["experiment"] == folder.parent.name
        json.dumps(rec, allow_nan=False)


def test_the_card_shows_how_each_run_was_made():
    header, rule, row = results.card({"mine": record(revision="f" * 40)}).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert header.count("|") == rule.count("|") == row.count("|")
    assert cells[:2] == ["mine", "7"]
    assert cells[3:7] == ["1.0", "40", "digits (01234567)", "f" * 8]


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [([], 1, "–"), ([2.26], 1, "2.3"), ([1.0, 2.0, 3.0], 1, "2.0 ± 1.0"), ([0.5, 0.5], 3, "0.500 ± 0.000")],
)
def test_spread_is_mean_and_standard_deviation(values, digits, text):
    assert results.spread(values, digits) == text


def test_the_device_of_a_gpu_run_is_the_gpus_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Fast GPU {device.index}")
    assert results.device_name(torch.device("cuda", 1)) == "Fast GPU 1"


def test_wall_time_is_rounded_and_the_date_is_a_date():
    rec = record(wall_time_s=math.pi)
    assert len(rec["date"].split("-")) == 3
