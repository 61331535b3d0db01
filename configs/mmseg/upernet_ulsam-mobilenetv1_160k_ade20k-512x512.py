# UPerNet on ulsam_mobilenetv1, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Untrained: no result of this model is published or has been measured.
# Source: https://github.com/Nandan91/ULSAM
# python tools/mm_train.py configs/mmseg/upernet_ulsam-mobilenetv1_160k_ade20k-512x512.py
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="ulsam_mobilenetv1",
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=None,
)
