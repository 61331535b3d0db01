"""Linear attention computes the families' formulas, in any dtype and at any size, and says what it refuses."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionattn_kernels import linear_attention, stress
from visionattn_kernels.baselines import BASELINES
from visionattn_kernels.cpu import tokens as cpu
from visionattn_kernels.testing import check, evaluate, linear, relative_error

FAMILIES = [
    {"normalization": "subtraction"},
    {"normalization": "magnitude", "feature_map": "elu_plus_one", "rotary": True},
    {"normalization": "division", "feature_map": "relu", "scale": True, "epsilon": 100.0},
]
FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["normalization"])


@FAMILY
def test_the_families_code_computes_the_same(family):
    check(linear(2, 3, 59, 16, **family), BASELINES["linear_attention"])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(2, 150),
    pairs=st.integers(1, 12),
    value_dim=st.integers(1, 20),
    feature_map=st.sampled_from(["identity", "relu", "elu_plus_one"]),
    rotary=st.booleans(),
)
def test_any_sizes_agree_with_the_reference(batch, heads, tokens, pairs, value_dim, feature_map, rotary):
    shape = batch, heads, tokens, 2 * pairs, value_dim
    check(linear(*shape, normalization="subtraction", feature_map=feature_map), linear_attention)
    # What divides by a sum takes features of one sign.
    for normalization in ("division", "magnitude"):
        rule = {"normalization": normalization, "feature_map": "elu_plus_one", "rotary": rotary}
        check(linear(*shape, **rule), linear_attention)


@pytest.mark.usefixtures("one_thread")  # portions are sized by the thread
@FAMILY
def test_pieces_make_the_same_whole(family, monkeypatch):
    case = linear(2, 2, 101, 8, **family)
    want = evaluate(linear_attention, case, case.tensors())
    monkeypatch.setattr(cpu, "AT_ONCE", 16 * 30)
    got = evaluate(linear_attention, case, case.tensors())
    assert all(relative_error(got[name], want[name]) < 16 * torch.finfo(torch.float32).eps for name in want)


def test_subtraction_has_weights_that_add_up_to_one():
    query, key, _ = linear(1, 2, 37, 8, normalization="subtraction").tensors(torch.float64).values()
    ones = torch.ones_like(query)
    torch.testing.assert_close(linear_attention(query, key, ones, "subtraction"), ones)


def test_a_scale_may_be_a_number_or_one_a_head():
    case = linear(1, 2, 37, 8, normalization="magnitude", feature_map="elu_plus_one")
    tensors = case.tensors()
    number = linear_attention(**tensors, **case.settings, scale=0.3)
    per_head = linear_attention(**tensors, **case.settings, scale=torch.full((2,), 0.3))
    assert torch.equal(number, per_head)


@pytest.mark.parametrize("dtype", stress.HALF, ids=str)
def test_large_queries_and_many_tokens_stay_within_the_error_budget_in_half_precision(dtype):
    rows = stress.measure(dtype)
    assert len(rows) == len(FAMILIES) + 1
    assert all(row.share <= 1 for row in rows), rows
    # float16 ends at 65,504, and the authors' sums do not: what is left is no number, or (Flowformer) zero.
    assert all((row.authors > 0.9) == (dtype == torch.float16) for row in rows), rows


def test_the_stress_table_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(stress, "measure", lambda dtype: [stress.Row("L²ViT", dtype, math.inf, 0.007, 0.25)])
    assert stress.main() == 0
    assert re.search(r"L²ViT +float16 +nan +7.0e-03 +25%\n", capsys.readouterr().out)


TOKENS = torch.zeros(2, 3, 10, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": TOKENS[0]}, r"query must be \(B, heads, N, D\), got \(3, 10, 8\)"),
        ({"key": TOKENS[..., :4]}, r"key must be query's shape = \(2, 3, 10, 8\), got \(2, 3, 10, 4\)"),
        ({"value": TOKENS[:1]}, r"value must be query's shape but for the last axis = \(2, 3, 10, 8\), got \(1, 3"),
        ({"value": TOKENS.half()}, "value must be as query, torch.float32 on cpu, got torch.float16 on cpu"),
        (
            {"query": TOKENS[:, :, :0], "key": TOKENS[:, :, :0], "value": TOKENS[:, :, :0]},
            "at least 1 of each but B, got",
        ),
        ({"query": TOKENS[..., :0], "key": TOKENS[..., :0]}, "at least 1 of each but B, got"),
        ({"normalization": "softmax"}, r"normalization must be one of \('division'.*got 'softmax' and 'identity'"),
        ({"feature_map": "gelu"}, r"feature_map one of \('identity'.*got 'division' and 'gelu'"),
        ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        ({"scale": torch.ones(4)}, r"scale must be \(heads,\) = \(3,\), got \(4,\)"),
        ({"scale": torch.ones(3).int()}, "scale must be floating point on cpu, got torch.int32 on cpu"),
        ({"rotary": torch.ones(2, 10, 8)}, r"rotary must be \(2, N, D / 2\) = \(2, 10, 4\), got \(2, 10, 8\)"),
        ({"rotary": torch.ones(2, 10, 4), "normalization": "subtraction"}, "subtraction takes no rotary"),
    ],
)
def test_arguments_that_do_not_fit_are_told(changed, message):
    fitting = {"query": TOKENS, "key": TOKENS, "value": TOKENS, "normalization": "division"}
    with pytest.raises(ValueError, match=message):
        linear_attention(**fitting | changed)


def test_rotary_needs_pairs_of_channels():
    odd = TOKENS[..., :5]
    with pytest.raises(ValueError, match="D must be even, got D=5"):
        linear_attention(odd, odd, odd, "magnitude", rotary=torch.ones(2, 10, 2))
