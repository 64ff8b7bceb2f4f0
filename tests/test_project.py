"""The files around the code agree with one another and keep the project's rules."""

import ast
import collections
import dataclasses
import importlib
import json
import operator
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jupytext
import pytest
import yaml

from predoc_lib.experiments.config import build

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "book").rglob("*.md"))
NOTEBOOKS = [page for page in PAGES if page.read_text().startswith("---\njupytext:")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED_KEYS = {"experiment", "metrics", "config", "seed", "revision", "versions", "device", "wall_time_s"}
REQUIRED_KEYS |= {"evaluations", "data", "date"}
RECORDER = runpy.run_path(str(ROOT / "tools" / "record.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    """Files that git tracks or would; all of them where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for line in listing.stdout.split("\0") if line and (path := ROOT / line).is_file()]


def test_version_licence_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert importlib.metadata.version(PROJECT["name"]) == PROJECT["version"], "install the package again"
    assert PROJECT["license"] == "MIT"
    assert citation["license"] == ["MIT", "CC-BY-4.0"]
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    assert "CC BY 4.0" in (ROOT / "LICENSE-text").read_text()
    assert re.search(r"MIT.*CC BY 4\.0", (ROOT / "README.md").read_text(), re.DOTALL)


def test_every_dependency_is_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in line for line in lines)
    pinned = {line.split("==")[0].lower() for line in lines}
    assert {re.split(r"[<>=]", needed)[0] for needed in PROJECT["dependencies"]} <= pinned


def test_every_page_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    assert sorted(f"{page}.md" for page in listed) == [name(page) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_with_code_cells_is_a_text_notebook_without_outputs(page):
    if page not in NOTEBOOKS:
        assert "{code-cell}" not in page.read_text(), "the page needs the jupytext header to run"
        return
    notebook = jupytext.read(page)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert "base64," not in page.read_text()


ALLOWED = {
    "latent_ode": 4.5,
    "msflow": 5,
    "yolo_detector": 1,
    "yolo_dynamics": 4,
    "features_to_frames": 3,
    "flow_warp": 2,
}  # MB of results/


def test_no_stored_notebook_and_no_large_file_is_tracked():
    files = tracked()
    assert [name(path) for path in files if path.suffix == ".ipynb"] == []
    assert [name(path) for path in files if path.stat().st_size > 3 * 2**20] == []
    sizes = collections.Counter()
    for path in files:
        if name(path).startswith("results/"):
            sizes[name(path).split("/")[1]] += path.stat().st_size / 2**20
    assert sizes.total() <= 20
    assert {experiment: size for experiment, size in sizes.items() if size > ALLOWED.get(experiment, 1)} == {}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_every_image_of_the_sources_exists_and_has_alternative_text(page):
    text = page.read_text()
    for alternative, target in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text):
        assert alternative.strip(), target
        assert (page.parent / target).is_file(), target
    assert [tag for tag in re.findall(r"<img\b[^>]*>", text) if not re.search(r'\balt="[^"]+"', tag)] == []
    for directive in re.findall(r"^[`:]{3,}\{(?:image|figure)\}.*?^[`:]{3,}", text, re.MULTILINE | re.DOTALL):
        assert re.search(r"^:alt: \S", directive, re.MULTILINE), directive


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/**/metrics.json")), ids=name)
def test_a_recorded_result_says_how_it_was_made(path):
    record = json.loads(path.read_text())
    assert set(record) >= REQUIRED_KEYS
    assert record["experiment"] == path.relative_to(ROOT).parts[1]
    assert set(record["data"]) >= {"name", "sha256"}


@pytest.mark.parametrize("experiment", RECORDER["PLANS"])
def test_a_recorded_run_has_the_parameters_that_its_plan_gives_it(experiment):
    """A default that has changed since would let ``tools/record.py`` make another run under its name."""
    module = importlib.import_module(f"predoc_lib.experiments.{experiment}")
    unsaid = dataclasses.asdict(build(module.Config, "book")) | getattr(module, "BEFORE", {})
    for run, parameters in RECORDER["PLANS"][experiment]().items():
        path = ROOT / "results" / experiment / run / "metrics.json"
        if path.exists():
            planned = dataclasses.asdict(build(module.Config, "book", **parameters))
            recorded = unsaid | json.loads(path.read_text())["config"]
            assert planned | {"device": recorded["device"]} == recorded, run


def test_every_recorded_run_has_a_plan():
    recorded = {path.parent.relative_to(ROOT / "results").parts for path in ROOT.glob("results/*/*/metrics.json")}
    planned = {(experiment, run) for experiment, plan in RECORDER["PLANS"].items() for run in plan()}
    of_benchmarks = {("flow_warp", name) for name in ("drives", "highway", "pairs")} | {("yolo_dynamics", "drives")}
    assert recorded - planned == of_benchmarks


def test_the_map_of_equations_names_functions_and_tests_that_exist():
    text = (ROOT / "book/reference/equations.md").read_text()
    rows = re.findall(r"^Computed by\s+`predoc_lib\.(\w+)\.(\S+)`,\s+checked by\s+`(\S+)::(\w+)`", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^## ", text, re.MULTILINE))
    for module, attributes, file, test in rows:
        operator.attrgetter(attributes)(importlib.import_module(f"predoc_lib.{module}"))
        defined = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")]
        assert test in defined, f"{file} has no {test}"


def test_the_figures_in_the_readme_are_those_of_the_recorded_runs():
    tool = runpy.run_path(str(ROOT / "tools" / "readme.py"))
    text = (ROOT / "README.md").read_text()
    assert tool["filled"](text) == text, "run python tools/readme.py"


def test_the_wheel_holds_the_library_and_imports_by_itself(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."],
        cwd=shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".*", "_build", "results", "runs")),
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(wheel).testzip() is None
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top.split("-")[0] for top in tops} == {"predoc_lib"}
    code = "import predoc_lib.latent_ode, predoc_lib.cnf; print(predoc_lib.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(wheel)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(wheel))


def test_outputs_are_made_again_after_a_change_in_the_library_or_in_a_result(tmp_path, monkeypatch):
    tool = runpy.run_path(str(ROOT / "tools" / "build_book.py"))
    tool["fingerprint"].__globals__["ROOT"] = tmp_path
    for name in ("requirements.txt", "predoc_lib/a.py", "results/x/y/metrics.json", "book/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = tool["fingerprint"]()
    (tmp_path / "book/page.md").write_text("2")
    assert tool["fingerprint"]() == first, "a page is known by its own code"
    for name in ("predoc_lib/a.py", "results/x/y/metrics.json", "requirements.txt"):
        (tmp_path / name).write_text("2")
        assert tool["fingerprint"]() != first
        first = tool["fingerprint"]()


def test_the_readme_leads_to_every_chapter():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    readme = (ROOT / "README.md").read_text()
    parts = [part for part in toc["parts"] if part["caption"] not in ("Training notebooks", "Reference")]
    missing = [c["file"] for part in parts for c in part["chapters"] if f"({c['file']}.md)" not in readme]
    assert not missing
