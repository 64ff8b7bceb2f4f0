"""One sentence for every name that is not known: what was given, the nearest valid name, all valid names."""

import difflib
from collections.abc import Iterable
from typing import Any


def unknown(what: str, value: Any, valid: Iterable[Any]) -> str:
    """The sentence for a ``value`` that is none of the ``valid`` ones."""
    names = [str(v) for v in valid]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what} {value!r}.{hint} Valid: {', '.join(names)}."
