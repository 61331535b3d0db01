# UPerNet on dinat_small, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Expected, as published: mIoU 48.9 at one scale, 49.9 at several, 82M parameters, 1010 GFLOPs at 2048x512.
# Source: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
# python tools/mm_train.py configs/mmseg/upernet_dinat-small_160k_ade20k-512x512.py
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="dinat_small",
        pretrained=True,
        drop_path_rate=0.5,
        out_norm=1e-5,
        dilations="ade20k",
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
)
