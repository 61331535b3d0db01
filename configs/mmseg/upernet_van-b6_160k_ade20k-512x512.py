# UPerNet on van_b6, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Expected, as published: mIoU 54.7 at several scales (ImageNet-22k), 231M parameters, 1658 GFLOPs at 2048x512.
# Source: https://github.com/Visual-Attention-Network/VAN-Segmentation
# python tools/mm_train.py configs/mmseg/upernet_van-b6_160k_ade20k-512x512.py
# The weights are not at a public address: put the file of the authors at checkpoints/van_b6.pth.
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="van_b6",
        pretrained="checkpoints/van_b6.pth",
        drop_path_rate=0.5,
        norm_eps=1e-5,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
