"""A stand-in for mmcv's compiled extension, `mmcv._ext`, on torchvision's operators.

`mmcv-lite` carries all of mmcv's Python and lacks only that extension. `install` provides it where no compiled one is
found, before anything imports `mmcv.ops`. The functions keep the extension's calling convention: they fill tensors that
mmcv hands over, and mmcv's own autograd functions call forward and backward. Any strides are read rightly. What is not
here raises NotImplementedError when it is called, so that importing mmdet and mmseg works.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable

import mmcv
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

_ops = torch.ops.torchvision


def install() -> str:
    """Provide `mmcv._ext` where it is missing.

    Returns:
        "compiled" where a compiled extension was found, which stays in place, and "torchvision" otherwise.

    Raises:
        ImportError: There is a compiled extension, but it does not load, for instance because it was built for another
            torch.
    """
    try:
        extension = importlib.import_module("mmcv._ext")
    except ModuleNotFoundError as error:
        if error.name != "mmcv._ext":
            raise
    except ImportError as error:
        raise ImportError(
            f"mmcv {mmcv.__version__} has a compiled extension that torch {torch.__version__} cannot load: build it "
            "anew, or replace it by pip install mmcv-lite==2.1.0"
        ) from error
    else:
        return "torchvision" if isinstance(extension, _Extension) else "compiled"
    sys.modules["mmcv._ext"] = mmcv._ext = _Extension()
    return "torchvision"


class _Extension(types.ModuleType):
    """The module that mmcv imports: every name exists, those without a function here raise when called."""

    def __init__(self):
        super().__init__("mmcv._ext", __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
        for function in _PROVIDED:
            setattr(self, function.__name__, function)

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"mmcv's operator {name!r} needs a compiled mmcv; see visionattn.mmcv_ext")

        return missing


def get_compiler_version() -> str:
    """What mmcv prints about its environment."""
    return "none: torchvision's operators"


def get_compiling_cuda_version() -> str:
    """What mmcv prints about its environment."""
    return "none: torchvision's operators"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that no better one overlaps, best first; `offset` 1 counts both end pixels."""
    corners = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
    return _ops.nms(corners.float(), scores.float(), float(iou_threshold))


def _overlaps(first: Tensor, second: Tensor, offset: int, foreground: bool = False) -> Tensor:
    """Intersection over union, or over the area of `first`, of boxes (..., 4) that broadcast."""
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low + offset).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2] + offset).prod(-1) for boxes in (first, second)]
    base = areas[0] if foreground else areas[0] + areas[1] - shared
    return shared / base.clamp(min=offset or torch.finfo(base.dtype).tiny)


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fill `ious` with the overlaps of boxes (N, 4) with (M, 4), pairwise or, if `aligned`, one by one.

    `mode` 0 divides by the union, 1 by the area of the first.
    """
    if not aligned:
        boxes1, boxes2 = boxes1[:, None], boxes2[None]
    ious.copy_(_overlaps(boxes1, boxes2, offset, foreground=mode == 1))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Indices of boxes in the order in which soft suppression picks them; `dets` gets boxes and lowered scores.

    `method` 0 suppresses what overlaps by `iou_threshold`, 1 lowers it linearly, 2 lowers all by a Gaussian of
    variance `sigma`.
    """
    scores, left, kept = scores.clone(), torch.arange(len(boxes), device=boxes.device), []
    while len(left):
        best = scores[left].argmax()
        index = left[best]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[index], scores[index]
        kept.append(index)
        left = torch.cat([left[:best], left[best + 1 :]])
        overlaps = _overlaps(boxes[index], boxes[left], offset)
        if method == 2:
            factors = torch.exp(-overlaps.square() / sigma)
        else:
            factors = torch.where(overlaps >= iou_threshold, 1 - overlaps if method == 1 else 0.0, 1.0)
        scores[left] *= factors
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes with scores (N, 5): each begins with the best left and holds what overlaps it, best first."""
    left, groups = dets[:, 4].argsort(descending=True, stable=True), []
    while len(left):
        overlaps = _overlaps(dets[left[0], :4], dets[left, :4], 0)
        group = (overlaps >= iou_threshold).index_fill(0, left.new_tensor(0), True)
        groups.append(left[group].tolist())
        left = left[~group]
    return groups


def _widened(*tensors: Tensor) -> list[Tensor]:
    """Tensors in float32 instead of bfloat16, which torchvision's operators lack on a CPU."""
    return [x.float() if x.dtype == torch.bfloat16 else x for x in tensors]


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `output` (R, C, h, w) with averages of bilinear samples of a map (B, C, H, W) in regions (R, 5)."""
    _only_average(pool_mode)
    size = (aligned_height, aligned_width)
    input, rois = _widened(input, rois)
    output.copy_(_ops.roi_align(input, rois.to(input), spatial_scale, *size, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `grad_input` (B, C, H, W) with the gradient of `roi_align_forward`."""
    _only_average(pool_mode)
    sizes = (aligned_height, aligned_width, *grad_input.shape)
    grad_output, rois = _widened(grad_output, rois)
    grad = _ops._roi_align_backward(grad_output, rois.to(grad_output), spatial_scale, *sizes, sampling_ratio, aligned)
    grad_input.copy_(grad)


