# Cascade Mask R-CNN on agent_swin_tiny, 3x schedule, COCO, 8 GPUs of 2 images.
# Expected, as published: box AP 51.4, mask AP 44.5, 86M parameters, 755 GFLOPs.
# Source: https://github.com/LeapLabTHU/Agent-Attention
# python tools/mm_train.py configs/mmdet/cascade-mask-rcnn_agent-swin-tiny_3x_coco.py
# The weights are not at a public address: put the file of the authors at checkpoints/agent_swin_tiny.pth.
_base_ = "./cascade-mask-rcnn_agent-swin-tiny_1x_coco.py"

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
