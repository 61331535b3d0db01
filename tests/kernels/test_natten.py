"""Code that is stuck on old NATTEN runs, and gets neighborhood attention's results and gradients."""

import subprocess
import sys

import pytest
import torch

from visionattn_kernels import natten, neighborhood_attention

EPS = torch.finfo(torch.float64).eps


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize(("size", "dilation"), [((7, 9), 1), ((13, 8), 2)])
def test_the_two_dimensional_calls_are_neighborhood_attention_forward_and_backward(size, dilation):
    tensors = [draw(2, 3, *size, 4, seed=i) for i in range(3)] + [draw(3, 5, 5, seed=3)]
    query, key, value, bias = tensors
    scores = natten.natten2dqkrpb(query * 0.5, key, bias, 3, dilation)
    got = natten.natten2dav(scores.softmax(-1), value, 3, dilation)
    want = neighborhood_attention(query, key, value, 3, dilation=dilation, bias=bias, scale=0.5)
    torch.testing.assert_close(got, want, rtol=1e3 * EPS, atol=1e3 * EPS)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e4 * EPS, atol=1e4 * EPS)


def test_the_one_dimensional_calls_follow_the_window_rule():
    length, kernel, dilation = 11, 3, 2
    query, key, value, bias = draw(1, 2, length, 4), draw(1, 2, length, 4), draw(1, 2, length, 4), draw(2, 5)
    scores = natten.natten1dqkrpb(query, key, bias, kernel, dilation)
    out = natten.natten1dav(scores, value, kernel, dilation)
    for i in range(length):
        members = list(range(i % dilation, length, dilation))
        start = min(max(members.index(i) - kernel // 2, 0), len(members) - kernel)
        seen = members[start : start + kernel]
        want = torch.stack(
            [(query[:, :, i] * key[:, :, j]).sum(-1) + bias[:, (j - i) // dilation + kernel - 1] for j in seen], -1
        )
        torch.testing.assert_close(scores[:, :, i], want)
        torch.testing.assert_close(out[:, :, i], sum(want[..., n, None] * value[:, :, j] for n, j in enumerate(seen)))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_modules_have_the_parameters_of_old_and_train(dimensions):
    module = (natten.NeighborhoodAttention1D, natten.NeighborhoodAttention2D)[dimensions - 1]
    attention = module(dim=8, num_heads=2, kernel_size=3, dilation=2, rel_pos_bias=True)
    names = {name: tuple(x.shape) for name, x in attention.named_parameters()}
    table = (2, *[5] * dimensions)
    assert names == {
        "rpb": table,
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    x = torch.randn(2, *[7] * dimensions, 8)
    assert attention(x).shape == x.shape
    attention(x).sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())


def test_what_is_not_here_is_refused():
    query = draw(1, 1, 5, 5, 2)
    with pytest.raises(ValueError, match="is_causal=True"):
        natten.na2d_qk(query, query, 3, is_causal=True)
    with pytest.raises(ValueError, match="additional keys"):
        natten.na2d_qk(query, query, 3, additional_keys=query)
    with pytest.raises(ValueError, match=r"kernel_size 7 \* dilation 1"):
        natten.na2d_qk(query, query, 7)
    with pytest.raises(ValueError, match="rpb must be"):
        natten.na2d_qk(query, query, 3, rpb=torch.zeros(1, 3, 3))


def test_code_that_imports_natten_finds_it():
    code = (
        "import sys, visionattn_kernels.natten as natten; "
        "sys.modules['natten'] = sys.modules['natten.functional'] = natten; "
        "from natten.functional import natten2dav, natten2dqkrpb; "
        "from natten import NeighborhoodAttention2D; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "ok", done.stderr
