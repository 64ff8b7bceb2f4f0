"""Records of runs on the disk."""

import dataclasses
import importlib.metadata
import json
import math
import pathlib

import pytest
import safetensors.torch
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


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*/*/metrics.json")), ids=lambda path: path.parent.name)
def test_every_record_in_the_repository_is_whole(path):
    rec = results.load(path.parent)
    assert rec["experiment"] == path.parent.parent.name
    json.dumps(rec, allow_nan=False)


def test_the_card_shows_how_the_page_and_each_run_were_made():
    page, _, header, rule, row = results.card({"mine": record(revision="f" * 40)}).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert header.count("|") == rule.count("|") == row.count("|")
    assert cells[:4] == ["mine", "7", "1.0", "40"]
    assert cells[5:7] == ["digits (01234567)", "f" * 8]
    for made in (page, results.card({})):
        assert f"torch {importlib.metadata.version('torch')}" in made
        assert results.device_name(torch.device("cpu")) in made
    assert results.card({}).endswith("It shows no recorded run.")


def test_what_all_runs_of_a_card_have_is_said_once():
    page, _, header, _, *rows = results.card({"a": record(), "b": record(wall_time_s=120.0)}).splitlines()
    assert header == "| run | minutes |"
    assert rows == ["| a | 1.0 |", "| b | 2.0 |"]
    assert "All have seed 7, evaluations 40, device" in page


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        ([], 1, "–"),
        ([2.26], 1, "2.3"),
        ([1.0, 2.0, 3.0], 1, "2.0 ± 1.0"),
        ([0.5, 0.5], 3, "0.500 ± 0.000"),
        ([-0.01], 1, "0.0"),
    ],
)
def test_spread_is_mean_and_standard_deviation(values, digits, text):
    assert results.spread(values, digits) == text


def test_the_device_of_a_gpu_run_is_the_gpus_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Fast GPU {device.index}")
    assert results.device_name(torch.device("cuda", 1)) == "Fast GPU 1"


def test_wall_time_is_rounded_and_the_date_is_a_date():
    rec = record(wall_time_s=math.pi)
    assert len(rec["date"].split("-")) == 3


SHA = "0" * 64
ROW = {"step": 3, "loss": 1.5}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experiment", ""),
        ("experiment", "../elsewhere"),
        ("metrics", []),
        ("metrics", {"ode": {"psnr": math.nan}}),
        ("metrics", {"ode": {"psnr": -math.inf}}),
        ("metrics", {"ode": {"psnr": "20"}}),
        ("metrics", {"ode": [1.0]}),
        ("metrics", {"won": True}),
        ("metrics", {"count": 10**400}),
        ("config", None),
        ("seed", 1.0),
        ("seed", True),
        ("revision", ""),
        ("versions", {"torch": 2}),
        ("versions", ["torch"]),
        ("device", None),
        ("wall_time_s", -1.0),
        ("wall_time_s", math.inf),
        ("wall_time_s", "1"),
        ("evaluations", 1.5),
        ("evaluations", -1),
        ("data", {"name": "digits"}),
        ("data", {"name": "digits", "sha256": SHA[1:]}),
        ("data", {"name": "", "sha256": SHA}),
        ("date", "23.11.2026"),
        ("history", {}),
        ("history", [[3, 1.5]]),
        ("history", [{"loss": 1.5}]),
        ("history", [ROW | {"loss": math.nan}]),
        ("history", [ROW, ROW]),
        ("history", [{"step": {}}, {"step": {}}]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_and_neither_saved_nor_loaded(tmp_path, key, value):
    rec = record(**{key: value})
    sentence = rf"^[^\n]*: '{key}' must be [^\n]*, got [^\n]*\.$"
    with pytest.raises(ResultError, match=sentence):
        results.save(tmp_path, rec)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.json").write_text(json.dumps(rec))
    with pytest.raises(ResultError, match=sentence):
        results.load(tmp_path)


# ---------------------------------------------------------------- from runs into results


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run, and nothing recorded yet."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    results.save(tmp_path / "run", record())
    tensors = {"a": torch.tensor([0.1, -2.0]), "n": torch.tensor([70_000])}
    safetensors.torch.save_file(tensors, tmp_path / "run" / "weights.safetensors")
    return tmp_path / "run"


def everything_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_promoted_with_its_floating_weights_halved(run):
    target = results.promote(run, "my-best_1.0")
    assert target == results.RESULTS / "latent_ode" / "my-best_1.0"
    assert results.load(target) == results.load(run)
    found = safetensors.torch.load_file(target / "weights.safetensors")
    assert found["a"].dtype == torch.float16
    torch.testing.assert_close(found["a"].float(), torch.tensor([0.1, -2.0]), atol=1e-4, rtol=0)
    assert found["n"].item() == 70_000
    assert [path.name for path in target.parent.iterdir()] == ["my-best_1.0"]


def test_weights_that_half_precision_cannot_hold_keep_theirs(run):
    tensors = {"small": torch.tensor([1.0]), "large": torch.tensor([1e5])}
    safetensors.torch.save_file(tensors, run / "weights.safetensors")
    found = safetensors.torch.load_file(results.promote(run, "best") / "weights.safetensors")
    assert {key: value.dtype for key, value in found.items()} == {"small": torch.float16, "large": torch.float32}
    assert found["large"].item() == 1e5


def test_other_files_are_promoted_as_they_are(run):
    (run / "net.weights").write_bytes(b"123")
    target = results.promote(run, "other", weights=False, files=("net.weights",))
    assert (target / "net.weights").read_bytes() == b"123"
    (run / "net.weights").write_bytes(bytes(3_000_001))
    with pytest.raises(results.ResultError, match=r"net\.weights is larger than the 3 MB"):
        results.promote(run, "large", weights=False, files=("net.weights",))


def test_weights_may_be_promoted_in_full_or_left_out(run):
    whole = results.promote(run, "full", half=False)
    assert (whole / "weights.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()
    assert [path.name for path in results.promote(run, "bare", weights=False).iterdir()] == ["metrics.json"]


def test_large_weights_are_refused_with_their_size_and_may_be_left_out(run):
    safetensors.torch.save_file({"a": torch.zeros(1_600_000)}, run / "weights.safetensors")
    with pytest.raises(ResultError, match=r"would have 3\.2 MB, and what is recorded may have 3: .*weights=False"):
        results.promote(run, "large")
    assert not results.RESULTS.exists()
    assert results.load(results.promote(run, "large", weights=False)) == results.load(run)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-p", "a/b", "../x", "a b", "é", "a\n"])
def test_a_name_that_a_folder_should_not_have_is_refused(run, name):
    with pytest.raises(ResultError, match="A result's name may have letters, digits"):
        results.promote(run, name)
    assert not results.RESULTS.exists()


def test_what_is_recorded_is_never_replaced_but_may_be_recorded_again(run):
    target = results.promote(run, "best")
    before = everything_in(results.RESULTS)
    assert results.promote(run, "best") == target
    results.save(run, record(seed=8))
    with pytest.raises(ResultError, match="There is a result 'best' of latent_ode already"):
        results.promote(run, "best")
    assert everything_in(results.RESULTS) == before


def test_a_run_that_is_not_finished_or_lacks_its_weights_is_refused(run):
    (run / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ResultError, match=r"weights\.safetensors cannot be read"):
        results.promote(run, "best")
    (run / "weights.safetensors").unlink()
    with pytest.raises(ResultError, match=r"weights\.safetensors cannot be read"):
        results.promote(run, "best")
    (run / "metrics.json").unlink()
    with pytest.raises(ResultError, match=r"metrics\.json cannot be read as a recorded run"):
        results.promote(run, "best")
    assert not results.RESULTS.exists()


def test_a_promotion_that_fails_half_way_leaves_nothing(run, monkeypatch):
    def half(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(ResultError, match=r"Nothing can be recorded in .*best: No space left"):
        results.promote(run, "best")
    assert everything_in(results.RESULTS) == {}


def test_what_a_killed_promotion_left_is_no_result(run):
    target = results.promote(run, "best")
    target.rename(target.with_name(".best.123"))
    assert results.experiments() == []
    assert results.recorded("latent_ode") == {}


def test_experiments_are_those_that_have_results(run):
    assert results.experiments() == []
    for name in ("b", "a"):
        results.promote(run, name)
    assert results.experiments() == ["latent_ode"]


def test_figures_are_named_by_their_path():
    metrics = {"prediction": {"ode": {"psnr": 20.0, "mse": 0.01}}, "count": 3}
    assert results.figures(record(metrics=metrics)) == {
        "prediction.ode.psnr": 20.0,
        "prediction.ode.mse": 0.01,
        "count": 3,
    }


def test_records_are_compared_figure_by_figure_and_what_one_lacks_is_a_dash():
    one, other = record(metrics={"psnr": 20.0, "ode": {"mse": 0.5}}), record(metrics={"psnr": 21.25})
    assert results.compare({"one": one, "other": other}).splitlines() == [
        "| figure | one | other |",
        "| --- | --- | --- |",
        "| psnr | 20 | 21.25 |",
        "| ode.mse | 0.5 | – |",
    ]
