"""What only BiFormer has: regions that may be chosen anew, and padding to them."""

import pytest
import timm
import torch

from visionattn.backbones.biformer import RoutingAttention


def regions(model) -> list[tuple[int, int]]:
    attentions = [stage.blocks[0].attn for stage in model.stages]
    return [(attn.n_win, attn.topk) for attn in attentions if isinstance(attn, RoutingAttention)]


def create(**kwargs):
    return timm.create_model("test_biformer", **kwargs)


def test_regions_of_the_dense_tasks_are_an_argument_and_a_method():
    model = timm.create_model("biformer_tiny", device="meta", n_win=16)
    assert regions(model) == [(16, 1), (16, 4), (16, 16)]
    model.set_regions(n_win=8)
    assert regions(model) == [(8, 1), (8, 4), (8, 16)]
    model.set_regions(topk=(2, 3, 4, None))
    assert regions(model) == [(8, 2), (8, 3), (8, 4)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_win": 1}, r"topk must be between 1 and n_win \*\* 2, got topk=2, n_win=1"),
        ({"n_win": 0}, r"got topk=1, n_win=0"),
        ({"topk": (1, 2, 10, None)}, r"got topk=10, n_win=3"),
        ({"topk": (1, 2, 0, None)}, r"got topk=0, n_win=3"),
    ],
)
def test_regions_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        create(**wrong)


@pytest.mark.parametrize("topk", [(1, 2, 4), (1, 2, 4, 4), (1, None, 4, None)])
def test_a_stage_does_not_change_between_regions_and_all_tokens(topk):
    with pytest.raises(ValueError, match="a number for each of 4 stages with regions"):
        create().set_regions(topk=topk)


def test_maps_that_the_regions_do_not_divide_are_padded_or_refused():
    torch.manual_seed(0)
    model, uneven, even = create().eval(), torch.randn(1, 3, 97, 64), torch.randn(1, 3, 96, 96)
    padded, whole = model(uneven), model(even)
    model.set_regions(auto_pad=False)
    assert torch.equal(model(even), whole)
    with pytest.raises(ValueError, match="height and width must be multiples of 3, got 25x16"):
        model(uneven)
    model.set_regions(n_win=4)
    with pytest.raises(ValueError, match="multiples of 4, got 25x16"):
        model(uneven)
    model.set_regions(n_win=3, auto_pad=True)
    assert torch.equal(model(uneven), padded)
    with pytest.raises(ValueError, match="multiples of 3, got 24x25"):
        create(auto_pad=False)(torch.randn(1, 3, 96, 97))


def test_attention_to_every_region_is_attention_to_every_token():
    torch.manual_seed(0)
    attn = RoutingAttention(16, 2, n_win=2, topk=4).double()
    x = torch.randn(1, 6, 8, 16, dtype=torch.float64)
    query, key, value = attn.qkv(x).view(48, 3, 2, 8).permute(1, 2, 0, 3)
    out = (query @ key.transpose(1, 2) * 16**-0.5).softmax(-1) @ value
    lepe = attn.lepe(value.transpose(0, 1).reshape(1, 6, 8, 16))
    want = attn.proj(out.transpose(0, 1).reshape(1, 6, 8, 16) + lepe)
    torch.testing.assert_close(attn(x), want, rtol=1e-12, atol=1e-12)


def test_no_gradient_passes_the_choice_of_regions():
    torch.manual_seed(0)
    attn = RoutingAttention(8, 1, n_win=2, topk=1).double()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    # Finite differences see the choice as fixed too, as long as it does not flip.
    assert torch.autograd.gradcheck(attn, x.requires_grad_(), eps=1e-7)


def test_patches_of_swins_layout_leave_out_what_does_not_fill_one():
    torch.manual_seed(0)
    model = timm.create_model("test_biformer_stl").eval()
    x = torch.randn(1, 3, 71, 66)
    # 71 and 66 pixels are 17 and 16 patches, which are 8 and 8 in the next stage.
    whole, cut = (model.forward_intermediates(y, intermediates_only=True) for y in (x, x[:, :, :68, :64]))
    assert [feature.shape[2:] for feature in whole] == [(17, 16), (8, 8), (4, 4), (2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_a_map_smaller_than_a_patch_is_filled_with_zeros():
    torch.manual_seed(0)
    model = timm.create_model("test_biformer_stl").eval()
    x = torch.randn(1, 3, 3, 34)
    assert torch.equal(model(x), model(torch.nn.functional.pad(x, (0, 0, 0, 1))))
