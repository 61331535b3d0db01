"""What our models answer with the weights of the reference answers, and how far that is from the authors' answers.

Used by tests/backbones/test_reference_answers.py, which bounds the differences, and by tools/make_cards.py, which
prints them.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from golden import Golden, difference, fill, image, probe

import visionattn  # noqa: F401  (registers the models)

FILES = sorted(Path(__file__).parent.glob("*.npz"))
# Where timm owns a name, ours ends in _va.
NAMES = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("visionattn.")]
PORTED = {path: name for path in FILES for name in (path.stem, f"{path.stem}_va") if name in NAMES}


def answers(golden: Golden, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits, features, gradient of the input and what modules add, as the reference file has them."""
    x = torch.from_numpy(image(*golden.input_shape)).requires_grad_()
    deltas = _record_deltas(golden, model)
    logits = model(x)
    (logits.flatten() * torch.from_numpy(probe(logits.numel()))).sum().backward()
    with torch.no_grad():
        features = model.forward_intermediates(x, intermediates_only=True)
    features = [_dense_norm(golden, i, feature) for i, feature in enumerate(features)]
    found = {"logits": logits.detach(), "grad_input": x.grad, **deltas}
    return found | {f"feature_{i}": feature for i, feature in enumerate(features)}


def differences(golden: Golden, found: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of each answer."""
    return {name: difference(answer.numpy(), golden.outputs[name]) for name, answer in found.items()}


def _record_deltas(golden: Golden, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Filled by the next forward with what modules add to their input, for nets whose logits hardly see them."""
    deltas = {}
    for answer in golden.meta["shapes"]:
        if answer.startswith("delta_"):

            def record(_, inputs, output, answer=answer):
                deltas[answer] = (output - inputs[0]).detach()

            model.get_submodule(answer.removeprefix("delta_")).register_forward_hook(record)
    return deltas


def _dense_norm(golden: Golden, index: int, feature: torch.Tensor) -> torch.Tensor:
    """The norm that the authors' detector puts on an output, where the reference features were taken behind one."""
    names = {name for name, _ in golden.meta.get("feature_manifest", [])}
    for name, eps in ((f"norm{index}", 1e-5), (f"extra_norms.{index}", 1e-6)):
        if f"{name}.weight" in names:
            channels = (feature.shape[1],)
            weight, bias = (torch.from_numpy(fill(f"{name}.{kind}", channels)) for kind in ("weight", "bias"))
            return F.layer_norm(feature.permute(0, 2, 3, 1), channels, weight, bias, eps).permute(0, 3, 1, 2)
    return feature
