"""The tables of `kernels/README.md`: what every kernel takes of every chip, and what it moves and multiplies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context

import torch
import triton
from torch import Tensor

from visionattn_kernels.triton.evidence.inspect import (
    CHIPS,
    Entry,
    Resources,
    distinct,
    entries,
    examples,
    faults,
    inspect,
)
from visionattn_kernels.triton.evidence.interpret import counting
from visionattn_kernels.triton.evidence.readme import source_hash
from visionattn_kernels.triton.launch import Launch, run


@dataclass(frozen=True)
class Peak:
    """Published peak figures of a GPU.

    Attributes:
        flops: Dense 16-bit products of its matrix units, a second.
        bandwidth: Bytes of its memory, a second.
    """

    flops: float
    bandwidth: float


# NVIDIA's data sheets of the A100 (SXM, 80 GB) and the H100 (SXM); the latter prints twice the flops, "with sparsity".
PEAKS = {"A100": Peak(312e12, 2.039e12), "H100": Peak(989e12, 3.35e12)}


def resource_rows(operator: str, workers: int | None = None) -> Iterator[tuple[Entry, dict[str, Resources], list[str]]]:
    """Every entry of an operator compiled for every chip, in as many processes as there are processors.

    Yields:
        The entry, its resources by chip, and its faults with the chip they were found on.
    """
    lines = list(entries(operators=(operator,)))
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        compiled = {chip: pool.map(inspect, lines, [chip] * len(lines)) for chip in CHIPS}
        for entry, *found in zip(lines, *compiled.values(), strict=True):
            resources = dict(zip(CHIPS, found, strict=True))
            wrong = [f"{chip}: {fault}" for chip, taken in resources.items() for fault in faults(entry, chip, taken)]
            yield entry, resources, wrong


def resource_header() -> str:
    """First two lines of the table of resources."""
    return table_line("kernel", *CHIPS) + "\n" + table_line(*["---"] * (1 + len(CHIPS)))


def traffic_table(operator: str) -> str:
    """What a call of an operator moves and multiplies, counted in the interpreter, in float16 with 32 channels a head.

    Times are the roofline's: the larger of the time to move every tensor once and that to multiply what is counted.
    """
    titles = ("kernel", "loaded + stored", "every tensor once", "ratio", "flops", "least flops", "ratio")
    lines = [table_line(*titles, *PEAKS), table_line(*["---"] * (len(titles) + len(PEAKS)))]
    for variant, launches in examples(operator, torch.float16, 32, "cpu").items():
        lines += [_traffic_line(launch, variant) for _, launch in distinct(launches)]
    return "\n".join(lines)


def _traffic_line(launch: Launch, variant: str) -> str:
    with counting() as counts:
        run([launch], torch.device("cpu"))
    once = sum(x.numel() * x.element_size() for x in launch.arguments.values() if isinstance(x, Tensor))
    moved = counts.loaded + counts.stored
    bounds = [max(once / peak.bandwidth, counts.flops / peak.flops) for peak in PEAKS.values()]
    return table_line(
        launch.kernel.__name__.removesuffix("_kernel") + (f" ({variant})" if variant else ""),
        f"{moved / 1e6:.2f} MB",
        f"{once / 1e6:.2f} MB",
        f"{moved / once:.2f}",
        f"{counts.flops / 1e6:.0f} M",
        f"{launch.flops / 1e6:.0f} M",
        f"{counts.flops / launch.flops:.2f}" if launch.flops else "-",
        *(f"{1e6 * bound:.2f} µs" for bound in bounds),
    )


def table_line(*cells: str) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def stamp(operator: str) -> str:
    """What a table describes: the kernels of an operator, compiler and day."""
    return f"Kernels {source_hash(operator)}, Triton {triton.__version__}, {date.today().isoformat()}."
