"""Quoted numbers have a source that the bibliography lists."""

import re

import pytest
import yaml

from predoc_lib.quoted import quoted
from predoc_lib.results import ROOT

ENTRIES = yaml.safe_load((ROOT / "book" / "quoted.yaml").read_text())
KEYS = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "references.bib").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ENTRIES)
def test_every_quotation_names_a_source_of_the_bibliography_and_the_place_in_it(name):
    entry = quoted(name)
    assert entry["where"]
    assert {entry["source"], *(row["key"] for row in entry["rows"])} <= KEYS


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_quoted_are_positive_numbers(name):
    for row in quoted(name)["rows"]:
        for data in ("cifar10", "imagenet64"):
            assert all(isinstance(x, float | int) and x > 0 for x in row.get(data, {}).values())
        assert set(row.get("at_least", [])) <= {key for data in row.values() if isinstance(data, dict) for key in data}


def test_the_reports_headline_is_quoted_as_it_stands():
    rows = {row["model"]: row["cifar10"] for row in quoted("report_table_1")["rows"]}
    assert rows["Multi-scale FFJORD-RNODE"] == {"bits_per_dim": 3.28, "hours": 13.97, "fid": 143.14}
    assert rows["FFJORD-RNODE"] == {"bits_per_dim": 3.38, "hours": 31.84}


def test_an_unknown_quotation_is_refused_with_the_nearest_name():
    with pytest.raises(KeyError, match="Did you mean 'report_table_1'"):
        quoted("report_table_2")
