"""What tests and benchmarks share: cases of every operator, and the error an implementation may make.

There are no tolerances here. An implementation is compared with the reference in float64, and its error may be a small
multiple of the error that the plain reference itself makes in the tested dtype on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visionattn_kernels.op import OPS
from visionattn_kernels.ops.windows import pair

# Another order of summation, or a result rounded once more, stays well within this multiple of the reference's error.
BUDGET_FACTOR = 4.0

# The error of a result of few elements is a matter of luck: there the worst of several draws of the arguments counts.
FEW, DRAWS = 256, 4


@dataclass(frozen=True)
class Case:
    """Arguments of an operator, without the numbers.

    Attributes:
        op: Name in `OPS`.
        shapes: Shape of each floating point argument; they are filled from the normal distribution.
        settings: The other arguments.
        indices: Shape and number of choices of each argument that is an index.
    """

    op: str
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any] = field(default_factory=dict)
    indices: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Shape of the first tensor, the settings and what else there is, for test names and tables."""
        first = "x".join(map(str, next(iter(self.shapes.values()))))
        bias = ["bias"] if "bias" in self.shapes else []
        indices = (f"{name}={shape[-1]}" for name, (shape, _) in self.indices.items())
        return " ".join([first, *(f"{name}={value}" for name, value in self.settings.items()), *indices, *bias])

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """The tensor arguments, the same numbers for every dtype and device up to rounding.

        What is floating point requires a gradient, but for `CONSTANT` arguments.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in self.shapes.items()
        }
        indices = {
            name: torch.randint(choices, shape, generator=generator).to(device)
            for name, (shape, choices) in self.indices.items()
        }
        tensors = {name: x.to(device=device, dtype=dtype) for name, x in drawn.items()}
        return {name: x.requires_grad_(name not in CONSTANT) for name, x in tensors.items()} | indices


def neighborhood(
    batch: int, heads: int, height: int, width: int, dim: int, *, bias: bool = False, **settings: Any
) -> Case:
    """A case of `neighborhood_attention`; `bias` adds a relative bias of the right shape."""
    shapes = dict.fromkeys(("query", "key", "value"), (batch, heads, height, width, dim))
    if bias:
        rows, columns = pair(settings["kernel_size"])
        shapes["bias"] = (heads, 2 * rows - 1, 2 * columns - 1)
    return Case("neighborhood_attention", shapes, settings)


def aggregate(batch: int, heads: int, height: int, width: int, dim: int, **settings: Any) -> Case:
    """A case of `neighborhood_aggregate`."""
    rows, columns = pair(settings["kernel_size"])
    place = (batch, heads, height, width)
    return Case("neighborhood_aggregate", {"weights": (*place, rows * columns), "value": (*place, dim)}, settings)


def routed(batch: int, heads: int, regions: int, tokens: int, dim: int, *, topk: int, **settings: Any) -> Case:
    """A case of `routed_attention`; a region may be named twice, which `region_routes` never does."""
    shapes = dict.fromkeys(("query", "key", "value"), (batch, heads, regions, tokens, dim))
    return Case("routed_attention", shapes, settings, {"routes": ((batch, regions, topk), regions)})


def halo(
    batch: int,
    heads: int,
    height: int,
    width: int,
    dim: int,
    value_dim: int | None = None,
    *,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    **settings: Any,
) -> Case:
    """A case of `halo_attention`; height and width are those of the keys."""
    shapes = {
        "query": (batch, heads, -(-height // stride), -(-width // stride), dim),
        "key": (batch, heads, height, width, dim),
        "value": (batch, heads, height, width, value_dim or dim),
        **dict.fromkeys(("height_rel", "width_rel"), (2 * block_size + 4 * halo_size - 1, dim)),
    }
    strided = {"stride": stride} if stride > 1 else {}
    return Case("halo_attention", shapes, {"block_size": block_size, "halo_size": halo_size, **strided, **settings})


def linear(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    value_dim: int | None = None,
    *,
    scale: bool = False,
    rotary: bool = False,
    **settings: Any,
) -> Case:
    """A case of `linear_attention`; `scale` and `rotary` add tensors of that name."""
    shapes = {
        **dict.fromkeys(("query", "key"), (batch, heads, tokens, dim)),
        "value": (batch, heads, tokens, value_dim or dim),
        **({"scale": (heads,)} if scale else {}),
        **({"rotary": (2, tokens, dim // 2)} if rotary else {}),
    }
    return Case("linear_attention", shapes, settings)


def flow(batch: int, heads: int, tokens: int, dim: int, value_dim: int | None = None, **settings: Any) -> Case:
    """A case of `flow_attention`."""
    shapes = dict.fromkeys(("query", "key"), (batch, heads, tokens, dim))
    return Case("flow_attention", {**shapes, "value": (batch, heads, tokens, value_dim or dim)}, settings)


# Arguments that all images of a batch share, and those that are not differentiated.
SHARED = frozenset({"bias", "height_rel", "width_rel", "scale", "rotary"})
CONSTANT = frozenset({"rotary"})

# The second case of an operator is the one that is also compiled, exported and differentiated numerically.
# fmt: off
CASES: dict[str, list[Case]] = {
    "neighborhood_attention": [
        neighborhood(2, 2, 14, 14, 32, kernel_size=7),
        neighborhood(2, 2, 17, 23, 16, kernel_size=7, bias=True),
        neighborhood(2, 1, 29, 19, 8, kernel_size=(3, 5), dilation=(4, 3), bias=True),
        neighborhood(1, 2, 13, 16, 24, kernel_size=(4, 6), dilation=(1, 2), bias=True),
        neighborhood(1, 2, 20, 33, 16, kernel_size=(5, 7), stride=(2, 7), bias=True),
        neighborhood(1, 1, 7, 7, 64, kernel_size=7, bias=True),
        neighborhood(1, 3, 1, 41, 8, kernel_size=(1, 9), dilation=(1, 4), bias=True),
        neighborhood(1, 1, 9, 9, 8, kernel_size=3, scale=0.5),
    ],
    "neighborhood_aggregate": [
        aggregate(2, 2, 14, 14, 16, kernel_size=13),
        aggregate(2, 2, 17, 11, 12, kernel_size=5),
        aggregate(2, 1, 29, 19, 8, kernel_size=(3, 5), dilation=(4, 3)),
        aggregate(1, 3, 20, 33, 10, kernel_size=(4, 6)),
        aggregate(1, 1, 7, 7, 14, kernel_size=7),
        aggregate(1, 1, 1, 41, 3, kernel_size=(1, 9), dilation=(1, 4)),
        aggregate(1, 2, 31, 37, 16, kernel_size=17),
        aggregate(1, 1, 9, 9, 4, kernel_size=1),
    ],
    "routed_attention": [
        routed(2, 4, 49, 4, 32, topk=16),
        routed(2, 2, 12, 35, 16, topk=3, scale=0.1),
        routed(1, 1, 49, 16, 24, topk=4),
        routed(1, 3, 25, 1, 8, topk=2),
        routed(2, 1, 3, 130, 40, topk=1),
        routed(1, 2, 1, 7, 8, topk=1),
        routed(1, 2, 100, 64, 64, topk=2),
    ],
    "halo_attention": [
        halo(1, 2, 16, 16, 16, block_size=8, halo_size=3),
        halo(2, 2, 19, 22, 12, 20, block_size=6, halo_size=2, stride=2),
        halo(2, 1, 13, 7, 24, 8, block_size=8, halo_size=3, scale=0.3),
        halo(1, 3, 1, 17, 8, block_size=4, halo_size=0),
        halo(1, 1, 5, 5, 8, block_size=2, halo_size=5),
        halo(1, 4, 40, 24, 16, block_size=12, halo_size=2, stride=3),
        halo(3, 1, 5, 6, 8, block_size=1, halo_size=1),
    ],
    "linear_attention": [
        linear(2, 3, 49, 32, normalization="subtraction"),
        linear(2, 2, 101, 16, 24, normalization="magnitude", feature_map="elu_plus_one", scale=True, rotary=True),
        linear(1, 3, 784, 32, normalization="division", feature_map="relu", epsilon=100.0, scale=True),
        linear(2, 1, 13, 8, normalization="division", feature_map="relu", epsilon=100.0, scale=True),
        linear(1, 1, 9000, 64, normalization="magnitude", feature_map="elu_plus_one", rotary=True),
        linear(1, 2, 2903, 48, 16, normalization="subtraction", feature_map="relu", scale=True),
        # With one token, a divisor above its least cancels what it divides: gradients are zero, errors relative to them
        # are rounding over rounding. An epsilon that is larger than the divisor keeps the gradients.
        linear(3, 1, 1, 4, normalization="division", feature_map="elu_plus_one", epsilon=100.0, scale=True),
    ],
    "flow_attention": [
        flow(2, 3, 196, 32),
        flow(2, 2, 101, 16, 24),
        flow(1, 1, 9000, 64),
        flow(3, 1, 7, 8, epsilon=0.1),
        flow(1, 2, 53, 8, 3),
    ],
}

# The second case of each operator at another size.
RESIZED: dict[str, Case] = {
    "neighborhood_attention": neighborhood(3, 2, 29, 16, 16, kernel_size=7, bias=True),
    "neighborhood_aggregate": aggregate(3, 2, 9, 24, 12, kernel_size=5),
    "routed_attention": routed(3, 2, 9, 50, 16, topk=4, scale=0.1),
    "halo_attention": halo(3, 2, 31, 14, 12, 20, block_size=6, halo_size=2, stride=2),
    "flow_attention": flow(3, 2, 58, 16, 24),
    "linear_attention": linear(
        3, 2, 58, 16, 24, normalization="magnitude", feature_map="elu_plus_one", scale=True, rotary=True
    ),
}
# fmt: on


def random_direction(out: Tensor) -> Tensor:
    """What `evaluate` differentiates along where it is given nothing: the same numbers for every dtype and device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)


