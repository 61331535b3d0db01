"""Weights, gradients and optimiser state that are shared among the processes (FSDP2), and whole again in a checkpoint.

The sharding is torch's `fully_shard`. accelerate 1.15 gives CPUs no FSDP (`AcceleratorState.__init__` turns every kind
of processes into `FSDP` but `MULTI_CPU`), so that a use of its plugin could not be tested. Of a model that is sharded
already it takes care all the same: it adds autocast, clips gradients, and does not wrap it for DDP.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

from visionattn.training.model import blocks

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_launcher() -> None:
    """Raises ValueError where accelerate's own FSDP is asked for, which on CPUs would silently be DDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("ACCELERATE_USE_FSDP is set, as by accelerate launch --use_fsdp; wanted fsdp=true instead")


def shard(model: nn.Module, processes: int) -> None:
    """Shares the weights of `model` among the processes, in place: each block by itself, then the rest.

    Raises:
        ValueError: there is one process only, or the weights are channels last in memory.
    """
    if processes == 1:
        raise ValueError("fsdp=true with one process, wanted several, as by torchrun --nproc_per_node 2")
    if any(not parameter.is_contiguous() for parameter in model.parameters()):
        raise ValueError("fsdp=true wants contiguous weights, wanted model.channels_last=false")
    for block in blocks(model):
        fully_shard(block)
    fully_shard(model)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state of `model`; of a shared one the whole, in the first process only and wanting them all."""
    return get_model_state_dict(model, options=_WHOLE) if isinstance(model, FSDPModule) else model.state_dict()


def load_whole_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads what `whole_state` gave, which every process must have.

    Raises:
        RuntimeError: it is of another model.
    """
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, state, options=_WHOLE)
    else:
        model.load_state_dict(state)


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As `whole_state`, of the optimiser of `model`; with shared weights by their names and not by their numbers."""
    if isinstance(model, FSDPModule):
        return get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    return optimizer.state_dict()


def load_whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `whole_optimizer_state` gave, which every process must have."""
    if isinstance(model, FSDPModule):
        set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)
    else:
        optimizer.load_state_dict(state)
