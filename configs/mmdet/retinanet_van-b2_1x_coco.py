# RetinaNet on van_b2, 1x schedule, COCO, 8 GPUs of 2 images.
# Expected, as published: box AP 44.9.
# Source: https://arxiv.org/abs/2202.09741
# Learning rate, weight decay, stochastic depth and crops are ours: the authors published no code of their detectors.
# python tools/mm_train.py configs/mmdet/retinanet_van-b2_1x_coco.py
_base_ = "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="van_b2",
        pretrained=True,
        out_indices=(1, 2, 3),
        norm_eps=1e-5,
    ),
    neck=dict(in_channels=[128, 320, 512], start_level=0),
)
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    paramwise_cfg=None,
)
