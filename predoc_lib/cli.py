"""The ``predoc`` command: list and run the training notebooks, fetch and verify the data."""

import ast
import contextlib
import datetime
import importlib
import json
import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

import predoc_lib
from predoc_lib import notebooks, results, runs
from predoc_lib.checkpoint import CheckpointError
from predoc_lib.data import catalog
from predoc_lib.experiments.config import PRESETS, ConfigError, build, choose

TRAINING = Path(predoc_lib.__file__).parents[1] / "book" / "training"
SET_BY_COMMAND = ("folder", "num_processes")  # notebook parameters that ``predoc train`` fills in itself


class BadInput(click.ClickException):
    """A mistake of the user's: one sentence on stderr, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """A group in which every bad input ends as one sentence, without usage lines or a traceback."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Read the options before the command's name."""
        with _one_sentence():
            return super().parse_args(context, args)

    def invoke(self, context: click.Context) -> Any:
        """Run the chosen command."""
        with _one_sentence():
            return super().invoke(context)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise BadInput(error.format_message()) from error
    except (ConfigError, catalog.DataError, runs.RunError, results.ResultError, CheckpointError) as error:
        raise BadInput(str(error)) from error


@click.group(cls=Commands)
@click.version_option(predoc_lib.__version__, message="predoc %(version)s")
def main() -> None:
    """Train the book's experiments through their notebooks, and fetch their data."""


@main.command("list")
def list_notebooks() -> None:
    """Show every training notebook with its parameters, their values in each preset, and what they mean."""
    for name in _experiments():
        notebook = notebooks.read(TRAINING / f"{name}.md")
        title = re.search(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)
        click.echo(f"{name}: {title[1]}\n" if title else f"{name}\n")
        config_class = _module(name).Config
        configs = [build(config_class, preset) for preset in PRESETS]
        rows = []
        for parameter in _parameters(notebook).values():
            field = config_class.__dataclass_fields__.get(parameter["name"])
            values = [getattr(config, parameter["name"]) for config in configs] if field else [""] * len(configs)
            meaning = field.metadata["meaning"] if field else parameter["help"]
            if field and field.metadata["choices"]:
                meaning += f" [{' | '.join(map(str, field.metadata['choices']))}]"
            rows.append([parameter["name"], parameter["inferred_type_name"], *values, meaning])
        _table(rows, ["parameter", "type", *PRESETS, "meaning"])
        click.echo(f"\nRun it: predoc train {name} -p preset=smoke\n")


@main.command()
@click.argument("name")
@click.option("-p", "--parameter", "given", multiple=True, metavar="KEY=VALUE", help="May be given many times.")
@click.option("--device", help="The same as -p device=...")
@click.option("--num-processes", type=click.IntRange(1), help="That train together.  [1, or what a resumed run had]")
@click.option("--resume", metavar="RUN", help="Go on with a stopped run: its folder, or its name under FOLDER/NAME.")
@click.option("--record", metavar="RESULT", help="Copy what the run found to results/NAME/RESULT.")
@click.option("--folder", type=click.Path(path_type=Path), default="runs", help="Where runs are kept.  [runs]")
def train(
    name: str,
    given: tuple[str, ...],
    device: str | None,
    num_processes: int | None,
    resume: str | None,
    record: str | None,
    folder: Path,
) -> None:
    """Run a training notebook with your own parameters, into FOLDER/NAME/TIME/ (see `predoc list`)."""
    choose(name, _experiments(), "experiment")
    notebook = notebooks.read(TRAINING / f"{name}.md")
    known = [parameter for parameter in _parameters(notebook) if parameter not in SET_BY_COMMAND]
    parameters = {"preset": None} | _parse(given, known)
    if device is not None:
        choose("device", known, "parameter")
        if parameters.setdefault("device", device) != device:
            raise BadInput(f"--device {device} and -p device={parameters['device']} are both given: leave one out.")
    run = None if resume is None else _known_run(name, resume, folder, parameters)
    if run is not None and runs.state(run) == "finished":
        click.echo(f"{run} is finished: there is nothing to do.")
        _record(run, record)
        return
    parameters["preset"] = parameters["preset"] or os.environ.get("PREDOC_PRESET") or "book"
    config_class = _module(name).Config
    overrides = {key: value for key, value in parameters.items() if key in config_class.__dataclass_fields__}
    config = build(config_class, parameters["preset"], **overrides)
    config.require_data()
    if "num_processes" in _parameters(notebook):
        parameters["num_processes"] = num_processes or (1 if run is None else runs.processes_of(run))
    config.require_machine(parameters.get("num_processes", 1))
    if record is not None:
        results.free_name(name, record)
    # Only now, with nothing left to refuse, does anything appear on the disk.
    run = run or _new_folder(folder / name)
    click.echo(f"{name}: {' '.join(f'{key}={value}' for key, value in parameters.items())} -> {run}", err=True)
    notebooks.execute(notebook, run / f"{name}.ipynb", parameters | {"folder": str(run)})
    metrics = json.loads((run / "metrics.json").read_text())
    click.echo(f"finished in {metrics['wall_time_s']:.0f} s; in {run}: {', '.join(sorted(os.listdir(run)))}")
    _record(run, record)


