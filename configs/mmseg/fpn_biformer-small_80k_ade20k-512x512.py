# Semantic FPN on biformer_small, 80k iterations, ADE20K, 8 GPUs of 4 images.
# Expected, as published: mIoU 48.9.
# Source: https://github.com/rayleizhu/BiFormer
# python tools/mm_train.py configs/mmseg/fpn_biformer-small_80k_ade20k-512x512.py
# The weights are not at a public address: put the file of the authors at checkpoints/biformer_small.pth.
_base_ = "mmseg::poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="biformer_small",
        pretrained="checkpoints/biformer_small.pth",
        drop_path_rate=0.15,
        out_norm=1e-6,
        n_win=8,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_cfg = dict(max_iters=80000)
param_scheduler = [dict(type="CosineAnnealingLR", begin=0, end=80000, eta_min=0.0, by_epoch=False)]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    paramwise_cfg=None,
)
