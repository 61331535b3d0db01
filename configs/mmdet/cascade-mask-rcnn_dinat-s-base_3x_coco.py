# Cascade Mask R-CNN on dinat_s_base, 3x schedule, COCO, 8 GPUs of 2 images.
# Expected, as published: box AP 52.6, mask AP 45.3.
# Source: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
# python tools/mm_train.py configs/mmdet/cascade-mask-rcnn_dinat-s-base_3x_coco.py
_base_ = "mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="dinat_s_base",
        pretrained=True,
        drop_path_rate=0.5,
        out_norm=1e-5,
        dilations="coco",
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=7.5e-5, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
)
