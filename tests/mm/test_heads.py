"""Each kind of head of the configs takes a training step and sends gradients to the whole backbone."""

import pytest
import test_configs
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

from visionattn.openmmlab import fit_to_machine

SIZE = 64


def small(stem: str, name: str, folder: str):
    """The model of a config on a backbone for tests, with fewer regions to look at."""
    config = fit_to_machine(Config.fromfile(test_configs.ROOT / "configs" / folder / f"{stem}.py"))
    init_default_scope(config.default_scope)
    indices = config.model.backbone.get("out_indices", (0, 1, 2, 3))
    backbone = {"type": "VisionAttn", "model": name, "out_indices": indices}
    channels = MODELS.build(backbone).out_channels
    model = config.model
    model.backbone = backbone
    for part in (model.get("neck"), model.get("panoptic_head")):
        if part and "in_channels" in part:
            part.in_channels = channels
    if "roi_head" in model:
        model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
        for stage in [model.train_cfg.rcnn] if "sampler" in model.train_cfg.rcnn else model.train_cfg.rcnn:
            stage.sampler.num = 16
    model.data_preprocessor.pop("batch_augments", None)  # it pads to 1024x1024
    if model.type == "EncoderDecoder":
        model.data_preprocessor.size = (SIZE, SIZE)
    if "auxiliary_head" in model:
        model.decode_head.update(in_channels=channels, channels=64)
        model.auxiliary_head.in_channels = channels[2]
    return MODELS.build(model).train()


def samples(default_scope: str) -> list:
    """Two pictures with a square of class 1 each, as instances, as their mask, and as classes of pixels."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmseg.structures import SegDataSample

    square = torch.zeros(SIZE, SIZE, dtype=torch.long)
    square[8:40, 16:56] = 1
    meta = {"img_shape": (SIZE, SIZE), "ori_shape": (SIZE, SIZE), "pad_shape": (SIZE, SIZE), "scale_factor": (1, 1)}
    made = []
    for _ in range(2):
        if default_scope == "mmseg":
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=square[None])
        else:
            sample = DetDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(sem_seg=square[None])
            box, mask = torch.tensor([[16.0, 8, 56, 40]]), BitmapMasks(square[None].numpy(), SIZE, SIZE)
            sample.gt_instances = InstanceData(bboxes=box, labels=torch.tensor([1]), masks=mask)
            sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        made.append(sample)
    return made


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("mmdet/mask-rcnn_biformer-small_1x_coco", "test_biformer"),
        ("mmdet/cascade-mask-rcnn_agent-swin-tiny_1x_coco", "test_agent_swin"),
        ("mmdet/retinanet_van-b2_1x_coco", "test_van"),
        ("mmdet/mask2former_dinat-large-11x11_100e_coco-panoptic", "test_dinat"),
        ("mmseg/upernet_nat-mini_160k_ade20k-512x512", "test_nat"),
        ("mmseg/fpn_agent-pvt-tiny_40k_ade20k-512x512", "test_agent_pvt"),
    ],
    ids=lambda value: value.split("_")[0],
)
def test_a_training_step_reaches_every_parameter_of_the_backbone(stem, name):
    torch.manual_seed(0)
    folder, stem = stem.split("/")
    model = small(stem, name, folder)
    pictures = [torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in range(2)]
    batch = model.data_preprocessor({"inputs": pictures, "data_samples": samples(folder)}, training=True)
    total, named = model.parse_losses(model(**batch, mode="loss"))
    assert len(named) > 1
    assert all(torch.isfinite(loss).all() for loss in named.values())
    total.backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
