"""Parameters of experiments: every wrong one is refused with a sentence that names it."""

import dataclasses
import importlib
import pkgutil
import sys
from typing import ClassVar

import pytest
import torch

from predoc_lib import experiments
from predoc_lib.experiments.config import PRESETS, ConfigError, build, check, choose, choose_device, option
from predoc_lib.experiments.latent_ode import Config
from predoc_lib.experiments.running import main

pytestmark = pytest.mark.usefixtures("as_shipped")  # a Config checks its own fields, in its own words

NAMES = [f"predoc_lib.experiments.{module.name}" for module in pkgutil.iter_modules(experiments.__path__)]
MODULES = [importlib.import_module(name) for name in NAMES]
CONFIGS = [module.Config for module in MODULES if hasattr(module, "Config")]  # the others help these
every_config = pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__module__.rpartition(".")[2])


@every_config
def test_every_field_says_what_it_means(config_class):
    for f in dataclasses.fields(config_class):
        assert len(f.metadata["meaning"]) > 5, f.name
        assert f.metadata["choices"] is None or f.default in f.metadata["choices"], f.name
        numeric = isinstance(f.default, int | float) and not isinstance(f.default, bool)
        assert not numeric or f.metadata["low"] is not None or f.metadata["choices"], f"{f.name} has no range"


@every_config
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_is_what_it_says(config_class, preset):
    config = build(config_class, preset)
    assert {k: getattr(config, k) for k in config_class.presets[preset]} == config_class.presets[preset]


@every_config
def test_there_are_no_other_presets(config_class):
    assert tuple(config_class.presets) == PRESETS


def test_the_thesis_preset_has_the_reports_sizes():
    c = build(Config, "thesis")
    assert (c.n_videos, c.batch_size, c.canvas, c.dataset) == (10_000, 128, 64, "mnist")
    assert c.steps * c.batch_size == pytest.approx(2000 * c.n_videos, rel=0.02)  # epochs


def test_a_preset_is_changed_by_what_is_given_and_by_nothing_else():
    given = build(Config, "smoke", steps=7, seed=None)
    assert given == dataclasses.replace(build(Config, "smoke"), steps=7)


