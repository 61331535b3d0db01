"""Linear and flow attention on the CPU are as fast and small as they should be, three tenths off for noise."""

import time

import pytest
import torch

from visionattn_kernels import OPS
from visionattn_kernels.baselines import BASELINES, SHAPES
from visionattn_kernels.benchmark import interleaved, peak_memory
from visionattn_kernels.testing import evaluate, random_direction

pytestmark = [pytest.mark.speed, pytest.mark.usefixtures("one_thread")]

NOISE = 0.7
TARGET = 0.97


@pytest.mark.parametrize(
    "case", SHAPES["linear_attention"] + SHAPES["flow_attention"], ids=lambda case: f"{case.op} {case}"
)
def test_as_fast_as_the_families_code_and_smaller(case):
    tensors = case.tensors()
    # One projection makes query, key and value: (B, N, 3, heads, D) of tokens, and MALA (B, 3, heads, D, N) of a map.
    order = (0, 2, 1, 4, 3) if "rotary" in tensors else (0, 3, 2, 1, 4)
    stacked = torch.stack([tensors.pop(name).detach() for name in ("query", "key", "value")], 2)
    packed = stacked.permute(order).contiguous().permute(order)
    tensors |= {name: x.requires_grad_() for name, x in zip(("query", "key", "value"), packed.unbind(2), strict=True)}
    calls = {"ours": OPS[case.op].call, "theirs": BASELINES[case.op]}
    forward = {name: lambda call=call: call(**tensors, **case.settings).detach() for name, call in calls.items()}
    direction = random_direction(forward["ours"]())
    both = {name: lambda call=call: evaluate(call, case, tensors, direction) for name, call in calls.items()}
    for timed in (forward, both):
        times = interleaved(timed, clock=time.process_time)
        assert times["theirs"] / times["ours"] >= NOISE * TARGET
    assert peak_memory(forward["ours"]) <= peak_memory(forward["theirs"])
