"""What a kernel launch is, apart from its happening.

A planner (`forward_launches` and so on in every launcher file) allocates the results and describes the launches that
fill them. A call runs them; `evidence/` compiles them for any chip on meta tensors, or runs and counts them on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: The kernel, a function decorated by `triton.jit`.
        programs: Size of the grid, which has one dimension: the others end at 65,535.
        arguments: By the kernel's parameter names.
        num_warps: Warps a program.
        num_stages: Iterations of the kernel's loop in flight.
        flops: The least that must be multiplied and added, for comparison with what the kernel does; 0 where a kernel
            only adds up numbers, each of which takes part once: it has no matrix product and needs no such instruction.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    flops: int


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run `launches` one after the other on the current stream of `device`."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for launch in launches:
            if launch.programs:
                launch.kernel[(launch.programs,)](
                    **launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
                )


def padded_dim(dim: int) -> int:
    """Block of channels that holds `dim` of them: a power of two, as Triton wants, and at least 16, as `tl.dot` does.

    Raises:
        ValueError: `dim` is above 128.
    """
    if dim > 128:
        raise ValueError(f"the Triton kernels take at most 128 channels a head, got {dim}")
    return max(16, 1 << (dim - 1).bit_length())


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless the kernels compute in `dtype`."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton kernels take float32, float16 and bfloat16, got {dtype}")
