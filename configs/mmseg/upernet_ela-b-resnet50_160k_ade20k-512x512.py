# UPerNet on ela_b_resnet50, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Untrained: no result of this model is published or has been measured.
# Source: https://arxiv.org/abs/2403.01123
# python tools/mm_train.py configs/mmseg/upernet_ela-b-resnet50_160k_ade20k-512x512.py
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="ela_b_resnet50",
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=None,
)
