"""timm's designs give timm's answers, the paper's have the paper's size, and any size of the map works."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn

from visionattn.backbones.halonet import GlobalAttention, HaloAttention

PAPER = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h3": 11.8, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}
TIMM = ["halonet26t", "halonet50ts", "sehalonet33ts", "eca_halonext26ts", "halo2botnet50ts_256"]


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_models_have_the_papers_parameters(size):
    model = timm.create_model(f"halonet_{size}_va", device="meta")
    # 43.46 millions are 43.4 in the paper.
    assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(PAPER[size], abs=0.06)


@pytest.mark.parametrize("name", TIMM)
def test_checkpoints_of_timm_give_the_answers_of_timm(name):
    torch.manual_seed(0)
    theirs = timm.create_model(name, zero_init_last=False).eval()
    overlay = {"state_dict": theirs.state_dict()}
    ours = timm.create_model(f"{name}_va", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        want, got = theirs(x), ours(x)
    # The operator sums in another order: a few roundings in each of some 50 layers.
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_map_that_blocks_do_not_divide_goes_on_with_zeros(stride):
    torch.manual_seed(0)
    settings = {"num_heads": 2, "block_size": 4, "halo_size": 1, "stride": stride}
    theirs = HaloAttn(16, **settings).double()
    ours = HaloAttention(16, **settings).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 6, 9, dtype=torch.float64)
    want = theirs(F.pad(x, (0, 3, 0, 2)))[:, :, : -(-6 // stride), : -(-9 // stride)]
    torch.testing.assert_close(ours(x), want, rtol=1e-12, atol=1e-12)


def test_global_attention_beyond_its_tables_takes_their_last_entry():
    torch.manual_seed(0)
    large = GlobalAttention(8, (7, 6), num_heads=2).double()
    small = GlobalAttention(8, (4, 3), num_heads=2).double()
    weights = small.state_dict()
    for name, beyond in (("pos_embed.height_rel", 3), ("pos_embed.width_rel", 3)):
        table = weights[name]
        weights[name] = torch.cat([table[:1].expand(beyond, -1), table, table[-1:].expand(beyond, -1)])
    large.load_state_dict(weights)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(small(x), large(x), rtol=1e-12, atol=1e-12)


def test_blocks_that_the_stride_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of stride, got block_size=7"):
        HaloAttention(16, block_size=7, stride=2)
