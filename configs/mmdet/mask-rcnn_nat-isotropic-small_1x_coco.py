# Mask R-CNN on nat_isotropic_small, 1x schedule, COCO, 8 GPUs of 2 images.
# Untrained: no result of this model is published or has been measured.
# Source: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
# python tools/mm_train.py configs/mmdet/mask-rcnn_nat-isotropic-small_1x_coco.py
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["visionattn.openmmlab", "mmseg.models.necks"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="nat_isotropic_small",
    ),
    # All maps of the backbone have a 16th of the image's sides; mmseg's neck brings them to a 4th, an 8th and a 32nd.
    neck=[
        dict(type="mmseg.Feature2Pyramid", embed_dim=384, rescales=[4, 2, 1, 0.5], norm_cfg=dict(type="SyncBN")),
        dict(type="FPN", in_channels=[384, 384, 384, 384], out_channels=256, num_outs=5),
    ],
)
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=None,
)