@main.command("runs")
@click.option("--folder", type=click.Path(path_type=Path), default="runs", help="Where runs are kept.  [runs]")
def list_runs(folder: Path) -> None:
    """Show every run with its state (running, finished, killed, failed), its step and its figures."""
    found = runs.listing(folder)
    if not found:
        click.echo(f"No runs in {folder}.")
        return
    rows = []
    for run in found:
        figures = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in run["row"].items()
            if key not in ("step", "seconds")
        )
        steps = f"{run['step']}/{run['steps'] or '?'}"
        rows.append([run["experiment"], run["name"], run["state"], steps, figures])
    _table(rows, ["experiment", "run", "state", "step", "figures"])
    for run in found:
        if run["state"] in ("killed", "failed"):
            click.echo(f"\nGo on: predoc train {run['experiment']} --resume {shlex.quote(str(run['folder']))}")


@main.command("results")
@click.argument("experiment", required=False)
@click.argument("names", nargs=-1)
def show_results(experiment: str | None, names: tuple[str, ...]) -> None:
    """Show the recorded results, or compare those of an experiment, all or the named ones, figure by figure."""
    recorded = {name: results.recorded(name) for name in results.experiments()}
    if experiment is None:
        rows = [
            [name, result, f"{r['wall_time_s'] / 60:.1f}", r["seed"], r["device"]]
            for name, found in recorded.items()
            for result, r in found.items()
        ]
        _table(rows, ["experiment", "result", "minutes", "seed", "device"])
        return
    found = recorded[choose(experiment, recorded, "experiment")]
    chosen = [choose(name, found, "result") for name in names] or list(found)
    click.echo(results.compare({name: found[name] for name in chosen}))


@main.command()
@click.argument("name", required=False)
def data(name: str | None) -> None:
    """Show the data sets, or fetch and verify the one that is named."""
    if name is None:
        rows = catalog.status()
        cells = [
            [row["name"], row["state"], row["size"], row["where"], f"{row['what']}: {row['licence']}"] for row in rows
        ]
        _table(cells, ["name", "state", "size", "where", "what: licence"])
        click.echo(f"\nReal data lies in {catalog.root()} (PREDOC_DATA names another folder).")
        for row in rows:
            if row["problem"]:
                click.echo(f"\n{row['problem']}")
        return
    folder = catalog.fetch(name)
    entry = catalog.DATASETS[name]
    where = "embedded, nothing to fetch" if entry.content else f"verified, {len(entry.files)} files in {folder}"
    click.echo(f"{name}: {where}; sha256 {catalog.checksum(name)}")


def _experiments() -> list[str]:
    """Names of the training notebooks; refused where the library is installed without the book."""
    names = sorted(path.stem for path in TRAINING.glob("*.md"))
    if not names:
        raise BadInput(f"No training notebooks in {TRAINING}: run predoc from a clone of the book (pip install -e .).")
    return names


def _module(name: str) -> Any:
    return importlib.import_module(f"predoc_lib.experiments.{name}")


def _parameters(notebook: Any) -> dict[str, dict[str, str]]:
    """What the cell tagged ``parameters`` declares: name -> name, inferred_type_name, default, help."""
    import papermill

    return papermill.inspect_notebook(notebook)


def _parse(given: Iterable[str], known: list[str]) -> dict[str, Any]:
    """``["steps=100"]`` -> ``{"steps": 100}``: a Python literal where the text is one, else the text itself."""
    parameters = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"-p wants key=value, got {text!r}.")
        choose(key, known, "parameter")
        literal = value.capitalize() if value.lower() in ("true", "false", "none") else value
        try:
            parameters[key] = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            parameters[key] = value
    return parameters


def _record(run: Path, record: str | None) -> None:
    if record is not None:
        click.echo(f"recorded in {results.promote(run, record)}")


def _known_run(name: str, resume: str, folder: Path, parameters: dict[str, Any]) -> Path:
    """The folder of a run that is finished or can go on; its parameters are added to those that are given."""
    run = next((path for path in (Path(resume), folder / name / resume) if (path / "run.json").exists()), None)
    if run is None:
        raise BadInput(f"No run {resume!r}, neither as a folder nor in {folder / name}; `predoc runs` lists them.")
    experiment, config = runs.config_of(run)
    if experiment != name:
        raise BadInput(f"{run} is a run of {experiment}, not of {name}.")
    if runs.state(run) == "running":
        raise BadInput(f"{run} is running: wait for it, or stop it first.")
    if parameters["preset"] is not None:
        raise BadInput(f"{run} has parameters of its own, and preset={parameters['preset']} is given: leave it out.")
    for key, value in parameters.items():
        if key not in ("preset", "device") and value != config.get(key):
            raise BadInput(f"{run} was started with {key}={config.get(key)}, and {key}={value} is given: leave it out.")
    parameters.update({key: value for key, value in config.items() if key not in parameters})
    return run


def _new_folder(parent: Path) -> Path:
    """Create ``parent/TIME``; a second run in the same second gets a number after it."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    for number in range(1, 1000):
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(f"Cannot create {folder}: {error.strerror}; choose another place with --folder.") from error
    raise BadInput(f"Too many runs of the same second in {parent}.")


def _table(rows: list[list], headers: list[str]) -> None:
    """Print a table at most 120 columns wide by wrapping its last column."""
    lines = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *first, last in lines:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(first, widths, strict=False))
        click.echo(textwrap.fill(last, 120, initial_indent=start, subsequent_indent=" " * len(start)) or start)
