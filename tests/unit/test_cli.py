"""The predoc command, on a toy experiment whose notebook needs no training, and once on each kind of real input."""

import dataclasses
import io
import json
import shlex
import signal
import sys
import types
from pathlib import Path
from typing import ClassVar

import nbformat
import pytest
import torch
from click.testing import CliRunner

from predoc_lib import cli, notebooks, results, runs
from predoc_lib.data import catalog
from predoc_lib.experiments.config import PRESETS, check, option

TOY = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# A toy

```{code-cell} python3
:tags: [parameters]

preset: str = None  # smoke, book or thesis
folder: str = None  # where the run is kept
dataset: str = None  # which digits
steps: int = None  # number of steps
rate: float = None  # learning rate
ends: str = None  # how the run ends
```

```{code-cell} python3
import json, os, pathlib, signal, sys, time
for step in range(3):
    print(f"\\rtraining: {step + 1}/3, loss {1 / (step + 1):.2f}", end="", file=sys.stderr, flush=True)
print(file=sys.stderr)
```

```{code-cell} python3
if ends == "badly":
    raise ValueError("the loss is NaN")
if ends == "dead":
    os._exit(1)
if ends in ("interrupted", "terminated"):
    try:  # what Ctrl-C, or a cluster's scheduler, does to the command, whose kernel this is
        os.kill(os.getppid(), signal.SIGINT if ends == "interrupted" else signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        pathlib.Path(folder, "weights.safetensors").write_text("saved")
        raise
pathlib.Path(folder, "metrics.json").write_text(json.dumps({"wall_time_s": 1.0}))
```
"""


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    dataset: str = option("digits", "which digits", choices=("digits", "mnist"))
    steps: int = option(100, "number of steps", low=1)
    rate: float = option(1e-3, "learning rate " + "that explains itself at length " * 5, low=0)
    ends: str = option("well", "how the run ends")
    presets: ClassVar[dict] = {"smoke": {"steps": 5}, "book": {}, "thesis": {"steps": 999}}
    __post_init__ = check

    def require_data(self):
        catalog.require(self.dataset)

    def require_machine(self, num_processes):
        pass


@pytest.fixture
def predoc(tmp_path, monkeypatch):
    """Runs the command in an empty folder where the toy is the only experiment and no real data is cached."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "toy.md").write_text(TOY)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(cli, "TRAINING", tmp_path / "training")
    module = types.ModuleType("predoc_lib.experiments.toy")
    module.Config = ToyConfig
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("PREDOC_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("PREDOC_PRESET", raising=False)
    return lambda *arguments: CliRunner().invoke(cli.main, arguments)


def test_list_shows_every_parameter_its_presets_and_its_meaning_in_120_columns(predoc):
    result = predoc("list")
    assert result.exit_code == 0
    assert "toy: A toy" in result.output
    (steps,) = [line.split() for line in result.output.splitlines() if line.startswith("steps")]
    assert steps == ["steps", "int", "5", "100", "999", "number", "of", "steps"]
    assert any(
        line.startswith("preset") and line.endswith("smoke, book or thesis") for line in result.output.split("\n")
    )
    assert "[digits | mnist]" in result.output
    assert max(map(len, result.output.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "tooy"], "Unknown experiment 'tooy'. Did you mean 'toy'? Valid: toy."),
        (
            ["train", "toy", "-p", "stpes=3"],
            "'stpes'. Did you mean 'steps'? Valid: preset, dataset, steps, rate, ends.",
        ),
        (["train", "toy", "-p", "folder=x"], "Unknown parameter 'folder'"),
        (["train", "toy", "-p", "steps"], "-p wants key=value, got 'steps'"),
        (["train", "toy", "-p", "steps=two"], "'steps' must be int, got 'two' (str)"),
        (["train", "toy", "-p", "steps=1.5"], "'steps' must be int, got 1.5 (float)"),
        (["train", "toy", "-p", "steps=0"], "'steps' must be at least 1, got 0"),
        (["train", "toy", "-p", "rate=nan"], "'rate' must be float, got 'nan' (str)"),
        (
            ["train", "toy", "-p", "preset=smok"],
            "Unknown preset 'smok'. Did you mean 'smoke'? Valid: smoke, book, thesis.",
        ),
        (["train", "toy", "-p", "dataset=minst"], "'minst'. Did you mean 'mnist'? Valid: digits, mnist."),
        (["train", "toy", "-p", "dataset=mnist"], "Fetch it with `predoc data mnist`"),
        (["train", "toy", "--folder", "/dev/null"], "Cannot create /dev/null/toy/"),
        (["train"], "Missing argument 'NAME'"),
        (["train", "toy", "--fodler", "x"], "No such option '--fodler'"),
        (["trian"], "Did you mean 'train'?"),
        (["--versoin"], "Did you mean '--version'?"),
        (
            ["data", "minst"],
            "Unknown data set 'minst'. Did you mean 'mnist'? Valid: digits, mnist, photos, driving, "
            "motorcycle, rubber_whale, sprites, cifar10, cifar10_subset, "
            "udacity, bdd100k, yolo_fastest, yolo_fastest_xl, yolov3_tiny, yolov3.",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_any_file_exists(predoc, arguments, expected):
    result = predoc(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "cuda"], "device 'cuda' was asked for, but PyTorch finds no GPU here. Use 'auto' or 'cpu'."),
        (["--num-processes", "4", "-p", "batch_size=6"], "batch_size must be a multiple of processes times accumulate"),
        (["-p", "accumulate=5"], "batch_size must be a multiple of processes times accumulate, 1 x 5, got 32."),
    ],
)
def test_what_this_machine_or_so_many_processes_cannot_do_is_refused_before_any_file_exists(
    arguments, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.main, ["train", "latent_ode", *arguments])
    assert result.exit_code == 2
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_corrupt_file_is_refused_by_name_before_any_file_exists(predoc):
    for file in catalog.DATASETS["mnist"].files:
        (catalog.root() / file).parent.mkdir(parents=True, exist_ok=True)
        (catalog.root() / file).write_bytes(b"\0" * 10_008)
    result = predoc("train", "toy", "-p", "dataset=mnist")
    assert result.exit_code == 2
    assert str(catalog.root() / "MNIST/raw/train-images-idx3-ubyte") in result.stderr
    assert "10,008 bytes, expected 47,040,016" in result.stderr
    assert not list(Path().iterdir())
    listed = predoc("data")
    assert "corrupt" in listed.output
    assert "10,008 bytes, expected 47,040,016" in listed.output


