"""The data sets of the book: what each is, where it lies, and whether its files are the right ones.

Embedded data comes with a library and is always there. Real data lies in a cache folder, ``PREDOC_DATA`` or the user's
cache directory, and every file of it is checked against its known size and sha256 before it is used.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pooch

from predoc_lib.naming import unknown


class DataError(ValueError):
    """Data that is unknown, absent or damaged: the message says what was expected and how to get it."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set: embedded if ``content`` gives its bytes, else real, with ``files`` that ``download`` fetches."""

    what: str
    licence: str
    content: Callable[[], bytes] | None = None
    files: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    """Path below ``root()`` -> (bytes, sha256)."""
    download: Callable[[Path], object] | None = None
    """Puts the files below the folder it is given, in any order: ``fetch`` moves them in when all are verified. None:
    they can only be put there by hand."""
    instead: str = ""
    """The embedded data set to use where this one is absent."""
    where: str = ""
    """The library that an embedded data set comes with."""


def _digits() -> bytes:
    import sklearn.datasets  # half a second: only where the data itself is wanted

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return images.astype("uint8").tobytes() + labels.astype("uint8").tobytes()


def _photos() -> bytes:
    from predoc_lib.data.photos import content  # a module that imports this one

    return content()


def _driving() -> bytes:
    return Path(__file__).with_name("driving.py").read_bytes()  # it is drawn: what draws it is the data


def _download_mnist(folder: Path) -> None:
    import torchvision

    torchvision.datasets.MNIST(folder, download=True)


def _download_cifar10(folder: Path) -> None:
    import torchvision

    torchvision.datasets.CIFAR10(folder, download=True)


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(
        "1,797 handwritten digits, 8 x 8 (scikit-learn's load_digits)", "CC BY 4.0", _digits, where="scikit-learn"
    ),
    "mnist": DataSet(
        "MNIST, 70,000 handwritten digits, 28 x 28",
        "CC BY-SA 3.0",
        files={
            "MNIST/raw/train-images-idx3-ubyte": (
                47_040_016,
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            "MNIST/raw/train-labels-idx1-ubyte": (
                60_008,
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            "MNIST/raw/t10k-images-idx3-ubyte": (
                7_840_016,
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            "MNIST/raw/t10k-labels-idx1-ubyte": (
                10_008,
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        },
        download=_download_mnist,
        instead="digits",
    ),
    "photos": DataSet(
        "7 photographs that come with scikit-image and scikit-learn",
        "public domain, CC0, CC BY 2.0; motorcycle: Middlebury Stereo 2014",
        _photos,
        where="scikit-image, scikit-learn",
    ),
    "driving": DataSet(
        "a drawn road with cars, trucks and people; boxes, masks and flow at any time",
        "MIT",
        _driving,
        where="predoc_lib",
    ),
    "cifar10": DataSet(
        "CIFAR-10, 60,000 colour images, 32 x 32",
        "not stated",
        files={
            "cifar-10-python.tar.gz": (
                170_498_071,
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        },
        download=_download_cifar10,
        instead="photos",
    ),
    "cifar10_subset": DataSet(
        "35,000 of CIFAR-10's images, with a split of its own",
        "not stated",
        files={
            "cifar10/cifar10_train_30000.npz": (
                84_781_400,
                "92c69f5047d8ed4e879c3d0c5a4381e7340f13956d61d588e364b5529a87fd74",
            ),
            "cifar10/cifar10_val_5000.npz": (
                14_137_556,
                "61399ef7e1372f949c18f4397e2423854d16a1c5fc42a0c32aec130bfe195b6d",
            ),
        },
        instead="photos",
    ),
}


def root() -> Path:
    """The folder of the real data: ``PREDOC_DATA``, or the user's cache directory."""
    return Path(os.environ.get("PREDOC_DATA") or pooch.os_cache("predoc")).expanduser()


def require(name: str) -> Path:
    """Return the folder below which the verified files of a data set lie (for embedded data, ``root()``, unused).

    Raises:
        DataError: unknown data set, or its files are absent or damaged.
    """
    entry, folder = _entry(name), root()
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
        else:
            state, size = "present, verified", sum(size for size, _ in entry.files.values())
            where = os.path.commonpath(entry.files)
            try:
                require(name)
            except DataError as error:
                state, problem = "absent" if _missing(entry, root()) else "corrupt", str(error)
        size = f"{size / 1e6:.1f} MB"
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
