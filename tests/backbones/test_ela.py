"""Efficient local attention has the published size, follows its formula and serves as timm's `attn_layer`."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from visionattn.layers import ELA


@pytest.mark.parametrize(("kind", "shared", "separate"), [("t", 7, 12), ("b", 9, 16), ("s", 42, 82), ("l", 58, 114)])
def test_parameters_are_so_many_a_channel(kind, shared, separate):
    for flag, number in ((True, shared), (False, separate)):
        assert sum(x.numel() for x in ELA(64, kind, shared=flag).parameters()) == 64 * number


@pytest.mark.parametrize("shared", [True, False])
def test_a_position_is_gated_by_its_row_and_its_column(shared):
    torch.manual_seed(0)
    module = ELA(32, "b", shared=shared).double()
    x = torch.randn(2, 32, 9, 4, dtype=torch.float64)

    def gate(means, weight):
        return torch.sigmoid(F.group_norm(F.conv1d(means, weight, padding=3, groups=32), 16))

    rows = gate(x.sum(3) / 4, module.conv_rows.weight)
    columns = gate(x.sum(2) / 9, module.conv_columns.weight)
    want = torch.einsum("bchw,bch,bcw->bchw", x, rows, columns)
    torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["t", "b", "s", "l"])
def test_it_serves_as_attention_layer_of_timm(kind):
    model = timm.create_model("resnet18", block_args={"attn_layer": partial(ELA, variant=kind)})
    assert sum(isinstance(module, ELA) for module in model.modules()) == 8
    model(torch.randn(2, 3, 33, 65)).square().mean().backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


@pytest.mark.parametrize(("dim", "kind", "message"), [(24, "b", "of 16 .*got 24"), (64, "x", "t, b, s, l, got 'x'")])
def test_what_does_not_fit_is_refused(dim, kind, message):
    with pytest.raises(ValueError, match=message):
        ELA(dim, kind)
