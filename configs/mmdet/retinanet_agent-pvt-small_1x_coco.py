# RetinaNet on agent_pvt_small, 1x schedule, COCO, 8 GPUs of 2 images.
# Expected, as published: box AP 44.1, 30M parameters.
# Source: https://github.com/LeapLabTHU/Agent-Attention
# python tools/mm_train.py configs/mmdet/retinanet_agent-pvt-small_1x_coco.py
# The weights are not at a public address: put the file of the authors at checkpoints/agent_pvt_small.pth.
_base_ = "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="agent_pvt_small",
        pretrained="checkpoints/agent_pvt_small.pth",
        out_indices=(1, 2, 3),
        agent_shapes="dense",
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
