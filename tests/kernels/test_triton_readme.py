"""The tables of kernels/README.md describe the kernels as they are."""

import re
from pathlib import Path

import pytest

from visionattn_kernels.triton.evidence import OPERATORS
from visionattn_kernels.triton.evidence.readme import replace_table, source_files, source_hash

README = Path(__file__).parents[2] / "kernels" / "README.md"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["resources", "traffic"])
def test_the_tables_were_printed_from_these_kernels(name, operator):
    table = re.search(
        f"<!-- {name} {operator} -->\n(.*?)<!-- /{name} {operator} -->", README.read_text(), flags=re.DOTALL
    )
    stamps = re.findall(
        r"^Kernels (\w{12}), Triton \S+, \d{4}-\d\d-\d\d\.$", table[1] if table else "", flags=re.MULTILINE
    )
    option = " --traffic" if name == "traffic" else ""
    command = f"python tools/compile_kernels.py --operator {operator}{option} --write kernels/README.md"
    assert stamps == [source_hash(operator)], f"run {command}"


def test_the_hash_covers_what_a_launcher_imports_and_nothing_else():
    names = {path.stem for path in source_files("neighborhood_attention")}
    shared = {"launch", "relative_bias", "rows", "softmax", "tiles", "windows"}
    assert names == {"neighborhood_attention", "neighborhood_attention_kernels", *shared}


def test_a_table_replaces_the_one_between_its_comments():
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n"
    assert replace_table(text, "one", "new") == "a\n<!-- one -->\nnew\n<!-- /one -->\nb\n"


def test_a_text_without_a_place_for_the_table_is_an_error():
    with pytest.raises(ValueError, match="expected a place for the table, <!-- two --> and then <!-- /two -->"):
        replace_table("<!-- /two --> <!-- two -->", "two", "new")
