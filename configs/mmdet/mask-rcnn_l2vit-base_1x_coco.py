# Mask R-CNN on l2vit_base, 1x schedule, COCO, 8 GPUs of 2 images.
# Untrained: the schedule is the authors', their result stands in the paper alone, and none has been measured.
# Source: https://github.com/ChuanyangZheng/L2ViT
# python tools/mm_train.py configs/mmdet/mask-rcnn_l2vit-base_1x_coco.py
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="l2vit_base.in1k",
        pretrained=True,
        drop_path_rate=0.2,
        out_norm=1e-5,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=None,
)
