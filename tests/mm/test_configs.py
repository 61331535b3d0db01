"""Every config builds on the packaged bases, fits its backbone, and has the size that its header quotes."""

import re
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from visionattn import openmmlab

ROOT = Path(__file__).parents[2]
CONFIGS = sorted([*ROOT.glob("configs/mmdet/*.py"), *ROOT.glob("configs/mmseg/*.py")])


def build(config: Config):
    """The model on the meta device, without weights."""
    config.model.backbone.pretrained = False
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        return MODELS.build(config.model)


def backbone(path: Path) -> str:
    """The model that a config names, itself or by the config of ours that it inherits."""
    text = path.read_text()
    found = re.search(r'model="([^"]+)"', text)
    return found[1] if found else backbone(path.parent / re.search(r'_base_ = "\./([^"]+)"', text)[1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_and_fits_its_backbone(path):
    text = path.read_text()
    config = Config.fromfile(path)
    assert f"python tools/mm_train.py {path.relative_to(ROOT)}" in text
    assert re.search(r"^# Source: https://", text, re.M)
    assert re.search(r"^# (Expected, as published: |Untrained: )", text, re.M)
    model = build(config)
    channels = model.backbone.out_channels
    necks = config.model.get("neck") or []
    parts = [
        *(necks if isinstance(necks, list) else [necks]),
        config.model.get("panoptic_head"),
        config.model.get("decode_head"),
    ]
    assert list(next(part for part in parts if part and "in_channels" in part).in_channels) == channels
    if "auxiliary_head" in config.model:
        assert config.model.auxiliary_head.in_channels == channels[2]
    published = re.search(r"([\d.]+)M parameters", text)
    if published:
        count = sum(x.numel() for x in model.parameters()) / 1e6
        # Authors round to whole millions, some of them downwards.
        assert abs(count - float(published[1])) <= 1.0
    train = config.train_dataloader.dataset
    assert train.get("dataset", train).pipeline


def test_families_with_published_results_have_the_heads_of_their_papers():
    heads = {(path.name.split("_")[0], timm.get_pretrained_cfg(backbone(path)).architecture) for path in CONFIGS}
    assert {("mask-rcnn", "nat_mini"), ("cascade-mask-rcnn", "dinat_large"), ("upernet", "dinat_large")} <= heads
    assert {("retinanet", "davit_tiny_va"), ("fpn", "van_b0"), ("mask2former", "dinat_large_384_11x11")} <= heads
    assert {("cascade-mask-rcnn", "mala_base"), ("fpn", "mala_tiny"), ("retinanet", "l2vit_base")} <= heads
    pyramids = ("nat", "dinat", "dinat_s", "biformer", "halonet", "mala", "l2vit", "van", "davit", "ela", "ulsam")
    pyramids += ("agent_pvt", "agent_swin", "inline_pvt", "inline_swin", "nat_isotropic")
    for kinds in (("mask-rcnn",), ("upernet", "fpn")):
        names = [name for head, name in heads if head in kinds]
        assert not [family for family in pyramids if not any(name.startswith(family) for name in names)], kinds


def test_without_a_gpu_a_config_asks_for_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Config.fromfile(ROOT / "configs/mmdet/cascade-mask-rcnn_nat-mini_3x_coco.py")
    before = str(config)
    after = str(openmmlab.fit_to_machine(config))
    for needs_gpu in ("'SyncBN'", "'AmpOptimWrapper'"):
        assert needs_gpu in before
        assert needs_gpu not in after
