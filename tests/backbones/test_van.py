"""What only VAN has: features behind norms of their own, and a second dialect of names."""

import re
from pathlib import Path

import timm
import torch
from golden import Golden, difference, image, probe

GOLDEN = Path(__file__).parents[1] / "golden"


def test_dense_outputs_are_those_of_the_authors_segmenter():
    golden = Golden.load(GOLDEN / "van_b0.dense.256x320.npz")
    overlay = {"state_dict": golden.state_dict()}
    model = timm.create_model(
        "van_b0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, norm_eps=1e-5
    ).eval()
    x = torch.from_numpy(image(*golden.input_shape)).requires_grad_()
    features = model.forward_intermediates(x, intermediates_only=True)
    for i, feature in enumerate(features):
        assert list(feature.shape) == golden.meta["shapes"][f"feature_{i}"]
        assert difference(feature.detach().numpy(), golden.outputs[f"feature_{i}"]) <= 1e-5
    means = torch.cat([feature.mean((2, 3)) for feature in features], 1)
    (means.flatten() * torch.from_numpy(probe(means.numel()))).sum().backward()
    assert difference(means.detach().numpy(), golden.outputs["logits"]) <= 1e-5
    assert difference(x.grad.numpy(), golden.outputs["grad_input"]) <= 1e-3


def mmpretrain_name(name: str) -> str:
    """The name that mmpretrain gives to a parameter of the authors."""
    if name.startswith("head."):
        return name.replace("head.", "head.fc.")
    name = re.sub(r"^(patch_embed\d)\.proj\.", r"\1.projection.", name)
    name = re.sub(r"^block(\d)\.", r"blocks\1.", name)
    name = name.replace("gating_unit.conv0.", "gating_unit.DW_conv.").replace("conv_spatial.", "DW_D_conv.")
    return "backbone." + name.replace("dwconv.dwconv.", "dwconv.")


def test_checkpoints_of_mmpretrain_load_like_the_authors():
    authors = Golden.load(GOLDEN / "van_b0.npz").state_dict()
    theirs = {"state_dict": {mmpretrain_name(name): x for name, x in authors.items()}}
    ours, other = (
        timm.create_model("van_b0", pretrained=True, pretrained_cfg_overlay={"state_dict": weights}).state_dict()
        for weights in (authors, theirs)
    )
    assert all(torch.equal(ours[name], other[name]) for name in ours)
