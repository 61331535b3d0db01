# Mask R-CNN on davit_base_va, 3x schedule, COCO, 8 GPUs of 2 images.
# Expected, as published: box AP 49.9, mask AP 44.6.
# Source: https://github.com/dingmyu/davit
# python tools/mm_train.py configs/mmdet/mask-rcnn_davit-base-va_3x_coco.py
_base_ = "./mask-rcnn_davit-base-va_1x_coco.py"

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
