"""What only the neighborhood families have: dilations per task, padding of small maps, the isotropic trunk."""

from itertools import chain

import pytest
import timm
import torch
import torch.nn.functional as F

from visionattn.backbones.dinat_s import DiNATS
from visionattn.backbones.nat import NAT
from visionattn.layers import NeighborhoodAttention


def dilations(model) -> list[list[int]]:
    return [[block.attn.dilation for block in stage.blocks] for stage in model.stages]


def create(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def test_coco_dilations_are_those_of_the_detection_configs():
    model = create("nat_mini", dilations="coco")
    assert dilations(model) == [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]


def test_classification_dilations_reach_over_the_whole_map():
    assert dilations(create("dinat_mini")) == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    assert dilations(create("dinat_large_384")) == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    assert dilations(create("dinat_s_tiny")) == [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]
    assert list(chain(*dilations(create("dinat_isotropic_small")))) == [1, 2] * 6


def test_the_large_presets_end_as_the_authors_wrote_them():
    model = create("dinat_large", dilations="ade20k_640")
    assert dilations(model)[2] == [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5]
    model.set_dilations("mask2former_coco")
    assert dilations(model)[2] == [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3]


@pytest.mark.parametrize("family", [NAT, DiNATS])
def test_every_preset_fits_its_family(family):
    model = create("nat_tiny" if family is NAT else "dinat_s_small")
    for preset in family.presets:
        model.set_dilations(preset)


def test_dilations_may_change_after_construction_without_touching_weights():
    model = timm.create_model("test_nat").eval()
    x = torch.randn(1, 3, 96, 96)
    before = model(x)
    model.set_dilations(((1, 3), (1, 2), 1, 1))
    assert not torch.equal(model(x), before)
    model.set_dilations(1)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("cityscapes", "must be one of .*'coco'.* got 'cityscapes'"),
        ((1, 2, 3), "a pattern for each of 4 stages, got"),
        ((1, 2, 3, ()), r"whole numbers of at least 1, got \(\)"),
        ((1, 2, 3, (1, 0)), r"got \(1, 0\)"),
        ((1, 2, 3, (1.5,)), r"got \(1\.5,\)"),
    ],
)
def test_dilations_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        create("test_nat", dilations=wrong)


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="dilation"):
        create("test_nat", dilation=2)


def test_a_small_map_is_padded_before_the_projection_and_attends_to_the_padding():
    torch.manual_seed(0)
    attn = NeighborhoodAttention(16, 2, kernel_size=7, dilation=2).double()
    x = torch.randn(2, 9, 15, 16, dtype=torch.float64)
    padded = attn(F.pad(x, (0, 0, 0, 0, 0, 5)))
    torch.testing.assert_close(attn(x), padded[:, :9], rtol=1e-12, atol=1e-12)
    assert padded.shape == (2, 14, 15, 16)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="got dim=30, num_heads=4"):
        NeighborhoodAttention(30, 4)


def test_global_attention_at_the_training_size_is_dense_attention_with_the_bias():
    torch.manual_seed(0)
    model = timm.create_model("test_isotropic_vitrpb").double().eval()
    attn = model.stages[0].blocks[0].attn
    x = torch.randn(1, 10, 10, 32, dtype=torch.float64)
    q, k, v = attn.qkv(x).view(100, 3, 2, 16).permute(1, 2, 0, 3)
    place = torch.arange(10)
    offset = place - place[:, None] + 9  # [query, key]
    bias = attn.rpb[:, offset[:, None, :, None], offset[None, :, None, :]].reshape(2, 100, 100)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(0, 1).reshape(1, 10, 10, 32)
    torch.testing.assert_close(attn(x), attn.proj(out), rtol=1e-12, atol=1e-12)
