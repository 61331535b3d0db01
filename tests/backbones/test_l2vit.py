"""What only L²ViT has: the least divisor of its linear attention, and windows that no weight depends on."""

from pathlib import Path

import pytest
import timm
import torch
from golden import Golden, image

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_clamp_is_100_as_trained_and_another_one_gives_other_answers():
    golden = Golden.load(GOLDEN / "l2vit_tiny.npz")
    overlay = {"state_dict": golden.state_dict()}
    trained, given, other = (
        timm.create_model("l2vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **clamp).eval()
        for clamp in ({}, {"clamp": 100.0}, {"clamp": 1.0})
    )
    x = torch.from_numpy(image(2, 3, 96, 160))
    with torch.no_grad():
        want = trained(x)
        assert torch.equal(given(x), want)
        # At this size the clamp decides 85 % of the last stage's divisors and a tenth of the logits.
        assert (other(x) - want).norm() > 0.05 * want.norm()


def test_the_weights_of_windows_of_7_fit_windows_of_12():
    small, large = (timm.create_model("test_l2vit", window_size=size).eval() for size in (7, 12))
    large.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(small(x), large(x))


@pytest.mark.parametrize("settings", [{"window_size": 0}, {"clamp": 0.0}])
def test_windows_and_clamps_that_are_not_positive_are_refused(settings):
    with pytest.raises(ValueError, match="window_size and clamp must be positive"):
        timm.create_model("test_l2vit", **settings)
