"""Darknet's descriptions of networks: sections of options, each with the line that an error can name."""

import dataclasses
import math
from pathlib import Path

from predoc_lib.files import FileError
from predoc_lib.naming import unknown

LARGEST = 1 << 16  # of any option: a damaged one must not ask for all memory
BYTES = 1 << 20  # of a file; YOLOv3's has 8,342


@dataclasses.dataclass(frozen=True)
class Section:
    """``[kind]`` and its options, each as (text, line)."""

    path: Path
    kind: str
    line: int
    options: dict[str, tuple[str, int]]

    def error(self, what: str, option: str | None = None) -> FileError:
        """The error that says where: file, line, section."""
        line = self.options[option][1] if option in self.options else self.line
        return FileError(f"{self.path}, line {line}, [{self.kind}]: {what}")

    def integers(self, name: str, default: tuple[int, ...] | None = None, low: int = 1) -> tuple[int, ...]:
        """An option's whole numbers.

        Raises:
            FileError: it is missing and has no default, is no list of whole numbers, or one is too small or too large.
        """
        if name not in self.options:
            if default is None:
                raise self.error(f"option {name!r} is missing.")
            return default
        text = self.options[name][0]
        try:
            found = tuple(int(part) for part in text.split(",") if part.strip())
        except ValueError:
            found = ()
        if not found or not all(low <= value <= LARGEST for value in found):
            raise self.error(f"{name!r} must be whole numbers from {low} to {LARGEST}, got {text!r}.", name)
        return found

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        """An option that is one whole number; errors as ``integers``'s."""
        found = self.integers(name, None if default is None else (default,), low)
        if len(found) > 1:
            raise self.error(f"{name!r} must be one whole number, got {self.options[name][0]!r}.", name)
        return found[0]

    def number(self, name: str, default: float) -> float:
        """An option that is a positive number; errors as ``integers``'s."""
        text = self.options.get(name, (str(default), 0))[0]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise self.error(f"{name!r} must be a positive number, got {text!r}.", name)
        return value

    def choice(self, name: str, valid: tuple[str, ...]) -> str:
        """An option that is one of a few words, the first if it is missing; errors as ``integers``'s."""
        text = self.options.get(name, (valid[0], 0))[0]
        if text not in valid:
            raise self.error(unknown(name, text, valid), name)
        return text


def read_cfg(path: Path) -> list[Section]:
    """The sections of a ``.cfg``, in order.

    Raises:
        FileError: it is absent, too large to be one, or a line is neither empty, a comment, ``[section]`` nor
            ``option=value``.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(BYTES + 1)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}. Wanted: a Darknet .cfg file.") from error
    if len(content) > BYTES:
        raise FileError(f"{path} is larger than any .cfg file. Is it the .weights file?")
    lines = content.decode(errors="replace").splitlines()
    sections: list[Section] = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" and line[-1] == "]":
            sections.append(Section(path, line[1:-1].strip(), number, {}))
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not (sections and name and equals):
            raise FileError(f"{path}, line {number}: wanted [section] or option=value, got {line[:60]!r}.")
        sections[-1].options[name] = (value, number)
    return sections
