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

# Another order of summation, or a result rounded once more, stays well within this multiple of the reference's error.
BUDGET_FACTOR = 4.0


@dataclass(frozen=True)
class Case:
    """Arguments of an operator, without the numbers.

    Attributes:
        op: Name in `OPS`.
        shapes: Shape of each tensor argument; tensors are filled from the normal distribution.
        settings: The other arguments.
    """

    op: str
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Shape of the first tensor, the settings and whether there is a bias, for test names and tables."""
        first = "x".join(map(str, next(iter(self.shapes.values()))))
        bias = ["bias"] if "bias" in self.shapes else []
        return " ".join([first, *(f"{name}={value}" for name, value in self.settings.items()), *bias])

    def tensors(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """The tensor arguments, the same numbers for every dtype and device up to rounding; they require a gradient."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in self.shapes.items()
        }
        return {name: x.to(device=device, dtype=dtype).requires_grad_() for name, x in drawn.items()}


def neighborhood(
    batch: int, heads: int, height: int, width: int, dim: int, *, bias: bool = False, **settings: Any
) -> Case:
    """A case of `neighborhood_attention`; `bias` adds a relative bias of the right shape."""
    shapes = dict.fromkeys(("query", "key", "value"), (batch, heads, height, width, dim))
    if bias:
        rows, columns = torch.broadcast_to(torch.as_tensor(settings["kernel_size"]), (2,)).tolist()
        shapes["bias"] = (heads, 2 * rows - 1, 2 * columns - 1)
    return Case("neighborhood_attention", shapes, settings)


# fmt: off
CASES: dict[str, list[Case]] = {
    "neighborhood_attention": [
        neighborhood(2, 2, 14, 14, 32, kernel_size=7),
        neighborhood(1, 2, 17, 23, 16, kernel_size=7, bias=True),
        neighborhood(2, 1, 29, 19, 8, kernel_size=(3, 5), dilation=(4, 3), bias=True),
        neighborhood(1, 2, 13, 16, 24, kernel_size=(4, 6), dilation=(1, 2), bias=True),
        neighborhood(1, 2, 20, 33, 16, kernel_size=(5, 7), stride=(2, 7), bias=True),
        neighborhood(1, 1, 7, 7, 64, kernel_size=7, bias=True),
        neighborhood(1, 3, 1, 41, 8, kernel_size=(1, 9), dilation=(1, 4), bias=True),
        neighborhood(1, 1, 9, 9, 8, kernel_size=3, scale=0.5),
    ],
}
# fmt: on


def evaluate(call: Callable[..., Tensor], case: Case, tensors: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Run `call` forward and backward against a fixed random direction.

    Args:
        call: The operator, its reference or another implementation with the same arguments.
        case: Gives the settings.
        tensors: From `Case.tensors`.
        seed: Of the direction.

    Returns:
        "out" and "grad_NAME" for every tensor argument.
    """
    out = call(**tensors, **case.settings)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    gradients = torch.autograd.grad(out, list(tensors.values()), direction)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(tensors, gradients, strict=True)}}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; infinite where `got` has a NaN or an infinity."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got - want).norm() / want.norm().clamp(min=1e-300)).item() if want.numel() else 0.0


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}


def error_budget(
    case: Case, tensors: dict[str, Tensor], want: dict[str, Tensor], reference: Callable[..., Tensor]
) -> dict[str, float]:
    """The relative error that an implementation may make in each result on `tensors`.

    In float64 the reference has nothing to be compared with; there its error is that in float32, scaled by the unit of
    rounding.
    """
    dtype = tensors[next(iter(tensors))].dtype
    measured = torch.float32 if dtype == torch.float64 else dtype
    plain = evaluate(reference, case, _cast(tensors, measured))
    scale = torch.finfo(dtype).eps / torch.finfo(measured).eps
    return {
        name: BUDGET_FACTOR * scale * max(relative_error(plain[name], exact), torch.finfo(measured).eps)
        for name, exact in want.items()
    }


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
    want = evaluate(reference, case, _cast(tensors, torch.float64))
    got = evaluate(call, case, tensors)
    for name, budget in error_budget(case, tensors, want, reference).items():
        error = relative_error(got[name], want[name])
        if not error <= budget:
            raise AssertionError(f"{case.op} [{case}] {dtype}: error of {name} is {error:.2e}, budget {budget:.2e}")
