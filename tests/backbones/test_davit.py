"""What only DaViT has: timm's computation and timm's names under the authors' stochastic depth."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.davit import DaVit

TINY = {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "window_size": 4}


@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_of_timm_give_the_answers_of_timm(wrapped):
    torch.manual_seed(0)
    theirs = DaVit(**TINY).eval()
    weights = {"state_dict": theirs.state_dict()} if wrapped else theirs.state_dict()
    ours = timm.create_model("test_davit", pretrained=True, pretrained_cfg_overlay={"state_dict": weights}).eval()
    x = torch.randn(2, 3, 65, 90)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge", "giant"])
def test_every_variant_has_the_names_and_shapes_of_timm(size):
    with torch.device("meta"):
        ours, theirs = (timm.create_model(f"davit_{size}{suffix}").state_dict() for suffix in ("_va", ""))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}


def test_stochastic_depth_grows_from_block_to_block():
    model = timm.create_model("test_davit", drop_path_rate=0.9)
    blocks = [block for stage in model.stages for pair in stage.blocks for block in pair]
    for paths in ([block.drop_path1 for block in blocks], [block.drop_path2 for block in blocks]):
        rates = [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths]
        assert rates == pytest.approx([0.1 * i for i in range(10)])


def test_the_window_is_no_part_of_the_weights():
    small, large = (timm.create_model("test_davit", window_size=side).state_dict() for side in (4, 12))
    assert {name: x.shape for name, x in small.items()} == {name: x.shape for name, x in large.items()}
