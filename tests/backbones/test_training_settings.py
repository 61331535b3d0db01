"""Stochastic depth and fresh weights are those that the authors trained with."""

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn


# Rate of the last block, blocks, and paths of a block that have a module of their own.
@pytest.mark.parametrize(
    ("name", "rate", "blocks", "paths"),
    [
        ("biformer_small", 0.15, 30, 2),
        ("biformer_stl", 0.1, 12, 2),
        ("van_b0", 0.1, 13, 1),
        ("van_b1", 0.1, 10, 1),
        ("van_b2", 0.1, 21, 1),
        ("van_b3", 0.2, 38, 1),
        ("davit_tiny_va", 0.1, 12, 2),
        ("davit_small_va", 0.1, 24, 2),
        ("davit_base_va", 0.1, 24, 2),
    ],
)
def test_stochastic_depth_grows_linearly_to_the_authors_rate(name, rate, blocks, paths):
    model = timm.create_model(name, device="meta")
    rates = [x.drop_prob for x in model.modules() if isinstance(x, DropPath)]
    # The first block has none.
    assert rates == pytest.approx([rate * i / (blocks - 1) for i in range(1, blocks) for _ in range(paths)])


def fan_out(conv: nn.Conv2d) -> float:
    """Deviation of a normal distribution by what a channel of the input reaches."""
    return math.sqrt(2 / (math.prod(conv.kernel_size) * conv.out_channels / conv.groups))


def default(conv: nn.Conv2d) -> float:
    """Deviation of torch's uniform distribution."""
    return 1 / math.sqrt(3 * math.prod(conv.kernel_size) * conv.in_channels / conv.groups)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [("biformer_tiny", default), ("biformer_stl", default), ("davit_tiny_va", default), ("van_b0", fan_out)],
)
def test_weights_are_drawn_as_the_authors_draw_them(name, deviation):
    torch.manual_seed(0)
    for label, module in timm.create_model(name).named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            wanted = 0.02 if isinstance(module, nn.Linear) else deviation(module)
            # Five deviations of the estimate of independent normal numbers, and one percent as they hardly are.
            allowed = 0.01 + 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(wanted, rel=allowed), label
            zero = isinstance(module, nn.Linear) or deviation is fan_out
            assert module.bias is None or zero != bool(module.bias.any()), label
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all(), label
            assert not module.bias.any(), label
        elif hasattr(module, "layer_scale_1"):
            assert (torch.cat([module.layer_scale_1, module.layer_scale_2]) == 0.01).all(), label


@pytest.mark.parametrize(("ours", "theirs"), [("halonet26t_va", "halonet26t"), ("davit_tiny_va", "davit_tiny")])
def test_weights_of_timms_designs_are_drawn_as_timm_draws_them(ours, theirs):
    drawn = []
    for name in (ours, theirs):
        torch.manual_seed(0)
        drawn.append(timm.create_model(name).state_dict())
    assert all(torch.equal(drawn[0][name], x) for name, x in drawn[1].items())
