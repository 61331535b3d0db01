# Semantic FPN on mala_tiny, 80k iterations, ADE20K, 8 GPUs of 2 images.
# Untrained: the schedule is the authors', their result stands in the paper alone, and none has been measured.
# Source: https://github.com/qhfan/MALA
# python tools/mm_train.py configs/mmseg/fpn_mala-tiny_80k_ade20k-512x512.py
_base_ = "mmseg::poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="mala_tiny",
        pretrained=True,
        drop_path_rate=0.1,
        out_norm=1e-6,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_iters=80000)
param_scheduler = [dict(type="PolyLR", power=0.9, begin=0, end=80000, eta_min=1e-6, by_epoch=False)]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    paramwise_cfg=None,
)
