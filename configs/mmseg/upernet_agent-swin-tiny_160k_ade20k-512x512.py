# UPerNet on agent_swin_tiny, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Expected, as published: mIoU 46.68, 61M parameters, 954 GFLOPs at 2048x512.
# Source: https://github.com/LeapLabTHU/Agent-Attention
# python tools/mm_train.py configs/mmseg/upernet_agent-swin-tiny_160k_ade20k-512x512.py
# The weights are not at a public address: put the file of the authors at checkpoints/agent_swin_tiny.pth.
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="agent_swin_tiny",
        pretrained="checkpoints/agent_swin_tiny.pth",
        drop_path_rate=0.3,
        out_norm=1e-5,
        agent_shapes="dense",
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
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
