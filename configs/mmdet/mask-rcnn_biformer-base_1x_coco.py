# Mask R-CNN on biformer_base, 1x schedule, COCO, 8 GPUs of 2 images.
# Expected, as published: box AP 48.6, mask AP 43.7.
# Source: https://github.com/rayleizhu/BiFormer
# python tools/mm_train.py configs/mmdet/mask-rcnn_biformer-base_1x_coco.py
# The weights are not at a public address: put the file of the authors at checkpoints/biformer_base.pth.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="biformer_base",
        pretrained="checkpoints/biformer_base.pth",
        drop_path_rate=0.3,
        out_norm=1e-6,
        n_win=16,
        norm_eval=True,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
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
