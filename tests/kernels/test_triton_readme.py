"""The tables of kernels/README.md describe the kernels as they are."""

import re
from pathlib import Path

import pytest

from visionattn_kernels.triton.evidence.readme import replace_table, source_hash

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_tables_were_printed_from_these_kernels():
    stamps = re.findall(r"^Kernels (\w{12}), Triton \S+, \d{4}-\d\d-\d\d\.$", README.read_text(), flags=re.MULTILINE)
    commands = "python tools/compile_kernels.py --write kernels/README.md, and again with --traffic"
    assert stamps == [source_hash()] * 2, f"run {commands}"


def test_a_table_replaces_the_one_between_its_comments():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n"
    assert replace_table(text, "one", "new") == "a\n<!-- one -->\nnew\n<!-- /one -->\nb\n"


def test_a_text_without_a_place_for_the_table_is_an_error():
    with pytest.raises(ValueError, match="expected a place for the table, <!-- two --> and then <!-- /two -->"):
        replace_table("<!-- /two --> <!-- two -->", "two", "new")
