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


def answers(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits, then the features of strides 4 to 32."""
    last, features = model.forward_intermediates(x)
    return [model.forward_head(last), *features[-4:]]


def with_weights_of_timm(name: str, **kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Timm's model with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, zero_init_last=False, **kwargs).eval()
    overlay = {"state_dict": theirs.state_dict()}
    return theirs, timm.create_model(f"{name}_va", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    """The operator sums in another order: a few roundings in each of some 50 layers."""
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("name", TIMM)
def test_checkpoints_of_timm_give_the_answers_of_timm(name):
    theirs, ours = with_weights_of_timm(name)
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert_close(answers(ours, x), answers(theirs, x))


def pad_and_crop(attention: HaloAttn, x: torch.Tensor, forward=HaloAttn.forward) -> torch.Tensor:
    """Timm's attention on a map that goes on with zeros to whole blocks."""
    sides = [-(-side // attention.block_stride) for side in x.shape[2:]]
    lacks = [-side % attention.block_size for side in x.shape[2:]]
    return forward(attention, F.pad(x, (0, lacks[1], 0, lacks[0])))[:, :, : sides[0], : sides[1]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_norm_behind_attention_has_the_gradient_of_a_single_image_in_any_layout(memory_format):
    attention = HaloAttention(16, num_heads=2, block_size=8, halo_size=3).double()
    norm = torch.nn.BatchNorm2d(16, affine=False).double().eval()
    with torch.no_grad():
        x = attention(torch.randn(1, 16, 12, 9, dtype=torch.float64))
    grad = torch.randn(x.shape, dtype=torch.float64).to(memory_format=memory_format)
    x.requires_grad_()
    norm(x).backward(grad)
    torch.testing.assert_close(x.grad, grad * (1 + norm.eps) ** -0.5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 512), (224, 192)], ids=["as timm runs it", "padded for timm"])
@pytest.mark.parametrize("name", TIMM)
def test_at_other_sizes_the_answers_and_gradients_are_those_of_timm(name, size, monkeypatch):
    if size == (224, 192):
        monkeypatch.setattr(HaloAttn, "forward", pad_and_crop)
    # Only global attention has tables of that size.
    results = []
    for model in with_weights_of_timm(name, img_size=size):
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        got = answers(model, x)
        got[0].square().sum().backward()
        results.append(([y.detach() for y in got], x.grad))
    assert_close(results[1][0], results[0][0])
    assert_close([results[1][1]], [results[0][1]], tolerance=1e-4)


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
