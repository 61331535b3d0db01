# RetinaNet on l2vit_base, 1x schedule, COCO, 8 GPUs of 2 images.
# Untrained: the schedule is the authors', their result stands in the paper alone, and none has been measured.
# Source: https://github.com/ChuanyangZheng/L2ViT
# python tools/mm_train.py configs/mmdet/retinanet_l2vit-base_1x_coco.py
_base_ = "./retinanet_l2vit-tiny_1x_coco.py"

model = dict(
    backbone=dict(model="l2vit_base.in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[256, 512, 1024]),
)
