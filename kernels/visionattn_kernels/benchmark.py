"""Times and memory of the operators beside their baselines, in one process, interleaved."""

from __future__ import annotations

import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from visionattn_kernels.baselines import BASELINES, SHAPES
from visionattn_kernels.op import OPS
from visionattn_kernels.ops.routed_attention import region_routes
from visionattn_kernels.testing import (
    Case,
    aggregate,
    check,
    evaluate,
    flow,
    halo,
    linear,
    neighborhood,
    random_direction,
    routed,
)

# What is measured on square maps of growing sides. Regions of routed attention keep their size, 8x8.
SIZED: dict[str, Callable[[int], Case]] = {
    "neighborhood_attention": lambda side: neighborhood(1, 1, side, side, 32, kernel_size=7, bias=True),
    "neighborhood_aggregate": lambda side: aggregate(1, 1, side, side, 16, kernel_size=7),
    "routed_attention": lambda side: routed(1, 1, side * side // 64, 64, 32, topk=4),
    "halo_attention": lambda side: halo(1, 1, side, side, 16, block_size=8, halo_size=3),
    "linear_attention": lambda side: linear(1, 2, side * side, 32, normalization="subtraction"),
    "flow_attention": lambda side: flow(1, 2, side * side, 32),
}
# Choosing the routes is no part of routed attention: it is quadratic in the regions, and measured by this name.
ROUTES = "region_routes"


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


def keep_memory() -> None:
    """Let glibc keep what is freed, for the rest of the process; elsewhere do nothing.

    It gives blocks above 32 MiB back to the system, which clears them before they come again: where maps are that
    large, any operation would take longer a pixel than where they are smaller, and seem to grow faster than it does.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at the heap's end stays


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


# How the models that use an operator lay out query, key and value, stacked behind the heads: the order of the axes in
# memory. A rotation is by positions, and where tokens have it they come as the maps of a convolution.
STACKED = {
    "routed_attention": (0, 3, 4, 2, 1, 5),
    "linear_attention": (0, 3, 2, 1, 4),
    "flow_attention": (0, 3, 2, 1, 4),
    "rotary": (0, 2, 1, 4, 3),
}


def projected(case: Case) -> dict[str, Tensor]:
    """The case's tensors with query, key and value as the models lay them out, where these are of one projection.

    They are views of its result: (B, N, 3, heads, D) of tokens, (B, R, T, 3, heads, D) of tokens in regions, and of
    maps, whose positions give a rotation, (B, 3, heads, D, N).
    """
    tensors = case.tensors()
    order = STACKED.get("rotary" if "rotary" in tensors else case.op)
    if order is None:
        return tensors
    stacked = torch.stack([tensors[name].detach() for name in ("query", "key", "value")], 2)
    back = sorted(range(stacked.ndim), key=order.__getitem__)
    views = stacked.permute(order).contiguous().permute(back).unbind(2)
    return tensors | {name: x.requires_grad_() for name, x in zip(("query", "key", "value"), views, strict=True)}


def compare(case: Case, rounds: int = 7, clock: Callable[[], float] = time.process_time) -> Comparison:
    """Time the operator of `case` beside its baseline.

    Raises:
        AssertionError: The operator's results are not the baseline's, within the error budget; nothing is timed.
    """
    calls = {"ours": OPS[case.op].call, "baseline": BASELINES[case.op]}
    check(case, calls["ours"], reference=calls["baseline"])
    tensors = projected(case)
    forward = {name: lambda call=call: _forward(call, case, tensors) for name, call in calls.items()}
    direction = random_direction(forward["ours"]())
    both = {name: lambda call=call: evaluate(call, case, tensors, direction) for name, call in calls.items()}
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


@dataclass(frozen=True)
class Growth:
    """What a call costs on square maps of growing sides.

    Attributes:
        name: What was called.
        seconds: By side, the median time.
        memory: By side, the bytes that the call takes at most.
    """

    name: str
    seconds: dict[int, float]
    memory: dict[int, int]


def slope(values: dict[int, float]) -> float:
    """Of the straight line that fits log value over log pixels best, by side; 1 is linear in the pixels.

    Raises:
        ValueError: There are fewer than two sides.
    """
    if len(values) < 2:
        raise ValueError(f"a slope needs two sides or more, got {list(values)}")
    pixels, costs = (torch.tensor([math.log(x) for x in xs]) for xs in ([s * s for s in values], values.values()))
    pixels, costs = pixels - pixels.mean(), costs - costs.mean()
    return float((pixels * costs).sum() / (pixels * pixels).sum())


def grow(
    name: str,
    make: Callable[[int], Callable[[], object]],
    sides: Sequence[int],
    rounds: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> Growth:
    """Measure the call that `make` makes for each side, the sides taking turns."""
    calls = {side: make(side) for side in sides}
    seconds = interleaved(calls, rounds, clock)
    return Growth(name, seconds, {side: peak_memory(call) for side, call in calls.items()})


def growing_operator(name: str) -> Callable[[int], Callable[[], object]]:
    """For `grow`: forward and backward of an operator, or the choice of routes.

    Raises:
        ValueError: There is no such operator.
    """
    if name not in SIZED and name != ROUTES:
        raise ValueError(f"op must be one of {sorted([*SIZED, ROUTES])}, got {name!r}")

    def make(side: int) -> Callable[[], object]:
        case = SIZED["routed_attention" if name == ROUTES else name](side)
        tensors = case.tensors()
        if name == ROUTES:
            return lambda: region_routes(tensors["query"], tensors["key"], 4)
        direction = random_direction(_forward(OPS[name].call, case, tensors))
        return lambda: evaluate(OPS[name].call, case, tensors, direction)

    return make
