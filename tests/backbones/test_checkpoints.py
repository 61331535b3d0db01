"""A checkpoint either loads whole or is refused with a message that names what does not fit."""

import re

import pytest
import timm
import torch
from golden import Golden
from zoo import TINY


def stage_block(stage: int) -> str:
    """How the names of a stage's first block begin; timm has `blocks` for stages, or stages that are lists."""
    return rf"(stages\.{stage}(\.blocks)?|blocks\.{stage})\.0\."


def create(name: str, state_dict: dict):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict})


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_wrapped_checkpoints_load(tiny, wrapper):
    weights = timm.create_model(tiny).state_dict()
    loaded = create(tiny, {wrapper: weights, "epoch": 3}).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in weights.items())


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_checkpoints_of_wrapped_and_compiled_models_load(wrapped):
    weights = timm.create_model("test_nat").state_dict()
    loaded = create("test_nat", {wrapped + name: x for name, x in weights.items()}).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in weights.items())


def test_averaged_weights_win(tiny):
    plain, averaged = (timm.create_model(tiny).state_dict() for _ in range(2))
    loaded = create(tiny, {"model": plain, "model_ema": averaged}).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in averaged.items())


def test_a_missing_name_is_told(tiny):
    weights = timm.create_model(tiny).state_dict()
    name = next(name for name, x in weights.items() if re.match(stage_block(2), name) and x.ndim > 1)
    del weights[name]
    with pytest.raises(ValueError, match=rf"1 names are missing, first '{name}'"):
        create(tiny, weights)


def test_another_shape_is_told(tiny):
    weights = timm.create_model(tiny).state_dict()
    name = next(name for name in weights if re.match(stage_block(1), name) and name.endswith(".bias"))
    weights[name] = weights[name][:-1]
    with pytest.raises(ValueError, match=rf"'{name}': got \(\d+,\), wanted \(\d+,\)"):
        create(tiny, weights)


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny"])
def test_a_checkpoint_of_another_variant_is_refused(name):
    golden = Golden.load(f"{__file__}/../../golden/{name}.npz".replace("test_checkpoints.py/../", ""))
    with pytest.raises(ValueError, match="checkpoint does not fit"):
        create({"nat_mini": "nat_tiny", "dinat_s_tiny": "dinat_s_small"}[name], golden.state_dict())


def test_a_checkpoint_of_another_family_is_refused(tiny):
    other = next(name for name in reversed(TINY) if type(timm.create_model(name)) is not type(timm.create_model(tiny)))
    with pytest.raises(ValueError, match="checkpoint does not fit"):
        create(tiny, timm.create_model(other).state_dict())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_truncated_file_is_named(tiny, suffix, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / f"weights.{suffix}"
    weights = timm.create_model(tiny).state_dict()
    (save_file if suffix == "safetensors" else torch.save)(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=str(path)):
        timm.create_model(tiny, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
