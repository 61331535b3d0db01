# UPerNet on mala_tiny, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Untrained: the schedule is the authors', their result stands in the paper alone, and none has been measured.
# Source: https://github.com/qhfan/MALA
# python tools/mm_train.py configs/mmseg/upernet_mala-tiny_160k_ade20k-512x512.py
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="mala_tiny",
        pretrained=True,
        drop_path_rate=0.1,
        out_norm=1e-6,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
