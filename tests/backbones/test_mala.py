"""What only MALA has: files of detectors without its head, and scales that weight decay reaches."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import Golden, difference, fill, image, probe

GOLDEN = Path(__file__).parents[1] / "golden"


def authors_norm(feature: torch.Tensor, index: int) -> torch.Tensor:
    """The norm that the authors' detector puts on a feature."""
    channels = (feature.shape[1],)
    weight, bias = (torch.from_numpy(fill(f"extra_norms.{index}.norm.{kind}", channels)) for kind in ("weight", "bias"))
    return F.layer_norm(feature.permute(0, 2, 3, 1), channels, weight, bias, 1e-6).permute(0, 3, 1, 2)


def test_dense_outputs_are_those_of_the_authors_detector():
    golden = Golden.load(GOLDEN / "mala_tiny.dense.192x256.npz")
    overlay = {"state_dict": golden.state_dict()}
    model = timm.create_model("mala_tiny", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    x = torch.from_numpy(image(*golden.input_shape)).requires_grad_()
    features = [authors_norm(feature, i) for i, feature in enumerate(model(x))]
    for i, feature in enumerate(features):
        assert list(feature.shape) == golden.meta["shapes"][f"feature_{i}"]
        assert difference(feature.detach().numpy(), golden.outputs[f"feature_{i}"]) <= 1e-5
    means = torch.cat([feature.mean((2, 3)) for feature in features], 1)
    (means.flatten() * torch.from_numpy(probe(means.numel()))).sum().backward()
    assert difference(means.detach().numpy(), golden.outputs["logits"]) <= 1e-5
    assert difference(x.grad.numpy(), golden.outputs["grad_input"]) <= 1e-4


def test_the_authors_table_of_angles_is_dropped_and_a_head_of_another_width_refused():
    golden = Golden.load(GOLDEN / "mala_tiny.npz")
    weights = golden.state_dict() | {f"layers.{i}.RoPE.angle": torch.ones(32) for i in range(4)}
    overlay = {"state_dict": {"model": weights}}
    model = timm.create_model("mala_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.proj.weight, weights["proj.weight"])
    weights["proj.weight"] = weights["proj.weight"][:1024]
    with pytest.raises(RuntimeError, match=r"head\.proj\.weight"):
        timm.create_model("mala_tiny", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_head_that_cannot_be_turned_by_rows_and_columns_is_refused():
    with pytest.raises(ValueError, match="got 18 channels, 3 heads"):
        timm.create_model("test_mala", dims=(18, 32, 48, 64), num_heads=(3, 2, 3, 4))
