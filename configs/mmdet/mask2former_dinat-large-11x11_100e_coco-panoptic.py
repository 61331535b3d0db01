# Mask2Former on dinat_large_384_11x11, 100 epochs, COCO panoptic, 16 GPUs of 1 image.
# Expected, as published: PQ 58.5.
# Source: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
# python tools/mm_train.py configs/mmdet/mask2former_dinat-large-11x11_100e_coco-panoptic.py
_base_ = "mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic.py"
custom_imports = dict(imports=["visionattn.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionAttn",
        model="dinat_large_384_11x11.in22k",
        pretrained=True,
        out_norm=1e-5,
        dilations="mask2former_coco",
    ),
    panoptic_head=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys=dict(
            backbone=dict(lr_mult=0.1),
            rpb=dict(lr_mult=0.1, decay_mult=0.0),
            query_embed=dict(decay_mult=0.0),
            query_feat=dict(decay_mult=0.0),
            level_embed=dict(decay_mult=0.0),
        ),
        norm_decay_mult=0.0,
    )
)
