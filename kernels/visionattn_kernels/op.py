"""The one way to register an operator, and the table of all operators.

An operator is a pair of ops of `torch.library`, the forward and its closed-form backward, each with a CPU
implementation, a CUDA implementation that launches Triton kernels, and a fake implementation that tells shapes. The
dispatcher selects by device; nothing falls back. Registered so, an operator works under autograd, `torch.compile`
(`fullgraph=True`), `torch.export`, fake tensors and the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib import import_module

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMESPACE = "visionattn"


@dataclass(frozen=True)
class Operator:
    """What the table `OPS` knows of one operator.

    Attributes:
        name: Noun of the mathematics, also the name of the public function and of its file in `ops/`.
        call: The public function: checks its arguments, then dispatches by device.
        reference: The definition, with the arguments of `call`: shortest true code, fp64-capable, never optimised.
        decomposition: The same in plain aten, with the arguments of `call`, valid for symbolic sizes: what exporting
            uses, so that the program runs without this package.
    """

    name: str
    call: Callable
    reference: Callable
    decomposition: Callable


OPS: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    """Enter `operator` into `OPS`.

    Raises:
        ValueError: The name is taken.
    """
    if operator.name in OPS:
        raise ValueError(f"operator {operator.name!r} is registered already; names seen: {sorted(OPS)}")
    OPS[operator.name] = operator


def define(name: str, schema: str, *, cpu: Callable, fake: Callable, cuda: Callable | None = None) -> OpOverload:
    """Define the op `visionattn::name`.

    `torch.library.custom_op` would do the same, and look for aliases among arguments and results at every call, in
    Python, which shows on small maps; `torch.library.opcheck` looks once, in the tests.

    Args:
        name: Name of the op, unique in the namespace.
        schema: Arguments and results in torch's schema language, without the name.
        cpu: Implementation for CPU tensors, whose results are no views of its arguments. Autograd is off inside, so a
            gradient needs an op of its own.
        fake: Shape-only implementation; its results must have the strides of the real ones.
        cuda: Implementation for CUDA tensors (HIP included); without it such a call raises NotImplementedError.

    Returns:
        The op, callable with positional arguments. Autocast is off inside: an op computes in its arguments' dtype, or
        in a wider one where it says so.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(qualified, fake)
    torch.library.impl(qualified, "cpu", _outside_autocast("cpu", cpu))
    if cuda is not None:
        torch.library.impl(qualified, "cuda", _outside_autocast("cuda", cuda))
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_gradient(forward: OpOverload, backward: OpOverload, plain: Callable, keeps_result: bool) -> None:
    """Let autograd differentiate `forward`, with respect to its first result, by the op `backward`.

    That has no derivative of its own: a gradient that will be differentiated again (`create_graph=True`) is taken of
    `plain`.

    Args:
        forward: Tensors come first among its arguments; results behind the first are for `backward` alone.
        backward: Takes the gradient of the result, all that was kept (the tensors among the arguments, then results)
            and the other arguments; returns the gradients of the first so many tensors.
        plain: The first result of `forward` in plain aten, with its arguments.
        keeps_result: Whether the first result is kept beside the others.
    """
    arguments = forward._schema.arguments
    count = sum("Tensor" in str(argument.type) for argument in arguments)

    def setup_context(ctx, inputs, output) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.settings = inputs[count:]
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(*inputs[:count], *results[0 if keeps_result else 1 :])

    def differentiate(ctx, grad, *_):
        saved = ctx.saved_tensors  # read once: under activation checkpointing a second read is an error
        if torch.is_grad_enabled():
            gradients = _plain_gradients(plain, grad, saved[:count], ctx.settings)
        else:
            gradients = backward(grad, *saved, *ctx.settings)
        wanted = [None if x is None else gradient for x, gradient in zip(saved, gradients, strict=False)]
        return *wanted, *[None] * (len(arguments) - len(wanted))

    torch.library.register_autograd(forward, differentiate, setup_context=setup_context)


def _plain_gradients(
    plain: Callable, grad: Tensor, tensors: Sequence[Tensor | None], settings: Sequence
) -> list[Tensor | None]:
    """Gradients of `tensors` that can be differentiated again, None for those that want none."""
    # One tensor may be several arguments, whose gradients have to be told apart.
    tensors = [x.view_as(x) if x is not None and x.requires_grad else x for x in tensors]
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    # Of torch's kernels for attention this one has second derivatives.
    with no_autocast(grad.device.type), sdpa_kernel(SDPBackend.MATH):
        gradients = iter(torch.autograd.grad(plain(*tensors, *settings), wanted, grad, create_graph=True))
    return [next(gradients) if x is not None and x.requires_grad else None for x in tensors]


def wants_plain_aten() -> bool:
    """Whether an operator has to be computed by torch's own.

    An exported program runs without this package; the transforms of `torch.func` and derivatives in forward mode have
    no rules for our ops, and would give zeros without an error.
    """
    if torch.compiler.is_exporting() or torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def launcher(operator: str, function: str) -> Callable:
    """`function` of the operator's module in `triton/`, which is imported, and Triton, when a CUDA tensor arrives."""

    def launch(*arguments):
        return getattr(import_module(f"visionattn_kernels.triton.{operator}"), function)(*arguments)

    return launch


def no_autocast(device_type: str) -> AbstractContextManager:
    """Context in which autocast leaves dtypes alone; nothing where it is off, so that an exported graph stays plain."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _outside_autocast(device_type: str, implementation: Callable) -> Callable:
    @wraps(implementation)
    def run(*args):
        with no_autocast(device_type):
            return implementation(*args)

    return run
