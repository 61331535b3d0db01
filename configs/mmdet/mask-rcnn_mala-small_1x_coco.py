# Mask R-CNN on mala_small, 1x schedule, COCO, 8 GPUs of 2 images.
# Untrained: the schedule is the authors', their result stands in the paper alone, and none has been measured.
# Source: https://github.com/qhfan/MALA
# python tools/mm_train.py configs/mmdet/mask-rcnn_mala-small_1x_coco.py
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="mala_small",
        pretrained=True,
        drop_path_rate=0.15,
        out_norm=1e-6,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
