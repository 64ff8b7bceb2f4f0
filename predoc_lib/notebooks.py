"""Execution of training notebooks: through papermill, with the training's progress bar, and stopped without loss."""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


def read(path: Path) -> Any:
    """A text notebook."""
    import jupytext

    return jupytext.read(path)


def execute(notebook: Any, path: Path, parameters: dict[str, Any]) -> None:
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
        click.echo(f"\nStopped. What was saved is in {path.parent}; `predoc train --resume` goes on with it.", err=True)
        sys.exit(128 + interrupted[0])


@contextlib.contextmanager
def _interrupts(kernel: Any) -> Iterator[list[int]]:
    """Hand the first Ctrl-C or SIGTERM to the kernel, so that the run saves; a second one leaves at once.

    The kernel ends here.
    """
    import nbclient.util

    interrupted = []

    def hand_over(number: int, frame: Any) -> None:
        interrupted.append(number)
        if len(interrupted) > 1 or not kernel.has_kernel:
            raise KeyboardInterrupt
        click.echo("\nStopping: the run saves what it has (Ctrl-C again leaves at once).", err=True)
        os.kill(kernel.provisioner.pid, signal.SIGINT)  # a kernel would die of SIGTERM outside of the training loop

    before = {number: signal.signal(number, hand_over) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
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