def test_without_the_book_the_command_says_so(predoc, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "TRAINING", tmp_path / "nothing")
    for arguments in (["list"], ["train", "toy"]):
        result = predoc(*arguments)
        assert result.exit_code == 2
        assert "run predoc from a clone of the book" in result.stderr


def test_values_are_read_as_python_literals_or_text():
    given = ["a=1", "b=1e-4", "c=true", "d=None", "e=mnist", "f=x=y", "g=", "a=2"]
    expected = {"a": 2, "b": 1e-4, "c": True, "d": None, "e": "mnist", "f": "x=y", "g": ""}
    assert cli._parse(given, list("abcdefg")) == expected


def test_runs_of_the_same_second_do_not_collide(tmp_path):
    assert len({cli._new_folder(tmp_path / "toy") for _ in range(5)}) == 5


def test_train_leaves_the_executed_notebook_and_what_the_run_wrote(predoc):
    result = predoc("train", "toy", "-p", "preset=smoke", "-p", "steps=7", "--folder", "kept")
    assert result.exit_code == 0, result.output
    (run,) = Path("kept/toy").iterdir()
    assert sorted(path.name for path in run.iterdir()) == ["metrics.json", "toy.ipynb"]
    assert "training: 3/3, loss 0.33" in result.stderr
    assert str(run) in result.stdout
    notebook = nbformat.read(run / "toy.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.papermill.parameters == {"preset": "smoke", "steps": 7, "folder": str(run)}
    assert notebook.metadata.papermill.input_path == "book/training/toy.md"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    bars = [output.text for output in outputs if output.output_type == "stream"]
    assert bars == ["training: 3/3, loss 0.33\n"], "the saved notebook shows the bar once"


def test_a_failing_cell_is_named_in_one_line_and_the_notebook_so_far_stays(predoc):
    result = predoc("train", "toy", "-p", "ends=badly")
    assert result.exit_code == 1
    (run,) = Path("runs/toy").iterdir()
    assert [path.name for path in run.iterdir()] == ["toy.partial.ipynb"]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Failed in cell")]
    assert '(if ends == "badly":): ValueError: the loss is NaN' in line
    assert str(run / "toy.partial.ipynb") in line
    assert result.stderr.index(line) < result.stderr.index("Traceback")


def test_a_kernel_that_dies_is_reported(predoc):
    result = predoc("train", "toy", "-p", "ends=dead")
    assert result.exit_code == 1
    assert "The notebook's process died" in result.stderr


def test_sigterm_lets_the_run_save_too(predoc):
    result = predoc("train", "toy", "-p", "ends=terminated")
    assert result.exit_code == 143
    (run,) = Path("runs/toy").iterdir()
    assert (run / "weights.safetensors").read_text() == "saved"


def test_sigterm_before_there_is_a_kernel_leaves_with_its_own_code():
    kernel = types.SimpleNamespace(has_kernel=False)
    with notebooks._interrupts(kernel) as interrupted, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert interrupted == [signal.SIGTERM]


def test_ctrl_c_lets_the_run_save_and_leaves_with_a_clear_line(predoc):
    result = predoc("train", "toy", "-p", "ends=interrupted")
    assert result.exit_code == 130
    (run,) = Path("runs/toy").iterdir()
    assert (run / "weights.safetensors").read_text() == "saved"
    assert result.stderr.endswith(f"Stopped. What was saved is in {run}; `predoc train --resume` goes on with it.\n")
    assert "Traceback" not in result.stderr


def test_off_a_terminal_a_bar_becomes_a_line_now_and_then():
    stream = io.StringIO()
    relay = notebooks.Relay(stream, every=3600.0)
    for percent in range(101):
        relay.write(f"\rtraining: {percent:3}%|███   | {percent}")
        relay.write("/100 [00:10, loss=1.5]")
    relay.write("\nA warning | with | bars\n")
    first, last, warning = stream.getvalue().splitlines()
    assert first == "training:   0% 0/100 [00:10, loss=1.5]"
    assert last == "training: 100% 100/100 [00:10, loss=1.5]"
    assert warning == "A warning | with | bars"


def test_on_a_terminal_a_bar_is_passed_on_as_it_is(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    notebooks.Relay(stream).write("\r 10%|█  | 1/10")
    assert stream.getvalue() == "\r 10%|█  | 1/10"


def test_the_list_of_data_sets_fits_a_page_and_breaks_between_words(predoc):
    table = predoc("data").output.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 120
    assert "handwritten digits" in " ".join(table.split())


def test_data_lists_every_data_set_and_verifies_one_by_name(predoc):
    listed = predoc("data").output
    assert all(name in listed for name in catalog.DATASETS)
    assert str(catalog.root()) in listed
    assert "embedded, nothing to fetch" in predoc("data", "digits").output


def test_version_is_the_package_s(predoc):
    assert predoc("--version").output == f"predoc {cli.predoc_lib.__version__}\n"


def training_notebooks():
    return [path.stem for path in cli.TRAINING.glob("*.md")]


@pytest.mark.parametrize("name", training_notebooks())
def test_the_parameters_cell_of_a_notebook_agrees_with_its_config(name):
    declared = cli._parameters(notebooks.read(cli.TRAINING / f"{name}.md"))
    fields = cli._module(name).Config.__dataclass_fields__
    extra = {key for key in declared if key not in fields}
    assert extra == {"preset", "folder", "num_processes"}
    expected = {key: (field.type, field.metadata["meaning"]) for key, field in fields.items() if field.metadata}
    found = {key: (p["inferred_type_name"], p["help"]) for key, p in declared.items() if key not in extra}
    names = {key: (getattr(kind, "__name__", kind), meaning) for key, (kind, meaning) in expected.items()}
    assert found == names
    assert all(p["default"] == "None" for key, p in declared.items() if key != "num_processes")


@pytest.mark.slow
def test_a_real_training_notebook_runs_through_the_command(tmp_path):
    few = [f"-p{key}={value}" for key, value in {"steps": 3, "n_videos": 16, "batch_size": 8}.items()]
    result = CliRunner().invoke(
        cli.main, ["train", "latent_ode", "-p", "preset=smoke", *few, "--folder", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    (run,) = (tmp_path / "latent_ode").iterdir()
    assert {"latent_ode.ipynb", "metrics.json", "weights.safetensors"} <= {path.name for path in run.iterdir()}
    assert json.loads((run / "metrics.json").read_text())["config"]["steps"] == 3


def test_every_preset_of_every_notebook_builds():
    for name in training_notebooks():
        for preset in PRESETS:
            cli.build(cli._module(name).Config, preset)


# ---------------------------------------------------------------- runs that were stopped, and what is recorded


def stopped(name="first", **changes):
    """A run of the toy that was killed."""
    folder = Path("runs/toy") / name
    with runs.claim(folder, "toy", ToyConfig(**changes)):
        pass
    return folder


def test_resume_takes_every_parameter_from_the_run_and_works_in_its_folder(predoc):
    folder = stopped(steps=7, rate=0.25)
    for given in ("first", str(folder)):
        result = predoc("train", "toy", "--resume", given)
        assert result.exit_code == 0, result.output
        assert "steps=7 rate=0.25" in result.stderr
        assert (folder / "toy.ipynb").exists()
        (folder / "metrics.json").unlink()
    assert [path.name for path in Path("runs/toy").iterdir()] == ["first"]


def test_resume_may_go_on_elsewhere_and_repeat_what_the_run_has_but_not_change_it(predoc):
    stopped(steps=7)
    assert predoc("train", "toy", "--resume", "first", "-p", "steps=7").exit_code == 0
    result = predoc("train", "toy", "--resume", "first", "-p", "steps=8")
    assert result.exit_code == 2
    assert "was started with steps=7, and steps=8 is given" in result.stderr


def test_what_cannot_be_resumed_is_refused_in_one_sentence(predoc):
    folder = stopped()
    result = predoc("train", "toy", "--resume", "frist")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: No run 'frist', neither as a folder nor in runs/toy")
    with runs.claim(folder, "toy", ToyConfig()):
        result = predoc("train", "toy", "--resume", "first")
    assert result.exit_code == 2
    assert "is running: wait for it" in result.stderr
    with runs.claim(Path("runs/toy/other"), "another", ToyConfig()):
        pass
    result = predoc("train", "toy", "--resume", "other")
    assert result.exit_code == 2
    assert "is a run of another, not of toy" in result.stderr


def test_a_finished_run_has_nothing_to_resume(predoc, monkeypatch):
    stopped()
    monkeypatch.setattr(runs, "state", lambda folder: "finished")
    result = predoc("train", "toy", "--resume", "first")
    assert result.exit_code == 0
    assert "is finished: there is nothing to do" in result.output
    assert not (Path("runs/toy/first") / "toy.ipynb").exists()
    result = predoc("train", "toy", "--resume", "first", "-p", "steps=8")
    assert result.exit_code == 2
    assert "and steps=8 is given" in result.stderr


def test_a_finished_run_can_still_be_recorded(predoc, monkeypatch):
    folder = stopped()
    monkeypatch.setattr(runs, "state", lambda folder: "finished")
    monkeypatch.setattr(results, "promote", lambda run, name: f"{run} as {name}")
    assert f"recorded in {folder} as best" in predoc("train", "toy", "--resume", "first", "--record", "best").output


def test_a_preset_is_not_silently_dropped_on_resume(predoc, monkeypatch):
    folder = stopped()
    result = predoc("train", "toy", "--resume", "first", "-p", "preset=thesis")
    assert result.exit_code == 2
    assert "has parameters of its own, and preset=thesis is given" in result.stderr
    assert not (folder / "toy.ipynb").exists()


def test_the_name_of_a_result_is_checked_before_training(predoc, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "toy" / "taken").mkdir(parents=True)
    for name, message in (("taken", "There is a result 'taken' of toy already"), ("../x", "may have letters, digits")):
        result = predoc("train", "toy", "--record", name)
        assert result.exit_code == 2
        assert message in result.stderr
    assert not Path("runs").exists()


def test_a_run_is_recorded_when_it_has_ended(predoc, monkeypatch):
    seen = []
    monkeypatch.setattr(
        results, "promote", lambda run, name: seen.append((run.parent.name, name)) or "results/toy/best"
    )
    result = predoc("train", "toy", "--record", "best")
    assert result.exit_code == 0
    assert seen == [("toy", "best")]
    assert "recorded in results/toy/best" in result.output
    predoc("train", "toy", "--record", "worst", "-p", "ends=badly")
    assert len(seen) == 1


@dataclasses.dataclass(frozen=True)
class DeviceConfig(ToyConfig):
    device: str = option("auto", "where", choices=("auto", "cpu", "cuda"))


@pytest.fixture
def on_devices(predoc, monkeypatch):
    """The command; the toy has a device, and counts processes."""
    monkeypatch.setattr(sys.modules["predoc_lib.experiments.toy"], "Config", DeviceConfig)
    more = "device: str = None  # where\nnum_processes: int = 1  # that train\nends: str"
    (cli.TRAINING / "toy.md").write_text(TOY.replace("ends: str", more))
    return predoc


def test_device_and_processes_reach_the_notebook(on_devices):
    for arguments in (("--device", "cpu"), ("--device", "cpu", "-p", "device=cpu")):
        result = on_devices("train", "toy", "--num-processes", "2", *arguments)
        assert result.exit_code == 0, result.output
    for run in Path("runs/toy").iterdir():
        given = nbformat.read(run / "toy.ipynb", as_version=4).metadata.papermill.parameters
        assert (given["device"], given["num_processes"]) == ("cpu", 2)


def test_two_different_devices_are_refused(on_devices):
    result = on_devices("train", "toy", "--device", "cuda", "-p", "device=cpu")
    assert result.exit_code == 2
    assert "--device cuda and -p device=cpu are both given" in result.stderr
    result = on_devices("train", "toy", "--device", "gpu")
    assert result.exit_code == 2
    assert "'gpu'" in result.stderr
    assert not Path("runs").exists()


def test_a_run_may_go_on_on_another_device(on_devices):
    with runs.claim(Path("runs/toy/first"), "toy", DeviceConfig(device="cuda")):
        pass
    result = on_devices("train", "toy", "--resume", "first", "--device", "cpu")
    assert result.exit_code == 0, result.output
    notebook = nbformat.read("runs/toy/first/toy.ipynb", as_version=4)
    assert notebook.metadata.papermill.parameters["device"] == "cpu"


def test_a_run_goes_on_with_as_many_processes_as_it_had_or_with_those_that_are_given(on_devices):
    folder = Path("runs/toy/first")
    with runs.claim(folder, "toy", DeviceConfig(), 3):
        pass
    for arguments, wanted in (((), 3), (("--num-processes", "1"), 1), (("--num-processes", "2"), 2)):
        result = on_devices("train", "toy", "--resume", "first", *arguments)
        assert result.exit_code == 0, result.output
        assert f"num_processes={wanted}" in result.stderr
        notebook = nbformat.read(folder / "toy.ipynb", as_version=4)
        assert notebook.metadata.papermill.parameters["num_processes"] == wanted
        (folder / "metrics.json").unlink()
    on_devices("train", "toy", "-p", "steps=7")
    (new,) = {*Path("runs/toy").iterdir()} - {folder}
    assert nbformat.read(new / "toy.ipynb", as_version=4).metadata.papermill.parameters["num_processes"] == 1


def test_device_is_a_parameter_and_processes_are_counted_from_one(predoc):
    result = predoc("train", "toy", "--device", "cpu")
    assert result.exit_code == 2
    assert "Unknown parameter 'device'" in result.stderr  # the toy has none
    assert predoc("train", "toy", "--num-processes", "0").exit_code == 2
    assert not Path("runs").exists()


def test_runs_are_listed_with_state_and_the_command_that_goes_on(predoc):
    assert "No runs in runs." in predoc("runs").output
    stopped("a")
    with pytest.raises(RuntimeError), runs.claim(Path("runs/toy/b"), "toy", ToyConfig()):
        raise RuntimeError("it broke")
    with runs.claim(Path("runs/toy/c"), "toy", ToyConfig()):
        output = predoc("runs").output
    states = {line.split()[1]: line.split()[2] for line in output.splitlines() if line.startswith("toy")}
    assert states == {"a": "killed", "b": "failed", "c": "running"}
    assert "predoc train toy --resume runs/toy/a" in output
    assert "--resume runs/toy/c" not in output


def test_the_command_that_goes_on_can_be_pasted_whatever_the_folder_is_called(predoc):
    with runs.claim(Path("my runs/toy/a"), "toy", ToyConfig(steps=7)):
        pass
    (line,) = [x for x in predoc("runs", "--folder", "my runs").output.splitlines() if x.startswith("Go on: ")]
    result = predoc(*shlex.split(line.removeprefix("Go on: predoc ")))
    assert result.exit_code == 0, result.output
    assert Path("my runs/toy/a/toy.ipynb").exists()


def test_results_are_listed_and_compared(predoc):
    output = predoc("results").output
    assert "digits32-1-stride1-ode-seed0" in output
    result = predoc("results", "latent_ode", "digits32-1-stride1-ode-seed0", "digits32-1-stride1-gru-seed0")
    row = next(line for line in result.output.splitlines() if line.startswith("| prediction.mean image.psnr "))
    assert row.count("|") == 4
    assert "Did you mean 'latent_ode'" in predoc("results", "latent_od").stderr
    assert "Unknown result 'digits'" in predoc("results", "latent_ode", "digits").stderr
