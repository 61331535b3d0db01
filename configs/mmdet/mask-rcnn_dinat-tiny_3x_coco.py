# Mask R-CNN on dinat_tiny, 3x schedule, COCO, 8 GPUs of 2 images.
# Expected, as published: box AP 48.6, mask AP 43.5, 48M parameters, 258 GFLOPs.
# Source: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
# python tools/mm_train.py configs/mmdet/mask-rcnn_dinat-tiny_3x_coco.py
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="dinat_tiny",
        pretrained=True,
        drop_path_rate=0.2,
        out_norm=1e-5,
        dilations="coco",
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
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
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
)
