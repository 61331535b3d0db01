"""Halo attention is timm's, at any size, and says what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.halo_attn import HaloAttn

from visionattn_kernels import halo_attention
from visionattn_kernels.cpu import halo_attention as cpu
from visionattn_kernels.testing import check, evaluate, halo, relative_error


def attend(module: HaloAttn, x: torch.Tensor) -> torch.Tensor:
    """What `module` computes of (B, C, H, W), with our operator in place of its attention."""
    heads, dim = module.num_heads, module.dim_head_qk
    query = module.q(x).unflatten(1, (heads, dim)).movedim(2, -1)
    key, value = module.kv(x).unflatten(1, (heads, -1)).movedim(2, -1).split([dim, module.dim_head_v], -1)
    tables = module.pos_embed.height_rel, module.pos_embed.width_rel
    out = halo_attention(
        query, key, value, *tables, module.block_size, module.halo_size, module.block_stride, module.scale
    )
    return module.pool(out.movedim(-1, 2).flatten(1, 2))


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 64, 16, 24), {"num_heads": 4, "block_size": 8, "halo_size": 3}),
        ((1, 32, 24, 16), {"num_heads": 2, "block_size": 8, "halo_size": 2, "dim_out": 64, "dim_head": 16}),
        ((2, 32, 16, 16), {"num_heads": 4, "block_size": 8, "halo_size": 3, "stride": 2}),
        ((1, 24, 12, 18), {"num_heads": 3, "block_size": 6, "halo_size": 1, "dim_out": 48, "qk_ratio": 0.5}),
        ((1, 16, 10, 20), {"num_heads": 2, "block_size": 5, "halo_size": 3, "stride": 2}),
    ],
)
def test_equal_to_timms_module_forward_and_backward(shape, arguments):
    torch.manual_seed(0)
    module = HaloAttn(shape[1], **arguments)
    x = torch.randn(shape, requires_grad=True)
    want = module(x)
    got = attend(module, x)
    direction = torch.randn_like(want)
    inputs = [x, *module.parameters()]
    wants, gots = (torch.autograd.grad(out, inputs, direction) for out in (want, got))
    assert max(map(relative_error, (got, *gots), (want, *wants))) <= 1e-5


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    dims=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    blocks=st.integers(1, 4),
    stride=st.integers(1, 3),
    halo_size=st.integers(1, 4),  # without a halo a block may be a single key, whose query has no gradient
)
def test_any_sizes_agree_with_the_reference(batch, heads, height, width, dims, blocks, stride, halo_size):
    sizes = {"block_size": blocks * stride, "halo_size": halo_size, "stride": stride}
    check(halo(batch, heads, height, width, *dims, **sizes), halo_attention)


@pytest.mark.usefixtures("one_thread")  # portions are sized by the thread
@pytest.mark.parametrize("at_once", [1, 2 * 36 * 100, 2**24], ids=["block by block", "in part", "all"])
def test_pieces_make_the_same_whole(at_once, monkeypatch):
    case = halo(3, 2, 15, 20, 8, block_size=6, halo_size=2)
    want = evaluate(halo_attention, case, case.tensors())
    monkeypatch.setattr(cpu, "SCORES_AT_ONCE", at_once)
    got = evaluate(halo_attention, case, case.tensors())
    assert all(relative_error(got[name], want[name]) < 16 * torch.finfo(torch.float32).eps for name in want)


def test_keys_outside_the_map_draw_from_the_softmax():
    case = halo(1, 1, 4, 4, 2, block_size=4, halo_size=1)
    tensors = {name: torch.zeros(shape) for name, shape in case.shapes.items()}
    tensors["value"] += 1
    assert halo_attention(**tensors, **case.settings).unique().tolist() == pytest.approx([16 / 36])


MAP = torch.zeros(2, 3, 9, 13, 8)
TABLE = torch.zeros(15, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": MAP[0]}, r"query must be \(B, heads, H, W, D\), got \(3, 9, 13, 8\)"),
        ({"query": MAP[:, :0]}, r"query must be .* with at least 1 of each but B, got \(2, 0, 9, 13, 8\)"),
        ({"key": MAP[..., :0, :]}, r"key must be .* with at least 1 of each but B, got \(2, 3, 9, 0, 8\)"),
        ({"value": MAP[..., :0]}, r"value must be .* with at least 1 of each but B, got \(2, 3, 9, 13, 0\)"),
        ({"query": MAP[:, :, 1:]}, r"query must be key's shape over stride 1 = \(2, 3, 9, 13, 8\), got \(2, 3, 8, 13"),
        ({"value": MAP[:, :1]}, r"value must be key's shape but for the last axis = \(2, 3, 9, 13, 8\), got \(2, 1, 9"),
        ({"stride": 2}, r"query must be key's shape over stride 2 = \(2, 3, 5, 7, 8\), got \(2, 3, 9, 13, 8\)"),
        ({"stride": 3}, "block_size must be a positive multiple of stride.*got block_size=4, halo_size=2, stride=3"),
        ({"halo_size": -1}, "halo_size not negative, got block_size=4, halo_size=-1, stride=1"),
        ({"width_rel": TABLE[:14]}, r"width_rel must be \(2P-1, D\) = \(15, 8\), got \(14, 8\)"),
        ({"height_rel": TABLE.double()}, "height_rel must be as query, torch.float32 on cpu, got torch.float64 on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_told(changed, message):
    fitting = {"query": MAP, "key": MAP, "value": MAP, "height_rel": TABLE, "width_rel": TABLE}
    with pytest.raises(ValueError, match=message):
        halo_attention(**fitting | {"block_size": 4, "halo_size": 2} | changed)
