"""What is particular to routed attention: its router, its two CPU paths, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionattn_kernels import region_routes, routed_attention
from visionattn_kernels.cpu import routed_attention as cpu
from visionattn_kernels.testing import check, evaluate, relative_error, routed


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    regions=st.integers(1, 23),
    tokens=st.integers(2, 41),  # of a single key the gradient of the query is zero, and no error relative to it
    dim=st.integers(1, 19),
    data=st.data(),
)
def test_any_sizes_agree_with_the_reference(batch, heads, regions, tokens, dim, data):
    topk = data.draw(st.integers(1, regions))
    check(routed(batch, heads, regions, tokens, dim, topk=topk), routed_attention)


@pytest.mark.parametrize(
    "case",
    [routed(2, 2, 12, 35, 16, topk=3), routed(2, 4, 49, 4, 32, topk=16), routed(1, 2, 5, 90, 8, topk=3)],
    ids=str,
)
def test_the_dense_and_the_copying_path_agree(case, monkeypatch):
    _, _, regions, tokens, _ = case.shapes["query"]
    monkeypatch.setattr(cpu, "DENSE_TOKENS", regions * tokens)  # an image at a time
    answers = []
    for queries in (0, 10**6):
        monkeypatch.setattr(cpu, "COPY_IN_QUERIES", queries)
        for elements in ("FORWARD_WHOLE", "FORWARD_AT_ONCE", "BACKWARD_AT_ONCE"):
            monkeypatch.setattr(cpu, elements, 4000)
        assert cpu._is_dense(case.tensors()["query"], case.tensors()["routes"]) == bool(queries)
        answers.append(evaluate(routed_attention, case, case.tensors()))
    for name in answers[0]:
        assert relative_error(answers[0][name], answers[1][name]) < 16 * torch.finfo(torch.float32).eps


def test_a_region_named_twice_counts_twice():
    key, value = torch.tensor([0.0, 0.0]).view(1, 1, 2, 1, 1), torch.tensor([0.0, 3.0]).view(1, 1, 2, 1, 1)
    routes = torch.tensor([[[0, 1, 1], [0, 0, 1]]])
    assert routed_attention(key, key, value, routes).flatten().tolist() == pytest.approx([2.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routes_are_the_regions_whose_mean_keys_fit_best(dtype):
    query, key, _ = (x.to(dtype) for x in routed(2, 3, 16, 6, 8, topk=1).tensors(torch.float64).values() if x.ndim == 5)
    means = [torch.stack([x[:, :, r].double().mean(2).flatten(1) for r in range(16)], 1) for x in (query, key)]
    affinity = torch.einsum("brc,bsc->brs", *means)
    routes = region_routes(query, key, 5)
    assert routes.shape == (2, 16, 5)
    assert torch.equal(routes, affinity.argsort(-1, descending=True)[..., :5])
    assert not routes.requires_grad


def test_autocast_does_not_move_a_route():
    query, key = (torch.randn(2, 2, 49, 16, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        got = region_routes(query, key, 8)
    assert torch.equal(got, region_routes(query, key, 8))


REGIONS = torch.zeros(2, 3, 6, 4, 8)
ROUTES = torch.zeros(2, 6, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": REGIONS[0]}, r"query must be \(B, heads, R, T, D\), got \(3, 6, 4, 8\)"),
        ({"key": REGIONS[:1]}, r"key must be query's shape = \(2, 3, 6, 4, 8\), got \(1, 3, 6, 4, 8\)"),
        ({"value": REGIONS.half()}, "value must be as query, torch.float32 on cpu, got torch.float16 on cpu"),
        ({"routes": ROUTES.int()}, "routes must be torch.int64 on cpu, got torch.int32 on cpu"),
        ({"routes": ROUTES[0]}, r"routes must be \(B, R, K\), got \(6, 2\)"),
        ({"routes": ROUTES[:, :5]}, r"routes must be \(B, R, K\) = \(2, 6, 2\), got \(2, 5, 2\)"),
        ({"routes": ROUTES[..., :0]}, r"routes must name at least one region, got \(2, 6, 0\)"),
        ({"routes": ROUTES + 6}, "routes must be between 0 and 5, got 6 to 6"),
        ({"routes": ROUTES - 1}, "routes must be between 0 and 5, got -1 to -1"),
    ],
)
def test_arguments_that_do_not_fit_are_told(changed, message):
    with pytest.raises(ValueError, match=message):
        routed_attention(**{"query": REGIONS, "key": REGIONS, "value": REGIONS, "routes": ROUTES} | changed)


@pytest.mark.parametrize("topk", [0, 7])
def test_a_number_of_routes_that_does_not_fit_is_told(topk):
    with pytest.raises(ValueError, match=f"topk must be between 1 and the number of regions 6, got {topk}"):
        region_routes(REGIONS, REGIONS, topk)
