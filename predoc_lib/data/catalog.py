"""The data sets of the book: what each is, where it lies, and whether its files are the right ones.

Embedded data comes with a library and is always there. Real data lies in a cache folder, ``PREDOC_DATA`` or the user's
cache directory, and every file of it is checked against its known size and sha256 before it is used.
"""

import contextlib
import functools
import hashlib
import os
import tempfile
from pathlib import Path

import pooch

from predoc_lib.data.sources import DATASETS, DataSet
from predoc_lib.naming import unknown


class DataError(ValueError):
    """Data that is unknown, absent or damaged: the message says what was expected and how to get it."""


def root() -> Path:
    """The folder of the real data: ``PREDOC_DATA``, or the user's cache directory."""
    return Path(os.environ.get("PREDOC_DATA") or pooch.os_cache("predoc")).expanduser()


def require(name: str) -> Path:
    """Return the folder below which the verified files of a data set lie (for embedded data, ``root()``, unused).

    Raises:
        DataError: unknown data set, or its files are absent, damaged, or anyone's own.
    """
    entry, folder = _entry(name), root()
    if entry.yours:
        raise DataError(f"{name} is yours to get: {entry.yours}")
    missing = _missing(entry, folder)
    if missing:
        raise DataError(
            f"{name} ({entry.what}) is not there: {folder / missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''} not found. "
            f"{f'Fetch it with `predoc data {name}`, or name' if entry.download else 'Name'} "
            f"the folder that has {missing[0]} in PREDOC_DATA, "
            f"or use the embedded {entry.instead!r} instead."
        )
    _verify(name, entry, folder)
    return folder


def fetch(name: str) -> Path:
    """Download the files of a data set if they are absent or damaged, verify them, and return ``require(name)``.

    Raises:
        DataError: unknown data set, no connection, no room, or what came is not what was expected.
    """
    entry, folder = _entry(name), root()
    with contextlib.suppress(DataError):
        return require(name)
    if entry.download is None:
        return require(name)  # which says what to do
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside its destination, so that the last step is a rename: no half-written file ever has the right name.
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"fetching-{name}-") as temporary:
            entry.download(Path(temporary))
            wrong = _wrong(entry, Path(temporary))
            if wrong:
                raise DataError(
                    f"What was downloaded as {name} is not what was expected ({wrong[0]}: {wrong[1]}), and nothing was "
                    f"changed. Try again later, put its files into {folder} by hand ({', '.join(entry.files)}), or use "
                    f"the embedded {entry.instead!r} instead."
                )
            for file in entry.files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(temporary) / file, folder / file)
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError when every mirror fails
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} could not be fetched into {folder}: {reason}. Put its files there by hand "
            f"({', '.join(entry.files)}), or use the embedded {entry.instead!r} instead."
        ) from error
    return require(name)


def checksum(name: str) -> str:
    """sha256 of a data set: of the arrays if it is embedded, else of the list of its files' own sha256.

    Raises:
        DataError: unknown data set, or its files are absent or damaged.
    """
    entry = _entry(name)
    require(name)
    listed = "".join(f"{digest}  {file}\n" for file, (_, digest) in sorted(entry.files.items()))
    return hashlib.sha256(entry.content() if entry.content else listed.encode()).hexdigest()


def status() -> list[dict[str, str]]:
    """One row a data set: name, state, size, where (below ``root()``), what, licence, and the problem, if any."""
    rows = []
    for name, entry in DATASETS.items():
        problem = ""
        if entry.content:
            state, size, where = "embedded", len(entry.content()), entry.where
        elif entry.yours:
            state, size, where = "by path", 0, "anywhere"
        else:
            state, size = "present, verified", sum(size for size, _ in entry.files.values())
            where = os.path.commonpath(entry.files)
            try:
                require(name)
            except DataError as error:
                state, problem = "absent" if _missing(entry, root()) else "corrupt", str(error)
        size = entry.size or f"{size / 1e6:.1f} MB"
        row = {"name": name, "state": state, "size": size, "where": where, "what": entry.what, "licence": entry.licence}
        rows.append(row | {"problem": problem})
    return rows


def _entry(name: str) -> DataSet:
    if name not in DATASETS:
        raise DataError(unknown("data set", name, DATASETS))
    return DATASETS[name]


def _missing(entry: DataSet, folder: Path) -> list[str]:
    return [file for file in entry.files if not (folder / file).is_file()]


def _verify(name: str, entry: DataSet, folder: Path) -> None:
    """Raise DataError for the first file that is not what it should be."""
    wrong = _wrong(entry, folder)
    if wrong:
        raise DataError(
            f"{folder / wrong[0]} is damaged and was not used: {wrong[1]}. "
            f"{f'Fetch {name} again with `predoc data {name}`' if entry.download else 'Copy it again'}, "
            f"or use the embedded {entry.instead!r} instead."
        )


def _wrong(entry: DataSet, folder: Path) -> tuple[str, str] | None:
    """The first file that is not what it should be, and how."""
    for file, (size, digest) in entry.files.items():
        path = folder / file
        try:
            found = path.stat()
            if found.st_size != size:
                return file, f"{found.st_size:,} bytes, expected {size:,}"
            sha256 = _sha256(path, found.st_size, found.st_mtime_ns)
        except OSError as error:
            return file, str(error.strerror)
        if sha256 != digest:
            return file, f"sha256 {sha256}, expected {digest}"
    return None


@functools.cache  # a file is hashed once a process, unless it changes
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
