"""Our backbones in other libraries, and theirs on our operators.

torchvision's detector, transformers' TimmBackbone and Dinat, segmentation_models_pytorch.
"""

import sys

import pytest
import timm
import torch
from golden import fill, image
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import visionattn  # noqa: F401  (registers the models)


class Pyramid(nn.Module):
    """A backbone with torchvision's feature pyramid: image (B, 3, H, W) to named maps of 64 channels."""

    out_channels = 64

    def __init__(self, name: str):
        super().__init__()
        self.body = timm.create_model(name, features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(x))})


def test_torchvision_trains_and_detects():
    torch.manual_seed(0)
    names = ["0", "1", "2", "3"]
    model = MaskRCNN(
        Pyramid("test_nat"),
        num_classes=4,
        min_size=96,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
    )
    masks = torch.zeros(1, 96, 128, dtype=torch.uint8)
    masks[:, 20:60, 30:80] = 1
    target = {"boxes": torch.tensor([[30.0, 20, 80, 60]]), "labels": torch.tensor([2]), "masks": masks}
    losses = model([torch.linspace(0, 1, 3 * 96 * 128).view(3, 96, 128)], [target])
    assert {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"} == losses.keys()
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.backbone.parameters())
    detections = model.eval()([torch.rand(3, 97, 127)])[0]
    assert detections["masks"].shape[-2:] == (97, 127)


def test_transformers_takes_it_as_a_backbone():
    from transformers import TimmBackbone, TimmBackboneConfig

    settings = TimmBackboneConfig(backbone="test_nat", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3))
    backbone = TimmBackbone(settings).eval()
    x = torch.randn(1, 3, 65, 97)
    maps = backbone(pixel_values=x).feature_maps
    own = timm.create_model("test_nat", features_only=True).eval()
    # timm's feature net and transformers' wrapper hold the same parameters in the same order.
    own.load_state_dict(dict(zip(own.state_dict(), backbone.state_dict().values(), strict=True)))
    for one, other in zip(maps, own(x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def dinat(monkeypatch):
    """Transformers' module of Dinat, imported where our door stands for NATTEN."""
    from importlib import import_module

    from transformers.utils import import_utils

    from visionattn_kernels import natten_transformers

    for name in ("natten", "natten.functional"):
        monkeypatch.setitem(sys.modules, name, natten_transformers)
    name = "transformers.models.dinat.modeling_dinat"
    monkeypatch.delitem(sys.modules, name, raising=False)
    import_utils.is_natten_available.cache_clear()
    yield import_module(name)
    import_utils.is_natten_available.cache_clear()
    sys.modules.pop(name)


# At 224 px every window fits its map; the other image is padded, and its sides differ.
@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_transformers_unmodified_dinat_runs_on_our_door_and_is_dinat_mini(dinat, size):
    from transformers import DinatConfig

    theirs = dinat.DinatForImageClassification(DinatConfig(num_labels=1000)).eval()
    weights = {name: torch.from_numpy(fill(name, tuple(x.shape))) for name, x in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    overlay = {"state_dict": weights}
    ours = timm.create_model("dinat_mini", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.from_numpy(image(1, 3, *size)).requires_grad_()
    got, want = theirs(pixel_values=x).logits, ours(x)
    assert (got - want).norm() <= 1e-5 * want.norm()
    gradients = [torch.autograd.grad(logits.square().sum(), x)[0] for logits in (got, want)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


def test_segmentation_models_takes_it_as_an_encoder():
    import segmentation_models_pytorch

    torch.manual_seed(0)
    model = segmentation_models_pytorch.FPN("tu-test_nat", encoder_weights=None, classes=3)
    logits = model(torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, 3, 64, 96)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
