"""Numbers of other people's papers: ``book/quoted.yaml`` is the only place where one is typed."""

from typing import Any

import yaml

from predoc_lib.naming import unknown
from predoc_lib.results import ROOT


def quoted(name: str) -> dict[str, Any]:
    """One entry of ``book/quoted.yaml``: "source" (a key of references.bib), "where" in it, and what is quoted.

    Raises:
        KeyError: there is no such entry.
    """
    entries = yaml.safe_load((ROOT / "book" / "quoted.yaml").read_text())
    if name not in entries:
        raise KeyError(unknown("quotation", name, entries))
    return entries[name]
