# UPerNet on nat_isotropic_small, 160k iterations, ADE20K, crops of 512, 8 GPUs of 2 images.
# Untrained: no result of this model is published or has been measured.
# Source: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
# python tools/mm_train.py configs/mmseg/upernet_nat-isotropic-small_160k_ade20k-512x512.py
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="nat_isotropic_small",
    ),
    # All maps of the backbone have a 16th of the image's sides; the neck brings them to a 4th, an 8th and a 32nd.
    neck=dict(type="Feature2Pyramid", embed_dim=384, rescales=[4, 2, 1, 0.5], norm_cfg=dict(type="SyncBN")),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=None,
)
