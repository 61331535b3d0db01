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

    rows = gate(x.sum(3) / 4, module.convs[0].weight)
    columns = gate(x.sum(2) / 9, module.convs[-1].weight)
    want = torch.einsum("bchw,bch,bcw->bchw", x, rows, columns)
    torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["t", "b", "s", "l"])
def test_it_serves_as_attention_layer_of_timm(kind):
    model = timm.create_model("resnet18", block_args={"attn_layer": partial(ELA, variant=kind)})
    assert sum(isinstance(module, ELA) for module in model.modules()) == 8
    model(torch.randn(2, 3, 33, 65)).square().mean().backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


def test_it_stands_in_for_a_block():
    model = timm.create_model("resnet18", num_classes=3).eval()
    model.layer2[1] = ELA(128, "s")
    logits = model(torch.randn(1, 3, 75, 64))
    logits.sum().backward()
    assert logits.shape == (1, 3)
    assert all(p.grad.abs().sum() > 0 for p in model.layer2[1].parameters())


@pytest.mark.parametrize(("dim", "kind", "message"), [(24, "b", "of 16 .*got 24"), (64, "x", "t, b, s, l, got 'x'")])
def test_what_does_not_fit_is_refused(dim, kind, message):
    with pytest.raises(ValueError, match=message):
        ELA(dim, kind)


# Parameters that the attention adds: channels it stands on times those of a channel.
@pytest.mark.parametrize(
    ("host", "channels", "kind", "number"),
    [
        (host, channels, kind, number)
        for host, channels in (("resnet18", 1920), ("resnet50", 15104), ("resnet101", 32512), ("mobilenetv2", 7136))
        for kind, number in (("t", 7), ("b", 9), ("s", 42), ("l", 58))
        if (host, kind) != ("mobilenetv2", "t")
    ],
)
def test_every_block_of_a_net_has_its_attention(host, channels, kind, number):
    net = timm.create_model(f"ela_{kind}_{host}", device="meta")
    plain = timm.create_model("mobilenetv2_100" if host == "mobilenetv2" else host, device="meta")
    added = sum(x.numel() for x in net.parameters()) - sum(x.numel() for x in plain.parameters())
    assert added == channels * number


@pytest.mark.parametrize("name", ["test_ela_resnet", "test_ela_mobilenetv2"])
def test_convolutions_may_be_separate(name):
    modules = timm.create_model(name, shared=False, device="meta").modules()
    assert all(len(x.convs) == 2 for x in modules if isinstance(x, ELA))


@pytest.mark.parametrize(("placement", "dims"), [("output", [64, 256]), ("conv", [16, 64])])
def test_the_placement_is_an_argument(placement, dims):
    model = timm.create_model("ela_b_resnet50", stages=((16, 1), (64, 1)), placement=placement, device="meta")
    assert [x.norm.num_channels for x in model.modules() if isinstance(x, ELA)] == dims


def test_another_placement_is_refused():
    with pytest.raises(ValueError, match="'output' or 'conv', got 'input'"):
        timm.create_model("ela_b_resnet18", placement="input")
