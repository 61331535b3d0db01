"""Subspace attention gives the authors' answers, replaces the blocks named, and serves as timm's `attn_layer`."""

import re
from pathlib import Path

import pytest
import timm
import torch
from golden import Golden, difference, image, probe

from visionattn.layers import ULSAM, merge_subspaces

GOLDEN = Path(__file__).parents[1] / "golden"
# The module adds about a hundredth of its input, so that the difference of the two loses two digits.
DELTA_TOLERANCE = 1e-3


def load(model: torch.nn.Module, golden: Golden) -> None:
    """Load the reference weights, which lack only the counters of batch norms."""
    missing, unknown = model.load_state_dict(merge_subspaces(golden.state_dict()), strict=False)
    assert not unknown
    assert all(name.endswith("num_batches_tracked") for name in missing)


def test_the_module_is_the_authors():
    golden = Golden.load(GOLDEN / "ulsam_module_c64_g4.npz")
    module = ULSAM(64).eval()
    load(module, golden)
    x = torch.from_numpy(image(*golden.input_shape)).requires_grad_()
    y = module(x)
    (y.flatten() * torch.from_numpy(probe(y.numel()))).sum().backward()
    assert sum(p.numel() for p in module.parameters()) == golden.meta["params"]
    assert difference((y - x).detach().numpy(), golden.outputs["delta_"]) <= DELTA_TOLERANCE
    assert difference(y.detach().numpy(), golden.outputs["logits"]) <= 1e-5
    assert difference(x.grad.numpy(), golden.outputs["grad_input"]) <= 1e-4


@pytest.mark.parametrize("replaced", [[(3, 1)], [(4, 1), (4, 2), (5, 1), (5, 2)]])
def test_the_blocks_to_replace_and_the_subspaces_are_arguments(replaced):
    model = timm.create_model("ulsam_mobilenetv2", replaced=replaced, num_subspaces=8, device="meta")
    found = {name: x for name, x in model.named_modules() if isinstance(x, ULSAM)}
    assert list(found) == [f"blocks.{stage}.{number}" for stage, number in replaced]
    assert all(module.num_subspaces == 8 for module in found.values())


def test_modules_may_stand_behind_blocks_instead():
    model = timm.create_model("ulsam_mobilenetv2", replaced=(), added=[(5, 1), (4, 0)], momentum=0.1, device="meta")
    found = {name: x for name, x in model.named_modules() if isinstance(x, ULSAM)}
    assert {name: x.conv_dws.in_channels for name, x in found.items()} == {"blocks.4.0.1": 96, "blocks.5.1.1": 160}
    assert all(x.bn_dws.momentum == x.bn_point.momentum == 0.1 for x in found.values())
    host = timm.create_model("mobilenetv2_100", device="meta")
    # Of each module 5 a channel and 3 a subspace, of which there are four.
    added = sum(5 * x + 12 for x in (96, 160))
    assert sum(x.numel() for x in model.parameters()) - sum(x.numel() for x in host.parameters()) == added


def test_an_added_module_acts_on_what_its_block_gives():
    torch.manual_seed(0)
    plain, net = (timm.create_model("test_ulsam", replaced=(), added=x).eval() for x in ((), ((3, 1),)))
    module = net.blocks[3][1][1]
    named = {name.replace("blocks.3.1.", "blocks.3.1.0."): x for name, x in plain.state_dict().items()}
    net.load_state_dict(named, strict=False)
    x = torch.randn(1, 3, 65, 90)
    before, after = (model.forward_intermediates(x, intermediates_only=True)[2] for model in (plain, net))
    assert torch.equal(after, module(before))


def test_without_replacement_the_net_is_timms():
    torch.manual_seed(0)
    theirs = timm.create_model("mobilenetv2_100").eval()
    overlay = {"state_dict": theirs.state_dict()}
    ours = timm.create_model("ulsam_mobilenetv2", replaced=(), pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 65, 90)
    assert torch.equal(ours(x), theirs(x))


def test_the_first_block_of_a_stage_must_stay():
    with pytest.raises(ValueError, match=r"behind the first of a stage, got \(3, 0\)"):
        timm.create_model("test_ulsam", replaced=((3, 0),))


@pytest.mark.parametrize("place", [(5, 1), (2, 2), (-1, 1)])
def test_a_block_that_is_not_there_is_told(place):
    for argument in ("replaced", "added"):
        with pytest.raises(ValueError, match=r"stages with \[1, 1, 2, 2, 1\] blocks, got " + re.escape(str(place))):
            timm.create_model("test_ulsam", **{argument: (place,)})


def test_one_map_weighs_the_channels_of_a_subspace_and_sums_to_one():
    module = ULSAM(12, num_subspaces=3).eval()
    attention = module(torch.ones(2, 12, 5, 7)) - 1
    by_subspace = attention.view(2, 3, 4, 5, 7)
    torch.testing.assert_close(by_subspace, by_subspace[:, :, :1].expand_as(by_subspace), rtol=0, atol=1e-6)
    torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 12), rtol=1e-5, atol=1e-5)


def test_it_serves_as_attention_layer_of_timm():
    model = timm.create_model("resnet18", block_args={"attn_layer": ULSAM})
    assert sum(isinstance(module, ULSAM) for module in model.modules()) == 8
    model(torch.randn(2, 3, 33, 65)).square().mean().backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


@pytest.mark.parametrize("number", [0, 5])
def test_channels_that_the_subspaces_do_not_divide_are_refused(number):
    with pytest.raises(ValueError, match=f"got dim=64, num_subspaces={number}"):
        ULSAM(64, num_subspaces=number)
