"""Triton stays out of the way: nothing imports it before a CUDA tensor arrives."""

import subprocess
import sys

import pytest

LOADED = """
import sys
import visionattn_kernels
ours = [name for name in sys.modules if name.startswith("visionattn_kernels.triton")]
assert not ours, ours
"""

ABSENT = """
import sys
sys.modules["triton"] = None
import torch
from visionattn_kernels import neighborhood_attention
x = torch.randn(1, 1, 4, 4, 8, requires_grad=True)
neighborhood_attention(x, x, x, kernel_size=3).sum().backward()
assert x.grad.isfinite().all()
"""


@pytest.mark.parametrize("program", [LOADED, ABSENT], ids=["unasked", "absent"])
def test_the_operators_work_without_triton(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
