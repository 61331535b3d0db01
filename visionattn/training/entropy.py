"""How spread out the attention of each module is: a fall towards 0 announces a training that breaks down.

(https://arxiv.org/abs/2303.06296.) No module is asked to keep its weights: where an operator of ours gives only the
logarithm l of the softmax's sum, the entropy follows from l at scores scaled by t: H = l - dl/dt at t = 1.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

_SOFTMAXES = ("aten::_softmax", "aten::_safe_softmax")
_WITH_SUMS = tuple(f"visionattn::{name}_attention" for name in ("neighborhood", "routed", "halo"))
_STEP = 1e-2


@torch.no_grad()
def attention_entropy(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Mean entropy in nats, over images, heads and queries, of each module that calls a softmax or our operators.

    Args:
        model: any; it is run in evaluation mode and put back into its own.
        images: (B, C, H, W); a few suffice, since the weights of plain attention are held in memory.

    Returns:
        {name of the module: entropy}, empty for a model without attention. Linear attention has no weights to measure.
    """
    training = model.training
    watch = _Watch()
    hooks = []
    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(watch.enter(name)), module.register_forward_hook(watch.leave)]
    try:
        # Plain attention shows its softmax only where it is not fused.
        with sdpa_kernel(SDPBackend.MATH), watch:
            model.eval()(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: sum(values) / len(values) for name, values in watch.seen.items()}


class _Watch(TorchDispatchMode):
    """Notes the entropy of each softmax that passes, under the innermost module that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.seen: defaultdict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `func`, and look at what it gives."""
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if name in _SOFTMAXES and out.shape[args[1]] > 1:
            weights = out.float()
            self._note(-torch.special.xlogy(weights, weights).sum(args[1]).mean())
        elif name in _WITH_SUMS:
            self._note((out[1].float() - _slope(func, args)).mean())
        return out

    def enter(self, name: str) -> Callable[..., None]:
        """A hook that says that the module `name` begins."""

        def hook(module: nn.Module, inputs: tuple) -> None:
            self.names.append(name)

        return hook

    def leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        """A hook that says that the module has ended."""
        self.names.pop()

    def _note(self, entropy: Tensor) -> None:
        self.seen[self.names[-1] if self.names else ""].append(entropy.item())


def _slope(func: Any, args: tuple) -> Tensor:
    """Derivative by the factor of the scores at 1, of the logarithms that `func` gives as its second result.

    All scores have the query or the bias as a factor. Central difference: with steps of 1/100 its error is a few 1e-4
    of a nat in float32, from rounding (50 x 6e-8 / 1e-2) and from the third cumulant of the scores.
    """
    names = [argument.name for argument in func._schema.arguments]

    def sums(factor: float) -> Tensor:
        scaled = [
            value * factor if name in ("query", "bias") and value is not None else value
            for name, value in zip(names, args, strict=False)
        ]
        return func(*scaled)[1].float()

    return (sums(1 + _STEP) - sums(1 - _STEP)) / (2 * _STEP)
