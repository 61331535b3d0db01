# Mask R-CNN on ela_b_resnet50, 1x schedule, COCO, 8 GPUs of 2 images.
# Untrained: no result of this model is published or has been measured.
# Source: https://arxiv.org/abs/2403.01123
# python tools/mm_train.py configs/mmdet/mask-rcnn_ela-b-resnet50_1x_coco.py
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="ela_b_resnet50",
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
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
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=None,
)
