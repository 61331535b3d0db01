"""Convolutions on the layouts that the blocks have, and what patches need."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from visionattn_kernels.op import wants_plain_aten


@register_notrace_function  # compares sizes, which fx cannot trace
def shortfall(length: int, wanted: int) -> int:
    """What `length` lacks of `wanted`, or 0."""
    lack = wanted - length
    if not torch.jit.is_scripting():  # noqa: SIM102  joined by `and`, the second would be compiled
        if torch.jit.is_tracing():
            # A trace would keep one case of max.
            return (lack + abs(lack)) // 2
    return max(0, lack)


@register_notrace_function  # the size of the map decides, which fx cannot trace
def fill_patch(x: Tensor, patch_size: int) -> Tensor:
    """Pad a map smaller than one patch with zeros at the bottom and on the right. (B, C, H, W), sides >= patch_size.

    Raises:
        ValueError: The map is empty, which padding would hide.
    """
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"height and width must be at least 1, got {x.shape[2]} x {x.shape[3]}")
    return zero_pad(x, [0, shortfall(x.shape[3], patch_size), 0, shortfall(x.shape[2], patch_size)])


@register_notrace_function  # the size of the map decides, which fx cannot trace
def zero_pad(x: Tensor, padding: list[int]) -> Tensor:
    """Pad with zeros as `torch.nn.functional.pad` does, without its copy where nothing lacks.

    What is traced or exported has to pad whatever the size of its example.
    """
    if not torch.jit.is_scripting():
        any_size = torch.jit.is_tracing() or torch.compiler.is_exporting()
        if not any_size and not any(padding):
            return x
    return F.pad(x, padding)


@register_notrace_function  # the size of the map decides, which fx cannot trace
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad the sides of (B, C, H, W) to multiples of a number, with zeros at the bottom and on the right."""
    return zero_pad(x, [0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple])


@register_notrace_function  # whether the batch may change decides, which fx cannot trace
def conv_each(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve each channel of each sample of (B, C, H, W) with its own 3x3 kernel of (B, C, 3, 3); `bias` is (C,).

    Groups for all channels of all samples take the least time, but what is traced or exported would keep their number,
    and no sample gives none.
    """
    batch, dim, height, width = x.shape
    any_batch = False
    if not torch.jit.is_scripting():
        any_batch = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if any_batch or batch == 0:
        products = weight.flatten(2).unsqueeze(2) @ F.unfold(x, 3, padding=1).unflatten(1, (dim, 9))
        out = products.view(x.shape)
        return out if bias is None else out + bias.view(-1, 1, 1)
    samples, kernels = x.reshape(1, -1, height, width), weight.reshape(-1, 1, 3, 3)
    bias = None if bias is None else bias.repeat(batch)
    return F.conv2d(samples, kernels, bias, padding=1, groups=batch * dim).view(x.shape)


class _ConvolvedGradient(torch.autograd.Function):
    """A depthwise convolution on (B, C, H, W) whose gradients are such convolutions too.

    That of the input is the output's gradient convolved with the flipped kernel, that of the kernel each sample's map
    convolved with the gradient of its output as the kernel. oneDNN takes longer by its own routines where the kernel is
    5x5 or larger, most of all on maps no larger than the kernel (`pytest -m speed tests/layers`).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        return _same_conv(x, weight, bias, dilation)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        *tensors, _, ctx.dilation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if wanted_x:
            grad_x = _same_conv(grad, weight.flip(2, 3), None, ctx.dilation)
        if wanted_weight:
            # Channels side by side, as kernels of the size of a map want them.
            samples = zip(x.contiguous(memory_format=torch.channels_last).split(1), grad.unsqueeze(2), strict=True)
            settings = {"stride": ctx.dilation, "padding": _same_padding(weight, ctx.dilation), "groups": len(weight)}
            grad_weight = sum(F.conv2d(sample, kernel, **settings) for sample, kernel in samples).transpose(0, 1)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if wanted_bias else None, None


def _same_padding(weight: Tensor, dilation: int) -> int:
    """Padding that keeps the size of the map."""
    return dilation * (weight.shape[-1] // 2)


def _same_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Depthwise convolution on (B, C, H, W) that keeps the size of the map."""
    return F.conv2d(x, weight, bias, padding=_same_padding(weight, dilation), dilation=dilation, groups=weight.shape[0])


def _convolves_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether `_ConvolvedGradient` applies and is faster: in oneDNN's eager float32 on a kernel of 5x5 or more."""
    # Before any size is looked at, which would become a constant of what is traced.
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or wants_plain_aten():
        return False
    trains = torch.is_grad_enabled() and weight.requires_grad and len(x) > 0
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return trains and plain and x.device.type == "cpu" and weight.shape[-1] >= 5


@register_notrace_function  # whether there will be a gradient decides, which fx cannot trace
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """(B, C, H, W) to the same shape, for an odd kernel (C, 1, side, side)."""
    if not torch.jit.is_scripting():  # noqa: SIM102  joined by `and`, the second would be compiled
        if _convolves_gradient(x, weight):
            return _ConvolvedGradient.apply(x, weight, bias, dilation)
    return _same_conv(x, weight, bias, dilation)


class DepthwiseConv(nn.Conv2d):
    """A convolution of each channel on its own that keeps the size of the map, on (B, H, W, C).

    Args:
        dim: Channels C.
        kernel_size: Side of the kernel, odd.
        dilation: Distance of the positions that a kernel sees.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int = 1, device=None, dtype=None):
        settings = {"padding": dilation * (kernel_size // 2), "dilation": dilation, "groups": dim}
        super().__init__(dim, dim, kernel_size, **settings, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        x = depthwise_conv(x.permute(0, 3, 1, 2), self.weight, self.bias, self.dilation[0])
        return x.permute(0, 2, 3, 1)


class GroupedLinear(nn.Conv1d):
    """A linear map of each group of channels, on (B, C): a grouped convolution of a signal of one sample.

    It is one product of matrices; a convolution of so little spends most of its time on preparation.

    Args:
        in_dim: Channels C; a multiple of `groups`.
        out_dim: Channels of the result; a multiple of `groups`.
        groups: Groups, each mapped to its own part of the result.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, in_dim: int, out_dim: int, groups: int, device=None, dtype=None):
        super().__init__(in_dim, out_dim, 1, groups=groups, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) to (B, out_dim)."""
        weight = self.weight.view(self.groups, -1, self.weight.shape[1])
        grouped = x.unflatten(1, (self.groups, -1)).permute(1, 2, 0)
        # The bias is always there, but TorchScript goes by the type of Conv1d's.
        out, bias = (weight @ grouped).permute(2, 0, 1).flatten(1), self.bias
        return out if bias is None else out + bias
