"""Seeded faults fit the code, the table has a test that kills each, and one is killed here to see that it works."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "mutants"
sys.path.insert(0, str(FOLDER))
from faults import DEFINITION, FAULTS  # noqa: E402
from killing import FAILED, ROOT, mutate, run  # noqa: E402


def test_there_are_forty_faults_and_no_two_of_one_name():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_one_place_of_the_code(fault):
    source = (ROOT / fault.path).read_text()
    assert mutate(source, fault) != source


def test_a_fault_that_fits_nowhere_is_told():
    with pytest.raises(ValueError, match=r"is 0 times in .*windows\.py, wanted once"):
        mutate("", FAULTS[0])


def test_every_fault_is_killed_in_the_table():
    rows = [line for line in (FOLDER / "table.md").read_text().splitlines() if line.endswith("` |")]
    wanted = [f"| {fault.name} | `{fault.path}` | " for fault in FAULTS]
    assert [row.rpartition("`test_")[0] for row in rows] == wanted


def test_a_fault_is_killed_by_a_test():  # which passes without it, or it would fail where it stands
    fault = next(fault for fault in FAULTS if fault.tests == DEFINITION)
    assert run(DEFINITION, fault) == (FAILED, "test_reference_is_the_sum_over_the_window")
