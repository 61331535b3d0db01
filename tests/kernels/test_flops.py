"""What the formulas say an operator multiplies is what its definition multiplies, where that does nothing in vain."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionattn_kernels import OPS
from visionattn_kernels.flops import FORMULAS
from visionattn_kernels.testing import CASES, aggregate, flow, halo, linear, neighborhood, routed

# Windows that cover the map, and maps that blocks divide: elsewhere the definitions multiply with zeros and masks.
EXACT = [
    neighborhood(2, 3, 7, 7, 8, kernel_size=7),
    routed(2, 4, 9, 4, 8, topk=3),
    halo(2, 2, 16, 24, 8, 12, block_size=8, halo_size=3),
    halo(1, 2, 16, 16, 8, block_size=8, halo_size=2, stride=2),
    linear(2, 3, 49, 8, 12, normalization="subtraction"),
    flow(2, 3, 49, 8, 12),
]


def count(function, case) -> int:
    arguments = case.tensors() | case.settings
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        function(**arguments)
    return counter.get_total_flops()


def test_every_operator_has_a_formula():
    assert {str(op).removeprefix("visionattn.") for op in FORMULAS} == OPS.keys() == CASES.keys()


@pytest.mark.parametrize("case", EXACT, ids=lambda case: f"{case.op} {case}")
def test_a_formula_counts_what_the_definition_multiplies(case):
    op = OPS[case.op]
    assert count(op.call, case) == count(op.reference, case) > 0


def test_sums_with_given_weights_are_half_of_attention():
    # The definition multiplies elements, which torch's counter does not count.
    attention, sums = neighborhood(2, 3, 9, 8, 16, kernel_size=5), aggregate(2, 3, 9, 8, 16, kernel_size=5)
    assert count(OPS[attention.op].call, attention) == 2 * count(OPS[sums.op].call, sums)


def test_only_the_window_counts():
    near, far = (neighborhood(1, 2, 28, 28, 8, kernel_size=size) for size in (3, 9))
    op = OPS["neighborhood_attention"].call
    assert count(op, far) == 9 * count(op, near)
