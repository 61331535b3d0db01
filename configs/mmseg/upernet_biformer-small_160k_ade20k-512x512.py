# UPerNet on biformer_small, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Expected, as published: mIoU 49.8 at one scale, 50.8 at several.
# Source: https://github.com/rayleizhu/BiFormer
# python tools/mm_train.py configs/mmseg/upernet_biformer-small_160k_ade20k-512x512.py
# The weights are not at a public address: put the file of the authors at checkpoints/biformer_small.pth.
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="biformer_small",
        pretrained="checkpoints/biformer_small.pth",
        drop_path_rate=0.3,
        out_norm=1e-6,
        n_win=8,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=None,
)
