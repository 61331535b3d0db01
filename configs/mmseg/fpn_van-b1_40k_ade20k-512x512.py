# Semantic FPN on van_b1, 40k iterations, ADE20K, 8 GPUs of 4 images.
# Expected, as published: mIoU 42.9.
# Source: https://github.com/Visual-Attention-Network/VAN-Segmentation
# python tools/mm_train.py configs/mmseg/fpn_van-b1_40k_ade20k-512x512.py
_base_ = "mmseg::poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="van_b1",
        pretrained=True,
        drop_path_rate=0.2,
        norm_eps=1e-5,
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
