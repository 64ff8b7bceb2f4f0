"""What the chapter on running says can be done: its example, its Slurm file and every command that it names."""

import ast
import importlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import click
import pytest

from predoc_lib import cli, notebooks
from predoc_lib.experiments.config import build

ROOT = Path(__file__).parents[1]
EXAMPLE, SBATCH = ROOT / "examples" / "own_experiment.py", ROOT / "examples" / "slurm.sbatch"
CHAPTER = ROOT / "book" / "reference" / "running.md"
PAGES = (CHAPTER, ROOT / "README.md")


def code_lines(source: str) -> int:
    """Lines that are not blank, comments or docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    other = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in other:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_lines_of_code_are_counted_without_blanks_comments_and_docstrings():
    assert code_lines('"""One.\n\nTwo."""\n\n# three\nx = [  # four\n    1,\n]\n\n\ndef f():\n    """Five."""\n') == 4


def test_the_example_has_at_most_40_lines_of_code():
    assert code_lines(EXAMPLE.read_text()) <= 40


def test_the_example_runs_at_smoke_and_is_better_than_its_rival(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--preset", "smoke", "--device", "cpu", "--folder", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "s of training; in " in capsys.readouterr().out
    network, formula = json.loads((tmp_path / "metrics.json").read_text())["metrics"].values()
    assert network < formula


def commands(text: str) -> list[tuple[list[str], bool]]:
    """(words, stands in a block) of everything in a page that is typed into a terminal."""
    found = []
    for kind, block in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if kind in ("", "bash"):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [(shlex.split(line.removeprefix("!"), comments=True), True) for line in lines]
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [(shlex.split(code), False) for code in re.findall(r"`([^`]+)`", outside) if code.startswith("predoc ")]
    return [(words, block) for words, block in found if words]


def parse(words: list[str]) -> None:
    """Read the words after ``predoc`` as the command does, and check what it would check first; run nothing."""
    name, command, rest = cli.main.resolve_command(click.Context(cli.main), words)
    options = command.make_context(name, rest).params
    if name == "train":
        assert options["name"] in cli._experiments()
        known = set(cli._parameters(notebooks.read(cli.TRAINING / f"{options['name']}.md"))) - set(cli.SET_BY_COMMAND)
        given = cli._parse(options["given"], sorted(known))
        build(cli._module(options["name"]).Config, given.pop("preset", "book"), **given)


PREDOC = sorted(
    {(tuple(w[1:]), block) for page in PAGES for w, block in commands(page.read_text()) if w[0] == "predoc"}
)


def test_commands_are_found():
    assert len(PREDOC) > 10


@pytest.mark.parametrize(("words", "block"), PREDOC, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_a_predoc_command_that_a_page_names_is_valid(words, block):
    if len(words) == 1 and not block:  # in running text, `predoc train` is the command's name
        assert words[0] in cli.main.commands
    else:
        parse(list(words))


@pytest.mark.parametrize(
    "wrong", ["traim x", "train latent_ode --resum x", "train latent_ode -p stepz=1", "train nothing"]
)
def test_a_wrong_command_would_be_seen(wrong):
    with pytest.raises((click.ClickException, ValueError, AssertionError)):
        parse(wrong.split())


def module_calls() -> list[list[str]]:
    """[module, options...] of every experiment that a page or the Slurm file starts as a module."""
    lines = [words for page in PAGES for words, _ in commands(page.read_text())]
    lines += [shlex.split(line, comments=True) for line in re.sub(r"\\\n", "", SBATCH.read_text()).splitlines()]
    starts = [
        (words, i) for words in lines for i, word in enumerate(words) if word.startswith("predoc_lib.experiments.")
    ]
    return [words[i:] for words, i in starts]


def test_every_option_of_an_experiment_started_as_a_module_exists():
    calls = module_calls()
    assert len(calls) > 5
    for module, *options in calls:
        fields = importlib.import_module(module).Config.__dataclass_fields__
        names = {word for word in options if word.startswith("--")}
        assert names <= {"--preset", "--folder", *(f"--{field.replace('_', '-')}" for field in fields)}


def test_messages_that_the_chapter_cannot_provoke_are_the_code_s():
    rows = CHAPTER.read_text().partition("| message | cause | remedy |")[2].partition("\n\n")[0].splitlines()[2:]
    source = "".join(path.read_text() for path in (ROOT / "predoc_lib").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message may stand on two lines
    for row in rows:
        message = row.split("|")[1].strip()
        message = message.replace("runs/latent_ode/thesis: No space left on device.", "0")
        pattern = r"\{[^}]*\}".join(map(re.escape, re.split(r"\d+", message)))
        assert re.search(pattern, source), message
    assert len(rows) > 3


def test_the_slurm_file_parses():
    subprocess.run(["bash", "-n", SBATCH], check=True)


SRUN = """#!{python}
import os, pathlib, subprocess, sys
swap = {{"thesis": "smoke", "cuda": "cpu"}}
command = [swap.get(word, word) for word in sys.argv[1:]]
nodes = [subprocess.Popen(command) for _ in range(2)]
pathlib.Path(os.environ["CLUSTER"], "tasks").write_text(" ".join(str(node.pid) for node in nodes))
sys.exit(max(node.wait() != 0 for node in nodes))
"""
OTHERS = {
    "scontrol": '#!/bin/bash\necho "$*" >> "$CLUSTER/scontrol.log"\n[ "$1" = requeue ] || echo localhost\n',
    "scancel": '#!/bin/bash\nkill -s TERM $(cat "$CLUSTER/tasks")\n',
}


@pytest.mark.slow
def test_a_slurm_job_whose_time_runs_out_is_saved_queued_again_and_finished(tmp_path):
    """The file itself, on two nodes of one process each, with stand-ins for Slurm's commands and the smoke preset."""
    tools, home = tmp_path / "bin", tmp_path / "home"
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "activate").write_text(f"PATH={tools}:{Path(sys.executable).parent}:$PATH\n")
    tools.mkdir()
    for name, text in (OTHERS | {"srun": SRUN.format(python=sys.executable)}).items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = {
        "CLUSTER": str(tmp_path), "OMP_NUM_THREADS": "1", "SLURM_SUBMIT_DIR": str(home), "SLURM_JOB_NODELIST": "any",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip
    run = home / "runs" / "latent_ode" / "thesis"

    def start(**more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", SBATCH], env=os.environ | job | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = start()
    until = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "Stopped by SIGTERM" in said, said
    assert f"requeue {job['SLURM_JOB_ID']}" in (tmp_path / "scontrol.log").read_text()
    assert not (run / "metrics.json").exists()

    second = start(SLURM_RESTART_COUNT="1")
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert (run / "metrics.json").exists()
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 1
