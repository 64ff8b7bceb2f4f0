"""Files that appear whole or not at all, and archives and arrays that come from elsewhere."""

import contextlib
import glob
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class FileError(ValueError):
    """A file that is refused: the message names it and says why."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; when the block ends well it is flushed to the disk and renamed to ``path``.

    A process that is killed, or a disk that is full, leaves the old file or none, never a part of a new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):  # of a process that was killed as it wrote
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` (or the one of an ``.npy``, named "array").

    Raises:
        FileError: it cannot be read, or holds Python objects: those would be unpickled, which can run any code.
    """
    try:
        found = np.load(path, allow_pickle=False)
        return {"array": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except Exception as error:  # a damaged file may raise anything
        why = "it holds Python objects, which are never unpickled" if "pickle" in str(error).lower() else _reason(error)
        raise FileError(f"{path} is refused: {why}. Wanted: an .npz or .npy file of plain numeric arrays.") from error


def extract(archive: Path, folder: Path) -> None:
    """Unpack the files of a ``.tar``, ``.tar.gz`` or ``.zip`` into a folder, if all of it stays inside.

    Raises:
        FileError: it cannot be read, an entry would lie outside the folder, or is a link or a device. Where an entry is
            refused, nothing was unpacked.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _refuse_outside(archive, folder, file.namelist())
                file.extractall(folder)
        else:
            with tarfile.open(archive) as file:
                entries = file.getmembers()
                _refuse_outside(archive, folder, [entry.name for entry in entries])
                for entry in entries:
                    if not (entry.isfile() or entry.isdir()):
                        raise FileError(f"{archive} is refused: its entry {entry.name!r} is a link or a device.")
                for entry in filter(tarfile.TarInfo.isfile, entries):  # tarfile's own filters want Python 3.11.4
                    path = Path(folder) / entry.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as target:
                        shutil.copyfileobj(file.extractfile(entry), target)
    except FileError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise FileError(f"{archive} cannot be unpacked: {_reason(error)}.") from error


def _refuse_outside(archive: Path, folder: Path, names: list[str]) -> None:
    root = Path(folder).resolve()
    for name in names:
        if not (root / name).resolve().is_relative_to(root):
            raise FileError(f"{archive} is refused: its entry {name!r} would lie outside {folder}.")


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
