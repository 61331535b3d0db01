"""Convolutions of the blocks: the gradient of a depthwise kernel, which is computed by convolutions of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models import checkpoint

from visionattn.layers import DepthwiseConv, conv_each
from visionattn.layers.conv import _ConvolvedGradient
from visionattn_kernels.benchmark import interleaved

# Maps larger and smaller than the kernel, of one pixel, of channels that fill no vector register, and no image at all.
SHAPES = [(3, 9, 14, 8), (1, 7, 7, 16), (2, 3, 2, 5), (2, 1, 1, 4), (0, 5, 5, 4)]


def gradients(layer, x, direction, **settings):
    """Of the input and of the parameters."""
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], direction, **settings)


class Plain(DepthwiseConv):
    """What torch makes of the same convolution."""

    def forward(self, x):
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)


@pytest.fixture
def pair():
    """`pair(dim, side, dilation)` is our layer and torch's, with the same parameters."""

    def build(dim, side, dilation=1, dtype=torch.float32):
        torch.manual_seed(0)
        ours, plain = (layer(dim, side, dilation, dtype=dtype) for layer in (DepthwiseConv, Plain))
        plain.load_state_dict(ours.state_dict())
        return ours, plain

    return build


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize(("side", "dilation"), [(3, 1), (5, 1), (7, 1), (5, 2), (7, 3)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_torchs_convolution(pair, shape, side, dilation, by_channel):
    ours, plain = pair(shape[-1], side, dilation)
    x, direction = torch.randn(shape), torch.randn(shape)
    if by_channel:
        x, direction = (t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (x, direction))
    x.requires_grad_(True)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(gradients(ours, x, direction), gradients(plain, x, direction))
    # As the mean over a map hands it down: one number for many places.
    even = torch.ones(shape[0], 1, 1, 1).expand(shape)
    torch.testing.assert_close(gradients(ours, x, even), gradients(plain, x, even))


@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients_of_the_gradients_are_right(dilation):
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4, 6), (3, 1, 5, 5), (3,))
    )
    assert torch.autograd.gradcheck(_ConvolvedGradient.apply, (x, weight, bias, dilation))
    assert torch.autograd.gradgradcheck(_ConvolvedGradient.apply, (x, weight, bias, dilation))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_what_is_frozen_gets_no_gradient(pair, trained):
    ours, plain = pair(8, 7)
    x = torch.randn(2, 9, 9, 8)
    for layer in (ours, plain):
        layer.requires_grad_(False).get_parameter(trained).requires_grad_(True)
        layer(x).square().sum().backward()
    assert [name for name, parameter in ours.named_parameters() if parameter.grad is not None] == [trained]
    torch.testing.assert_close(ours.get_parameter(trained).grad, plain.get_parameter(trained).grad)


@pytest.mark.parametrize("way", ["autocast", "bfloat16", "recomputed", "compiled"])
def test_other_ways_to_train_give_torchs_gradients(pair, way):
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    results = []
    for layer in pair(16, 7, dtype=dtype):
        torch.manual_seed(1)
        x, direction = torch.randn(2, 9, 10, 16, dtype=dtype, requires_grad=True), torch.randn(2, 9, 10, 16)
        call = layer if way != "compiled" else torch.compile(layer, fullgraph=True)
        if way == "recomputed":
            call = lambda x, layer=layer: checkpoint(layer, x)  # noqa: E731
        with torch.autocast("cpu", enabled=way == "autocast"):
            out = call(x)
        results.append(torch.autograd.grad(out, [x, *layer.parameters()], direction.to(out.dtype)))
    torch.testing.assert_close(*results)


def test_torch_func_gives_the_gradients_of_each_sample(pair):
    ours, plain = pair(8, 7)
    images = torch.randn(3, 1, 6, 5, 8)

    def loss(parameters, image, layer):
        return torch.func.functional_call(layer, parameters, image).square().sum()

    found = (
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))(dict(layer.named_parameters()), images, layer)
        for layer in (ours, plain)
    )
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
def test_scripting_and_copying_keep_the_layer(pair):
    ours, plain = pair(8, 7)
    x = torch.randn(2, 9, 9, 8, requires_grad=True)
    for layer in (torch.jit.script(ours), copy.deepcopy(ours)):
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(gradients(layer, x, x), gradients(plain, x, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("way", ["eager", "traced", "scripted", "exported"])
def test_samples_are_convolved_with_kernels_of_their_own_whatever_their_number(way, with_bias):
    torch.manual_seed(0)

    class Each(torch.nn.Module):
        def forward(self, x, weight, bias: torch.Tensor | None = None):
            return conv_each(x, weight, bias)

    def inputs(batch):
        tensors = torch.randn(batch, 4, 5, 6), torch.randn(batch, 4, 3, 3)
        return (*tensors, torch.randn(4)) if with_bias else tensors

    call, example = Each(), inputs(2)
    if way == "traced":
        call = torch.jit.trace(call, example)
    elif way == "scripted":
        call = torch.jit.script(call)
    elif way == "exported":
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(call, example, dynamic_shapes=(batch, batch, None)[: len(example)])
        # Grouped convolutions of a symbolic number of groups do not convert to ONNX.
        assert not any("conv" in str(node.target) for node in program.graph.nodes)
        call = program.module()
    for number in (1, 2, 3) if way == "exported" else (0, 1, 2, 3):
        x, weight, *bias = inputs(number)
        samples = [F.conv2d(a, b.unsqueeze(1), *bias, padding=1, groups=4) for a, b in zip(x, weight, strict=True)]
        torch.testing.assert_close(call(x, weight, *bias), torch.stack(samples) if number else x)


@pytest.mark.speed
@pytest.mark.parametrize(
    ("shape", "side", "dilation"),
    [((4, 14, 14, 512), 7, 1), ((4, 7, 7, 1024), 7, 1), ((4, 14, 14, 320), 5, 1), ((4, 56, 56, 64), 7, 3)],
    ids=str,
)
def test_gradients_take_less_time_than_torchs(pair, shape, side, dilation):
    ours, plain = pair(shape[-1], side, dilation)
    x, direction = torch.randn(shape, requires_grad=True), torch.randn(shape)
    seconds = interleaved(
        {"ours": lambda: gradients(ours, x, direction), "torch": lambda: gradients(plain, x, direction)}
    )
    assert seconds["torch"] >= 1.2 * seconds["ours"], seconds
