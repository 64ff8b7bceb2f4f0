"""Execute every chapter that changed, several at once, then build the book into _build/html.

The execution cache knows a chapter by its own code alone, so a change in the library, in a recorded result or in the
pinned packages empties it. Training notebooks run at the preset "smoke".
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jupyter_cache
import yaml
from jupyter_cache.executors import load_executor

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
CACHE = BUILD / ".jupyter_cache"
ENVIRONMENT = {"PREDOC_PRESET": "smoke", "OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def fingerprint() -> str:
    """A hash of everything that a chapter's outputs depend on besides its own source."""
    folders = ("predoc_lib/**/*.py", "results/**/*", "examples/*", "benchmarks/*")
    files = [*(path for folder in folders for path in ROOT.glob(folder)), ROOT / "requirements.txt"]
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def notebooks() -> list[Path]:
    """The chapters that hold code, in the order of the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    paths = [ROOT / f"{page}.md" for page in pages]
    return [path for path in paths if path.read_text().startswith("---\njupytext:")]


def execute() -> None:
    """Fill the cache with the outputs of every notebook that is not in it; name the ones that fail, and stop."""
    mark = BUILD / "fingerprint"
    key = fingerprint()
    if not mark.exists() or mark.read_text() != key:
        # Pages that Sphinx has read hold the old outputs too.
        for stale in (CACHE, BUILD / ".doctrees", BUILD / "jupyter_execute"):
            shutil.rmtree(stale, ignore_errors=True)
        BUILD.mkdir(exist_ok=True)
        mark.write_text(key)
    cache = jupyter_cache.get_cache(CACHE)
    for path in notebooks():
        cache.add_nb_to_project(str(path), read_data={"name": "myst_nb_md", "type": "plugin"})
    waiting = [Path(record.uri).relative_to(ROOT) for record in cache.list_unexecuted()]
    print("Executing:", *waiting or ["nothing, every output is up to date"], flush=True)
    run = load_executor("local-parallel", cache).run_and_cache(timeout=300)
    for uri in run.excepted + run.errored:
        print(f"\n{Path(uri).relative_to(ROOT)} failed:\n{cache.get_project_record(uri).traceback}", file=sys.stderr)
    if run.excepted or run.errored:
        sys.exit(1)


def main() -> None:
    """Build the book; the exit status is not 0 if a chapter fails or a page gives a warning."""
    os.environ.update(ENVIRONMENT)
    execute()
    command = [Path(sys.executable).with_name("jupyter-book"), "build", "-W", "-n", "--keep-going", ROOT]
    status = subprocess.run(command).returncode
    if status:
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)  # or the next build would not repeat the warnings
        sys.exit(status)
    print(f"\nThe book is at {(BUILD / 'html' / 'index.html').as_uri()}")


if __name__ == "__main__":
    main()