def _only_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("mmcv's operator 'roi_align' with pool_mode 'max' needs a compiled mmcv")


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill `output` (R, C, h, w) and `argmax` with the maxima of a map (B, C, H, W) in cells of regions (R, 5)."""
    input, rois = _widened(input, rois)
    maxima, places = _ops.roi_pool(input, rois.to(input), spatial_scale, pooled_height, pooled_width)
    output.copy_(maxima)
    argmax.copy_(places)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill `grad_input` (B, C, H, W) with the gradient of `roi_pool_forward`."""
    sizes = (pooled_height, pooled_width, *grad_input.shape)
    grad_output, rois = _widened(grad_output, rois)
    grad_input.copy_(_ops._roi_pool_backward(grad_output, rois.to(grad_output), argmax, spatial_scale, *sizes))


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """Sigmoid focal loss (N, classes); a target of `classes` is background, a weight is of the target's class."""
    classes = logits.shape[1]
    positive = F.one_hot(target, classes + 1)[:, :classes].to(logits)
    loss = torchvision.ops.sigmoid_focal_loss(logits, positive, alpha=alpha, gamma=gamma)
    if weight.numel():
        loss = loss * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    return loss


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `output` with the focal loss of logits (N, classes) and targets (N,)."""
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `grad_input` with the gradient of the sum of `sigmoid_focal_loss_forward`."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def deform_conv_forward(
    input,
    weight,
    offset,
    output,
    columns,
    ones,
    kW,
    kH,
    dW,
    dH,
    padW,
    padH,
    dilationW,
    dilationH,
    group,
    deformable_group,
    im2col_step,
) -> None:
    """Fill `output` with the deformable convolution (v1) of a map (B, C, H, W); `offset` (B, 2 k k groups, H', W')."""
    places = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    input, weight, offset = _widened(input, weight, offset)
    no_mask, no_bias = input.new_zeros(len(input), 1), input.new_zeros(len(weight))
    output.copy_(_ops.deform_conv2d(input, weight, offset, no_mask, no_bias, *places, False))


def _deform_conv_gradients(grad, input, weight, offset, *places) -> tuple[Tensor, ...]:
    grad, input, weight, offset = _widened(grad, input, weight, offset)
    no_mask, no_bias = input.new_zeros(len(input), 1), input.new_zeros(len(weight))
    return _ops._deform_conv2d_backward(grad, input, weight, offset, no_mask, no_bias, *places, False)


def deform_conv_backward_input(
    input,
    offset,
    gradOutput,
    gradInput,
    gradOffset,
    weight,
    columns,
    kW,
    kH,
    dW,
    dH,
    padW,
    padH,
    dilationW,
    dilationH,
    group,
    deformable_group,
    im2col_step,
) -> None:
    """Fill `gradInput` and `gradOffset` with the gradients of `deform_conv_forward`."""
    places = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_gradients(gradOutput, input, weight, offset, *places)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(
    input,
    offset,
    gradOutput,
    gradWeight,
    columns,
    ones,
    kW,
    kH,
    dW,
    dH,
    padW,
    padH,
    dilationW,
    dilationH,
    group,
    deformable_group,
    scale,
    im2col_step,
) -> None:
    """Add `scale` times the weight's gradient of `deform_conv_forward` to `gradWeight`."""
    places = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # The gradient of the weight does not depend on the weight, which mmcv does not hand over.
    grads = _deform_conv_gradients(gradOutput, input, torch.zeros_like(gradWeight), offset, *places)
    gradWeight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input,
    weight,
    bias,
    ones,
    offset,
    mask,
    output,
    columns,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    group,
    deformable_group,
    with_bias,
) -> None:
    """Fill `output` with the deformable convolution (v2) of maps weighed by `mask` (B, k k groups, H', W')."""
    places = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    bias = bias if with_bias else input.new_zeros(len(weight))
    input, weight, offset, mask, bias = _widened(input, weight, offset, mask, bias)
    output.copy_(_ops.deform_conv2d(input, weight, offset, mask, bias, *places, True))


def modulated_deform_conv_backward(
    input,
    weight,
    bias,
    ones,
    offset,
    mask,
    columns,
    grad_input,
    grad_weight,
    grad_bias,
    grad_offset,
    grad_mask,
    grad_output,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    group,
    deformable_group,
    with_bias,
) -> None:
    """Fill the tensors `grad_*` with the gradients of `modulated_deform_conv_forward`."""
    places = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    bias = bias if with_bias else input.new_zeros(len(weight))
    tensors = _widened(grad_output, input, weight, offset, mask, bias)
    grads = _ops._deform_conv2d_backward(*tensors, *places, True)
    for filled, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads, strict=False):
        filled.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])


def ms_deform_attn_forward(value, shapes, level_start, locations, weights, im2col_step) -> Tensor:
    """Multi-scale deformable attention of values (B, S, heads, D) at locations (B, Q, heads, levels, points, 2)."""
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    return module.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_backward(
    value, shapes, level_start, locations, weights, grad_output, grad_value, grad_locations, grad_weights, im2col_step
) -> None:
    """Fill the tensors `grad_*` with the gradients of `ms_deform_attn_forward`."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (value, locations, weights)]
        output = ms_deform_attn_forward(inputs[0], shapes, level_start, inputs[1], inputs[2], im2col_step)
    grads = torch.autograd.grad(output, inputs, grad_output)
    for filled, grad in zip((grad_value, grad_locations, grad_weights), grads, strict=True):
        filled.copy_(grad)


_PROVIDED = (
    get_compiler_version,
    get_compiling_cuda_version,
    nms,
    softnms,
    nms_match,
    bbox_overlaps,
    roi_align_forward,
    roi_align_backward,
    roi_pool_forward,
    roi_pool_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    deform_conv_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    modulated_deform_conv_forward,
    modulated_deform_conv_backward,
    ms_deform_attn_forward,
    ms_deform_attn_backward,
)