def evaluate(
    call: Callable[..., Tensor], case: Case, tensors: dict[str, Tensor], direction: Tensor | None = None
) -> dict[str, Tensor]:
    """Run `call` forward and backward.

    Args:
        call: The operator, its reference or another implementation with the same arguments.
        case: Gives the settings.
        tensors: From `Case.tensors`.
        direction: Gradient of the result, by default a `random_direction`, which takes longer to draw than some
            operators to compute.

    Returns:
        "out" and "grad_NAME" for every tensor argument that requires a gradient.
    """
    out = call(**tensors, **case.settings)
    trainable = {name: x for name, x in tensors.items() if x.requires_grad}
    direction = random_direction(out) if direction is None else direction
    gradients = torch.autograd.grad(out, list(trainable.values()), direction)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(trainable, gradients, strict=True)}}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; infinite where `got` has a NaN or an infinity."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got - want).norm() / want.norm().clamp(min=1e-300)).item() if want.numel() else 0.0


def widened(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same numbers in `dtype`, as leaves that require a gradient where they did; indices stay as they are."""
    return {name: x.detach().to(dtype).requires_grad_() if x.requires_grad else x for name, x in tensors.items()}


def error_budget(
    case: Case, tensors: dict[str, Tensor], want: dict[str, Tensor], reference: Callable[..., Tensor]
) -> dict[str, float]:
    """The relative error that an implementation may make in each result on `tensors`.

    In float64 the reference has nothing to be compared with; there its error is that in float32, scaled by the unit of
    rounding, and doubled because sums run in half as many lanes.
    """
    first = next(iter(tensors.values()))
    measured = torch.float32 if first.dtype == torch.float64 else first.dtype
    scale = 1.0 if first.dtype == measured else 2 * torch.finfo(first.dtype).eps / torch.finfo(measured).eps
    errors = [
        {name: torch.finfo(measured).eps for name in want},
        _plain_errors(case, tensors, want, reference, measured),
    ]
    if min(exact.numel() for exact in want.values()) < FEW:
        for seed in range(1, DRAWS):
            drawn = case.tensors(measured, first.device, seed)
            errors.append(_plain_errors(case, drawn, evaluate(reference, case, widened(drawn)), reference, measured))
    return {name: BUDGET_FACTOR * scale * max(error[name] for error in errors) for name in want}


def _plain_errors(
    case: Case,
    tensors: dict[str, Tensor],
    want: dict[str, Tensor],
    reference: Callable[..., Tensor],
    dtype: torch.dtype,
) -> dict[str, float]:
    """The relative error that the reference makes in each result when it computes in `dtype`."""
    plain = evaluate(reference, case, widened(tensors, dtype))
    return {name: relative_error(plain[name], exact) for name, exact in want.items()}


def check(
    case: Case,
    call: Callable[..., Tensor],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    reference: Callable[..., Tensor] | None = None,
) -> None:
    """Compare results and gradients of `call` with the reference in float64.

    Args:
        case: What to compute.
        call: The implementation under test.
        dtype: Its dtype.
        device: Its device.
        reference: What stands for the operator's reference, where that takes too much memory.

    Raises:
        AssertionError: A result is further from the float64 reference than the error budget: `BUDGET_FACTOR` times the
            error of the plain reference in `dtype`, which is at least one unit of rounding.
    """
    reference = reference or OPS[case.op].reference
    tensors = case.tensors(dtype, device)
    want = evaluate(reference, case, widened(tensors))
    got = evaluate(call, case, tensors)
    for name, budget in error_budget(case, tensors, want, reference).items():
        error = relative_error(got[name], want[name])
        if not error <= budget:
            raise AssertionError(f"{case.op} [{case}] {dtype}: error of {name} is {error:.2e}, budget {budget:.2e}")
