# RetinaNet on l2vit_small, 1x schedule, COCO, 8 GPUs of 2 images.
# Untrained: the schedule is the authors', their result stands in the paper alone, and none has been measured.
# Source: https://github.com/ChuanyangZheng/L2ViT
# python tools/mm_train.py configs/mmdet/retinanet_l2vit-small_1x_coco.py
_base_ = "./retinanet_l2vit-tiny_1x_coco.py"

model = dict(backbone=dict(model="l2vit_small"), neck=dict(in_channels=[192, 384, 768]))
