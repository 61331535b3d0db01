# Semantic FPN on agent_pvt_large, 40k iterations, ADE20K, 8 GPUs of 4 images.
# Expected, as published: mIoU 46.52, 52M parameters.
# Source: https://github.com/LeapLabTHU/Agent-Attention
# python tools/mm_train.py configs/mmseg/fpn_agent-pvt-large_40k_ade20k-512x512.py
# The weights are not at a public address: put the file of the authors at checkpoints/agent_pvt_large.pth.
_base_ = "mmseg::poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="agent_pvt_large",
        pretrained="checkpoints/agent_pvt_large.pth",
        agent_shapes="dense",
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
param_scheduler = [dict(type="PolyLR", power=0.9, begin=0, end=40000, eta_min=0.0, by_epoch=False)]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    paramwise_cfg=None,
)
