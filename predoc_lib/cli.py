"""The ``predoc`` command: list and run the training notebooks, fetch and verify the data."""

import ast
import contextlib
import datetime
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

import predoc_lib
from predoc_lib.data import catalog
from predoc_lib.experiments.config import PRESETS, ConfigError, build, choose

TRAINING = Path(predoc_lib.__file__).parents[1] / "book" / "training"
SET_BY_COMMAND = ("folder",)  # notebook parameters that ``predoc train`` fills in itself


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
    except (ConfigError, catalog.DataError) as error:
        raise BadInput(str(error)) from error


@click.group(cls=Commands)
@click.version_option(predoc_lib.__version__, message="predoc %(version)s")
def main() -> None:
    """Train the book's experiments through their notebooks, and fetch their data."""


@main.command("list")
def list_notebooks() -> None:
    """Show every training notebook with its parameters, their values in each preset, and what they mean."""
    for name in _experiments():
        notebook = _notebook(name)
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
@click.option("--folder", type=click.Path(path_type=Path), default="runs", help="Where runs are kept.  [runs]")
def train(name: str, given: tuple[str, ...], folder: Path) -> None:
    """Run a training notebook with your own parameters, into FOLDER/NAME/TIME/ (see `predoc list`)."""
    choose(name, _experiments(), "experiment")
    notebook = _notebook(name)
    known = [parameter for parameter in _parameters(notebook) if parameter not in SET_BY_COMMAND]
    parameters = {"preset": None} | _parse(given, known)
    parameters["preset"] = parameters["preset"] or os.environ.get("PREDOC_PRESET") or "book"
    config_class = _module(name).Config
    overrides = {key: value for key, value in parameters.items() if key in config_class.__dataclass_fields__}
    config = build(config_class, parameters["preset"], **overrides)
    catalog.require(config.dataset)
    # Only now, with nothing left to refuse, does anything appear on the disk.
    run = _new_folder(folder / name)
    click.echo(f"{name}: {' '.join(f'{key}={value}' for key, value in parameters.items())} -> {run}", err=True)
    _execute(notebook, run / f"{name}.ipynb", parameters | {"folder": str(run)})
    metrics = json.loads((run / "metrics.json").read_text())
    click.echo(f"finished in {metrics['wall_time_s']:.0f} s; in {run}: {', '.join(sorted(os.listdir(run)))}")


@main.command()
@click.argument("name", required=False)
def data(name: str | None) -> None:
    """Show the data sets, or fetch and verify the one that is named."""
    if name is None:
        rows = catalog.status()
        columns = ["name", "state", "size", "where", "licence", "what"]
        _table([[row[column] for column in columns] for row in rows], columns)
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


def _notebook(name: str) -> Any:
    import jupytext

    return jupytext.read(TRAINING / f"{name}.md")


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


def _execute(notebook: Any, path: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook and save it; what its cells print on stderr (the training's bar) is passed on as it comes."""
    import jupyter_client
    import nbclient.exceptions
    import nbformat
    import papermill

    partial = path.with_suffix(".partial.ipynb")  # papermill saves after every cell, and not atomically
    if sys.stderr.isatty():  # the kernel's bar cannot see how wide this terminal is
        os.environ["TQDM_NCOLS"] = str(shutil.get_terminal_size().columns - 1)
    kernel = jupyter_client.AsyncKernelManager(kernel_name="python3")
    with _interrupts(kernel) as interrupted:
        try:
            executed = papermill.execute_notebook(
                notebook,
                partial,
                parameters,
                progress_bar=False,
                stderr_file=Relay(sys.stderr),
                coalesce_streams=True,  # the saved notebook shows the bar once, as it was at the end
                extra_arguments=["--log-level=ERROR"],  # without the kernel's remarks on its own transport
                km=kernel,
            )
            source = f"book/training/{path.stem}.md"  # papermill, given a notebook and not a path, keeps all of it here
            executed.metadata.papermill.update(input_path=source, output_path=path.name)
            nbformat.write(executed, partial)
            os.replace(partial, path)
        except papermill.PapermillExecutionError as error:
            if not interrupted:
                where = f"cell {error.cell_index} ({error.source.splitlines()[0]})"
                click.echo(f"Failed in {where}: {error.ename}: {error.evalue} (notebook so far: {partial})", err=True)
                click.echo("\n".join(error.traceback), err=True)
                sys.exit(1)
        except nbclient.exceptions.DeadKernelError:
            click.echo(f"The notebook's process died; out of memory? The notebook so far: {partial}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            interrupted.append(signal.SIGINT)
    if interrupted:
        click.echo(f"\nStopped. What was saved is in {path.parent}.", err=True)
        sys.exit(130)


@contextlib.contextmanager
def _interrupts(kernel: Any) -> Iterator[list[int]]:
    """Hand the first Ctrl-C to the kernel, so that the run saves; a second one leaves at once. The kernel ends here."""
    import nbclient.util

    interrupted = []

    def hand_over(number: int, frame: Any) -> None:
        if interrupted or not kernel.has_kernel:
            raise KeyboardInterrupt
        interrupted.append(number)
        click.echo("\nStopping: the run saves what it has (Ctrl-C again leaves at once).", err=True)
        os.kill(kernel.provisioner.pid, number)

    before = signal.signal(signal.SIGINT, hand_over)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
        if kernel.has_kernel:
            nbclient.util.run_sync(kernel.shutdown_kernel)(now=True)


class Relay:
    """Passes a progress bar on: to a terminal as it is, to a file or pipe as a plain line now and then."""

    def __init__(self, stream: io.TextIOBase, every: float = 30.0) -> None:
        """Args: stream: where to; every: least number of seconds between two states of one bar, off a terminal."""
        self.stream, self.every = stream, every
        self.line, self.due = "", 0.0

    def write(self, text: str) -> None:
        """Take what the kernel wrote, in pieces of any size."""
        if self.stream.isatty():
            self.stream.write(text)
            return
        for piece in re.findall(r"[^\r\n]+|[\r\n]", text):
            if piece not in "\r\n":
                self.line += piece
                continue
            if self.line.strip() and (piece == "\n" or time.monotonic() >= self.due):
                self.stream.write(re.sub(r"%\|[^|]*\|", "%", self.line).rstrip() + "\n")
                self.due = time.monotonic() + self.every
            self.line = ""

    def flush(self) -> None:
        """Show at once what was written."""
        self.stream.flush()


def _table(rows: list[list], headers: list[str]) -> None:
    """Print a table at most 120 columns wide by wrapping its last column."""
    lines = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *first, last in lines:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(first, widths, strict=False))
        click.echo(textwrap.fill(last, 120, initial_indent=start, subsequent_indent=" " * len(start)) or start)
