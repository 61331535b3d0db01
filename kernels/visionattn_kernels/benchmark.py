"""Times and memory of the operators beside their baselines, in one process, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from visionattn_kernels.baselines import BASELINES, SHAPES
from visionattn_kernels.op import OPS
from visionattn_kernels.testing import Case, check, evaluate


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int = 7, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns, after one round that does not count.

    Args:
        calls: What to time, by name.
        rounds: Samples of each.
        clock: `time.perf_counter`, or `time.process_time` for one thread on a machine that does other work too.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                samples[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in samples.items()}


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator hands out at most at a time during `call`, beyond what is held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    changes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes), default=0)


@dataclass(frozen=True)
class Comparison:
    """An operator beside its baseline on one case.

    Attributes:
        case: What was computed.
        forward, both: Seconds of the operator, forward, and forward with backward.
        baseline_forward, baseline_both: The same of the baseline.
        memory, baseline_memory: Bytes that the forward takes at most, its result included.
    """

    case: Case
    forward: float
    both: float
    baseline_forward: float
    baseline_both: float
    memory: int
    baseline_memory: int

    @property
    def forward_ratio(self) -> float:
        """How many times as fast as the baseline forward is."""
        return self.baseline_forward / self.forward

    @property
    def both_ratio(self) -> float:
        """How many times as fast as the baseline forward with backward is."""
        return self.baseline_both / self.both


def compare(case: Case, rounds: int = 7, clock: Callable[[], float] = time.process_time) -> Comparison:
    """Time the operator of `case` beside its baseline.

    Raises:
        AssertionError: The operator's results are not the baseline's, within the error budget; nothing is timed.
    """
    calls = {"ours": OPS[case.op].call, "baseline": BASELINES[case.op]}
    check(case, calls["ours"], reference=calls["baseline"])
    tensors = case.tensors()
    forward = {name: lambda call=call: _forward(call, case, tensors) for name, call in calls.items()}
    both = {name: lambda call=call: evaluate(call, case, tensors) for name, call in calls.items()}
    forward_times, both_times = (interleaved(timed, rounds, clock) for timed in (forward, both))
    memory = {name: peak_memory(call) for name, call in forward.items()}
    return Comparison(
        case,
        forward_times["ours"],
        both_times["ours"],
        forward_times["baseline"],
        both_times["baseline"],
        memory["ours"],
        memory["baseline"],
    )


def _forward(call: Callable[..., Tensor], case: Case, tensors: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return call(**tensors, **case.settings)


def compare_all(op: str, rounds: int = 7, clock: Callable[[], float] = time.process_time) -> list[Comparison]:
    """Compare `op` with its baseline on all of its `SHAPES`.

    Raises:
        ValueError: There is no such operator, or it has no baseline.
    """
    if op not in SHAPES:
        raise ValueError(f"op must be one of {sorted(SHAPES)}, got {op!r}")
    return [compare(case, rounds, clock) for case in SHAPES[op]]
