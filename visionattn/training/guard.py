"""What stops a training whose numbers are no longer numbers, and says where they began.

The loss of every batch is looked at before its gradients are applied, so the weights are still those that made it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class NotANumberError(ValueError):
    """The loss of a batch is infinite or not a number; the message names the batch and the first bad module."""


def check_loss(loss: Tensor, model: nn.Module, images: Tensor, batch: str) -> None:
    """Raises NotANumberError, with what `first_bad` finds, unless the loss () is finite.

    Args:
        loss: of the batch.
        model: that made it, its weights unchanged since.
        images: (B, C, H, W), as the model got them.
        batch: how the message names the batch.
    """
    if not torch.isfinite(loss):
        raise NotANumberError(
            f"the training loss is {loss.item()} in {batch}, wanted a number: {first_bad(model, images)}; "
            "a lower optimizer.lr, optimizer.clip_grad or precision=fp32 may help"
        )


@torch.no_grad()
def first_bad(model: nn.Module, images: Tensor) -> str:
    """Where the first number that is not finite comes from: pictures, a weight, a module of the forward, or none."""
    if not torch.isfinite(images).all():
        return "the pictures themselves hold such numbers"
    if isinstance(model, FSDPModule):
        return "the modules were not searched, which wants all processes, as the weights are shared among them"
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return f"the weight {name} already holds such numbers"
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not found and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(f"the first such numbers come out of the module {name} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "all modules gave finite numbers, so the loss itself overflows"


def _tensors(output: object) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output, however nested."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
