"""What runs in the processes that compile kernels; Triton is imported only there."""

from dataclasses import replace

import torch


def heaviest_entries(dtype: torch.dtype, dim: int) -> list:
    """Entries of every kernel for `dtype` and `dim`, of each operator's last variant, the one that does the most."""
    from visionattn_kernels.triton.evidence.inspect import entries

    found = list(entries((dtype,), (dim,)))
    last = {entry.operator: entry.variant for entry in found}
    return [entry for entry in found if entry.variant == last[entry.operator]]


def inspected(entry, chip: str) -> tuple[str, list[str]]:
    """Resources of the compiled entry, printed, and its faults."""
    from visionattn_kernels.triton.evidence.inspect import faults, inspect

    resources = inspect(entry, chip)
    return str(resources), faults(entry, chip, resources)


def faults_of(dtype: torch.dtype, multiplies: bool = True, **resources) -> list[str]:
    """Faults that such resources have on an A100."""
    from visionattn_kernels.triton.evidence.inspect import Resources, entries, faults

    fine = {"registers": 100, "spills": 0, "scalar_spills": 0, "shared": 1024, "matrix": {"HMMA": 8}}
    entry = replace(next(entries((dtype,), (32,))), multiplies=multiplies)
    return faults(entry, "sm_80", Resources(**{**fine, **resources}))


def spills_of_a_tile_that_is_too_large() -> list[str]:
    """Faults of the forward with a tile four times that of the table, which cannot fit in registers."""
    from visionattn_kernels.triton import neighborhood_attention as module
    from visionattn_kernels.triton.evidence.inspect import entries, faults, inspect

    entry = next(entries((torch.bfloat16,), (128,), ("neighborhood_attention",)))
    table = module.FORWARD[2, 128]
    module.FORWARD[2, 128] = table._replace(tile=(16, 16))
    try:
        return faults(entry, "sm_80", inspect(entry, "sm_80"))
    finally:
        module.FORWARD[2, 128] = table
