"""Every Triton kernel compiled ahead of time for every chip, in processes of their own; nothing runs on a GPU."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import triton_compiler

pytestmark = pytest.mark.kernels

# The rest of the tables is compiled by `tools/compile_kernels.py`.
COMPILED = [(torch.bfloat16, 32), (torch.bfloat16, 128), (torch.float32, 32)]


@pytest.fixture(scope="module")
def compiler():
    """Processes that compile: a process that has ever interpreted cannot."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("dtype", "dim"), COMPILED, ids=str)
def test_kernels_fit_the_chip_and_use_its_matrix_instructions(dtype, dim, chip, compiler):
    entries = compiler.submit(triton_compiler.heaviest_entries, dtype, dim).result()
    results = list(compiler.map(triton_compiler.inspected, entries, [chip] * len(entries)))
    for entry, (resources, faults) in zip(entries, results, strict=True):
        print(f"{entry} on {chip}: {resources}")
        assert not faults, f"{entry} on {chip}: {', '.join(faults)}"


@pytest.mark.parametrize(
    ("dtype", "resources", "fault"),
    [
        (torch.float16, {}, None),
        (torch.float16, {"scalar_spills": 3}, None),
        (torch.float16, {"spills": 2}, "2 spills"),
        (torch.float16, {"shared": 163 * 1024 + 1}, "166913 bytes of shared memory, the chip has 166912"),
        (torch.bfloat16, {"matrix": {}}, "no matrix instruction HMMA"),
        (torch.bfloat16, {"matrix": {}, "multiplies": False}, None),
        (torch.float32, {"matrix": {}}, None),
    ],
    ids=str,
)
def test_faults_are_named(dtype, resources, fault, compiler):
    assert compiler.submit(triton_compiler.faults_of, dtype, **resources).result() == ([fault] if fault else [])


def test_a_tile_that_is_too_large_spills(compiler):
    (fault,) = compiler.submit(triton_compiler.spills_of_a_tile_that_is_too_large).result()
    assert fault.endswith("spills")