def test_a_config_can_be_made_again_from_its_record():
    config = build(Config, "thesis", kl_weight=0.5)
    assert Config(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("boook", {}, r"Unknown preset 'boook'\. Did you mean 'book'\? Valid: smoke, book, thesis\."),
        ("book", {"n_digit": 2}, r"Unknown parameter 'n_digit'\. Did you mean 'n_digits'\? Valid: .*seed"),
        ("book", {"presets": {}}, r"Unknown parameter 'presets'"),
        ("book", {"zzz": 1}, r"Unknown parameter 'zzz'\. Valid: steps"),
        ("book", {"dataset": "minst"}, r"'dataset'.* 'minst'\. Did you mean 'mnist'\?"),
        ("book", {"n_digits": 3}, r"'n_digits'.* 3\. Valid: 1, 2\."),
        ("book", {"canvas": 48}, r"'canvas'.* 48\b.*Valid: 32, 64\."),
        ("book", {"steps": 0}, r"'steps' must be .*at least 1, got 0"),
        ("book", {"steps": "many"}, r"'steps' must be int, got 'many' \(str\)"),
        ("book", {"steps": 10.0}, r"'steps' must be int, got 10\.0 \(float\)"),
        ("book", {"steps": True}, r"'steps' must be int, got True \(bool\)"),
        ("book", {"adjoint": 1}, r"'adjoint' must be bool, got 1 \(int\)"),
        ("book", {"adjoint": "true"}, r"'adjoint' must be bool, got 'true' \(str\)"),
        ("book", {"learning_rate": "fast"}, r"'learning_rate' must be float, got 'fast'"),
        ("book", {"learning_rate": True}, r"'learning_rate' must be float, got True \(bool\)"),
        ("book", {"learning_rate": -1e-3}, r"'learning_rate' must be .*at least .*, got -0\.001"),
        ("book", {"learning_rate": float("nan")}, r"'learning_rate' must be .*, got nan"),
        ("book", {"learning_rate": float("inf")}, r"'learning_rate' must be .*, got inf"),
        ("book", {"kl_weight": float("nan")}, r"'kl_weight' must be .*, got nan"),
        ("book", {"seed": -1}, r"'seed' must be .*at least 0, got -1"),
        ("book", {"state": 25}, r"'?state'? must be .*even.*got 25"),
        ("book", {"layout": None, "field": "rotating"}, r"'rotating'\. Did you mean 'rotation'\?"),
    ],
)
def test_a_wrong_parameter_is_refused(preset, given, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(Config, preset, **given)
    assert "\n" not in str(error.value)


def test_a_config_made_directly_is_checked_too():
    with pytest.raises(ConfigError, match="'steps'"):
        Config(steps=0)
    with pytest.raises(ConfigError, match="'steps'"):
        dataclasses.replace(Config(), steps=0)


def test_a_whole_number_serves_as_a_float():
    config = build(Config, kl_weight=2)
    assert config.kl_weight == 2.0
    assert isinstance(config.kl_weight, float)


def test_choose_returns_what_is_valid():
    assert choose("b", ["a", "b"], "letter") == "b"
    with pytest.raises(ConfigError, match=r"Unknown letter 'c'\. Valid: a, b\."):
        choose("c", ["a", "b"], "letter")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"'cuda'.*no GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1), "of processes that share a run, each has its own"
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("gpus", "processes", "fields", "message"),
    [
        (0, 1, {"device": "cuda"}, "'cuda'.*no GPU"),
        (2, 3, {"batch_size": 6}, "num_processes must be at most the number of GPUs here, 2, got 3"),
        (0, 3, {}, "batch_size must be a multiple of processes times accumulate, 3 x 1, got 32"),
        (2, 2, {"accumulate": 3}, "batch_size must be a multiple of processes times accumulate, 2 x 3, got 32"),
        (0, 2, {}, None),
        (2, 2, {"device": "cuda"}, None),
        (2, 4, {"device": "cpu"}, None),
    ],
)
def test_what_this_machine_cannot_do_is_refused(gpus, processes, fields, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = build(Config, **fields)
    if message is None:
        config.require_machine(processes)
        return
    with pytest.raises(ConfigError, match=message):
        config.require_machine(processes)


@pytest.mark.parametrize(
    ("processor", "gpus", "fields", "warned"),
    [
        ({"architecture": "x86_64"}, 0, {"precision": "bfloat16"}, True),
        ({"architecture": "x86_64", "avx512_f": True}, 0, {"precision": "bfloat16"}, True),
        ({"architecture": "x86_64"}, 1, {"precision": "bfloat16", "device": "cpu"}, True),
        ({"architecture": "x86_64"}, 1, {"precision": "bfloat16"}, False),
        ({"architecture": "x86_64"}, 0, {}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, 0, {"precision": "bfloat16"}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, 0, {"precision": "bfloat16"}, False),
        ({"architecture": "arm64"}, 0, {"precision": "bfloat16"}, False),
        ({}, 0, {"precision": "bfloat16"}, False),
    ],
)
def test_a_run_says_if_its_precision_is_emulated(processor, gpus, fields, warned, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    build(Config, **fields).require_machine()
    assert ["no instructions for bfloat16" in str(warning.message) for warning in recwarn] == [True] * warned


# ---------------------------------------------------------------- the command line of an experiment


@dataclasses.dataclass(frozen=True)
class Small:
    steps: int = option(3, "steps", low=1)
    rate: float = option(0.5, "rate", low=0)
    name: str = option("a", "name", choices=("a", "b"))
    fast_mode: bool = option(False, "whether it is fast")

    presets: ClassVar[dict] = {"smoke": {"steps": 1}, "book": {}, "thesis": {"steps": 9}}

    def __post_init__(self):
        check(self)


def command_line(monkeypatch, *arguments):
    """What ``run`` is called with."""
    called = []

    def run(config, folder=None, num_processes=1):
        """Run it."""
        called.append((config, folder))
        return {"wall_time_s": 1.0}

    monkeypatch.setattr(sys, "argv", ["small", *arguments])
    main(Small, run)
    return called[0]


def test_the_command_line_builds_the_config(monkeypatch, tmp_path, capsys):
    assert command_line(monkeypatch) == (Small(), None)
    arguments = ["--preset", "thesis", "--rate", "1e-3", "--name=b", "--fast-mode", "true", "--folder", str(tmp_path)]
    assert command_line(monkeypatch, *arguments) == (Small(9, 1e-3, "b", True), tmp_path)
    assert command_line(monkeypatch, "--fast-mode", "False")[0] == Small()
    assert "1.0 s of training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "boook"], "Did you mean 'book'?"),
        (["--steps", "0"], "at least 1, got 0"),
        (["--steps", "many"], "--steps"),
        (["--name", "c"], "Valid: a, b."),
        (["--fast-mode", "yes"], "--fast-mode"),
        (["--stepp", "3"], "--stepp"),
    ],
)
def test_a_wrong_argument_ends_the_command_with_a_sentence(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command_line(monkeypatch, *arguments)
    said = f"{stop.value.code}{capsys.readouterr().err}"
    assert stop.value.code not in (0, None)
    assert message in said
    assert "Traceback" not in said
