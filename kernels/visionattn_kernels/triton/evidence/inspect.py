"""What a kernel takes of a chip, found by compiling it ahead of time: no GPU and no driver needed.

Arguments are specialised exactly as at a launch (alignment, values of 1, `None`), so what is inspected is what runs.
Every operator with kernels takes part by a function `examples(dtype, dim, device)` in its launcher module, which gives
the launches of a call, forward and backward, by variant.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from visionattn_kernels.triton.evidence import OPERATORS
from visionattn_kernels.triton.launch import Launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (16, 32, 64, 128)

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Chip:
    """A target of the compiler.

    Attributes:
        target: As Triton names it.
        shared: Bytes of shared memory that a program can have.
        matrix: Pattern of the names of the matrix instructions in its assembly.
    """

    target: GPUTarget
    shared: int
    matrix: str


# Shared memory: CUDA C++ programming guide, technical specifications per compute capability, less the 1 KiB that the
# system keeps; AMD CDNA 3 instruction set architecture, local data share.
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, r"HMMA"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, r"HGMMA|HMMA"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, r"UTC\w*MMA|HMMA"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, r"v_mfma_f32_\d+x\d+x\d+_b?f16"),
}


@dataclass(frozen=True)
class Entry:
    """One kernel as one entry of its table of tiles launches it; a name that can be sent to another process.

    Attributes:
        operator: Its name.
        variant: Key of the launcher module's `examples`.
        number: Place among the variant's launches.
        kernel: Name of the kernel, for tables.
        multiplies: Whether it has matrix products; as `Launch.flops` says.
        dtype: Of the tensors.
        dim: Channels a head.
    """

    operator: str
    variant: str
    number: int
    kernel: str
    multiplies: bool
    dtype: torch.dtype
    dim: int

    def __str__(self) -> str:
        """Everything but the number, for tables and test names."""
        kernel = self.kernel.removesuffix("_kernel") + (f" ({self.variant})" if self.variant else "")
        return f"{kernel} {str(self.dtype).removeprefix('torch.')} {self.dim}"

    def launch(self) -> Launch:
        """The launch itself, on meta tensors."""
        return examples(self.operator, self.dtype, self.dim, "meta")[self.variant][self.number]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: Vector registers a thread.
        spills: Instructions that spill a register or fetch it back (NVIDIA), or spilled vector registers (AMD).
        scalar_spills: Spilled scalar registers, which go to vector registers and not to memory (AMD).
        shared: Bytes of shared memory.
        matrix: How often each matrix instruction stands in the code.
    """

    registers: int
    spills: int
    scalar_spills: int
    shared: int
    matrix: dict[str, int]

    def __str__(self) -> str:
        """Registers, KiB of shared memory and matrix instructions, and spills where there are some."""
        parts = [f"{self.registers} r", f"{self.shared / 1024:.0f} K"]
        parts += [f"{count} {name}" for name, count in sorted(self.matrix.items())]
        parts += [f"{self.scalar_spills} scalar spills"] if self.scalar_spills else []
        parts += [f"**{self.spills} spills**"] if self.spills else []
        return ", ".join(parts)


def entries(
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    dims: tuple[int, ...] = DIMS,
    operators: tuple[str, ...] = OPERATORS,
) -> Iterator[Entry]:
    """Every kernel and variant of the given operators, for the given dtypes and head dims."""
    for operator in operators:
        for dtype in dtypes:
            for dim in dims:
                for variant, launches in examples(operator, dtype, dim, "meta").items():
                    for number, launch in distinct(launches):
                        name, multiplies = launch.kernel.__name__, launch.flops > 0
                        yield Entry(operator, variant, number, name, multiplies, dtype, dim)


def distinct(launches: list[Launch]) -> list[tuple[int, Launch]]:
    """The first launch of each kernel, with its number: others of a variant differ in sizes alone."""
    first = {launch.kernel.__name__: (number, launch) for number, launch in reversed(list(enumerate(launches)))}
    return sorted(first.values(), key=lambda pair: pair[0])


def examples(operator: str, dtype: torch.dtype, dim: int, device: str) -> dict[str, list[Launch]]:
    """`examples` of the operator's launcher module."""
    return import_module(f"visionattn_kernels.triton.{operator}").examples(dtype, dim, device)


def inspect(entry: Entry, chip: str) -> Resources:
    """Compile `entry` for a chip of `CHIPS` and read what it takes from the assembly."""
    compiled = _compile(entry.launch(), CHIPS[chip].target)
    if CHIPS[chip].target.backend == "cuda":
        return _nvidia_resources(compiled, CHIPS[chip])
    return _amd_resources(compiled, CHIPS[chip])


def faults(entry: Entry, chip: str, resources: Resources) -> list[str]:
    """What must not be: spilled registers, too much shared memory, 16-bit products without matrix instructions."""
    found = []
    if resources.spills:
        found.append(f"{resources.spills} spills")
    if resources.shared > CHIPS[chip].shared:
        found.append(f"{resources.shared} bytes of shared memory, the chip has {CHIPS[chip].shared}")
    if entry.multiplies and entry.dtype != torch.float32 and not resources.matrix:
        found.append(f"no matrix instruction {CHIPS[chip].matrix}")
    return found


def _compile(launch: Launch, target: GPUTarget):
    """The compiled kernel. Triton specialises arguments for its current GPU only, hence its inner functions here."""
    backend, kernel = make_backend(target), launch.kernel
    arguments = {
        **launch.arguments,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "debug": False,
        "instrumentation_mode": "",
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _nvidia_resources(compiled, chip: Chip) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        scalar_spills=0,
        shared=compiled.metadata.shared,
        matrix=dict(Counter(re.findall(rf"\b({chip.matrix})\b", assembly))),
    )


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the NVIDIA tools that Triton's wheel carries."""
    return subprocess.run([_NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _amd_resources(compiled, chip: Chip) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    matrix = re.findall(rf"\b({chip.matrix})\b", assembly)
    return Resources(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count"),
        scalar_spills=field("sgpr_spill_count"),
        shared=compiled.metadata.shared,
        matrix={"mfma": len(matrix)} if matrix else {},
    )
