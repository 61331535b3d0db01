# Mask R-CNN on agent_swin_small, 1x schedule, COCO, 8 GPUs of 2 images.
# Expected, as published: box AP 47.2, mask AP 42.7, 69M parameters, 364 GFLOPs.
# Source: https://github.com/LeapLabTHU/Agent-Attention
# python tools/mm_train.py configs/mmdet/mask-rcnn_agent-swin-small_1x_coco.py
# The weights are not at a public address: put the file of the authors at checkpoints/agent_swin_small.pth.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="agent_swin_small",
        pretrained="checkpoints/agent_swin_small.pth",
        out_norm=1e-5,
        agent_shapes="dense",
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
    paramwise_cfg=dict(
        custom_keys=dict(
            relative_position_bias_table=dict(decay_mult=0.0),
            norm=dict(decay_mult=0.0),
            ah_bias=dict(decay_mult=0.0),
            aw_bias=dict(decay_mult=0.0),
            ha_bias=dict(decay_mult=0.0),
            wa_bias=dict(decay_mult=0.0),
            an_bias=dict(decay_mult=0.0),
            na_bias=dict(decay_mult=0.0),
        )
    ),
)
