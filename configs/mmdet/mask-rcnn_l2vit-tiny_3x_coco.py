# Mask R-CNN on l2vit_tiny, 3x schedule, COCO, 8 GPUs of 2 images.
# Untrained: the schedule is the authors', their result stands in the paper alone, and none has been measured.
# Source: https://github.com/ChuanyangZheng/L2ViT
# python tools/mm_train.py configs/mmdet/mask-rcnn_l2vit-tiny_3x_coco.py
_base_ = "./mask-rcnn_l2vit-tiny_1x_coco.py"

model = dict(backbone=dict(drop_path_rate=0.2))
max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
