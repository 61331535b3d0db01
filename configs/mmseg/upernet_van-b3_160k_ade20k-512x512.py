# UPerNet on van_b3, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Expected, as published: mIoU 50.6 at several scales, 75M parameters, 1030 GFLOPs at 2048x512.
# Source: https://github.com/Visual-Attention-Network/VAN-Segmentation
# python tools/mm_train.py configs/mmseg/upernet_van-b3_160k_ade20k-512x512.py
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="van_b3",
        pretrained=True,
        drop_path_rate=0.3,
        norm_eps=1e-5,
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
