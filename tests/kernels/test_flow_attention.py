"""Flow attention computes Flowformer's formula, conserves its flows, and says what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionattn_kernels import flow_attention
from visionattn_kernels.baselines import BASELINES
from visionattn_kernels.cpu import flow_attention as cpu
from visionattn_kernels.cpu import tokens
from visionattn_kernels.testing import check, evaluate, flow, relative_error

EPS = torch.finfo(torch.float32).eps


def test_flowformers_code_computes_the_same():
    check(flow(2, 3, 59, 16), BASELINES["flow_attention"])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    count=st.integers(2, 150),
    dim=st.integers(1, 24),
    value_dim=st.integers(1, 20),
)
def test_any_sizes_agree_with_the_reference(batch, heads, count, dim, value_dim):
    check(flow(batch, heads, count, dim, value_dim), flow_attention)


@pytest.mark.usefixtures("one_thread")  # portions are sized by the thread
@pytest.mark.parametrize("at_once", [48 * 20, 48 * 101 * 2], ids=["chunks of tokens", "groups of images"])
def test_pieces_make_the_same_whole(at_once, monkeypatch):
    case = flow(3, 3, 101, 16)
    want = evaluate(flow_attention, case, case.tensors())
    monkeypatch.setattr(tokens, "AT_ONCE", at_once)
    monkeypatch.setattr(cpu, "GROUPED", at_once)
    got = evaluate(flow_attention, case, case.tensors())
    assert all(relative_error(got[name], want[name]) < 32 * EPS for name in want)


def test_without_competition_the_mean_is_gated_by_what_a_query_takes_in():
    query, value = (torch.randn(1, 2, 37, 8, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    taken = query.sigmoid().sum(-1, keepdim=True)
    want = value.mean(2, keepdim=True) * (taken / taken.mean(2, keepdim=True)).sigmoid()
    torch.testing.assert_close(flow_attention(query, torch.zeros_like(query), value), want, rtol=1e-5, atol=1e-5)


TOKENS = torch.zeros(2, 3, 10, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": TOKENS[0]}, r"query must be \(B, heads, N, D\), got \(3, 10, 8\)"),
        ({"key": TOKENS[:, :, :4]}, r"key must be query's shape = \(2, 3, 10, 8\), got \(2, 3, 4, 8\)"),
        ({"value": TOKENS[:, :1]}, r"value must be query's shape but for the last axis = \(2, 3, 10, 8\), got \(2, 1"),
        ({"key": TOKENS.double()}, "key must be as query, torch.float32 on cpu, got torch.float64 on cpu"),
        ({"epsilon": -1.0}, "epsilon must be positive, got -1.0"),
    ],
)
def test_arguments_that_do_not_fit_are_told(changed, message):
    with pytest.raises(ValueError, match=message):
        flow_attention(**{"query": TOKENS, "key": TOKENS, "value": TOKENS} | changed)
