"""The one way to register an operator, and the table of all operators.

An operator is a pair of ops of `torch.library`, the forward and its closed-form backward, each with a CPU
implementation, a CUDA implementation that launches Triton kernels, and a fake implementation that tells shapes. The
dispatcher selects by device; nothing falls back. Registered so, an operator works under autograd, `torch.compile`
(`fullgraph=True`), `torch.export`, fake tensors and the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib import import_module

import torch
from torch._ops import OpOverload

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
