"""The families on linear attention stay finite and near float32 in low precision, on large maps and loud images.

Sums over tokens grow beyond what float16 holds, and divisions lose what bfloat16 rounds: the operator sums and divides
in float32, and these tests see whether what surrounds it keeps up.
"""

import pytest
import timm
import torch
from zoo import TINY

FAMILIES = ("test_agent", "test_inline", "test_mala", "test_l2vit")
NAMES = [name for name in TINY if name.startswith(FAMILIES)]
# Sides with so many tokens that a sum over them in the type itself would round away or overflow.
SIDES = [pytest.param(torch.bfloat16, 1024, marks=pytest.mark.slow), (torch.float16, 256)]


def test_every_family_takes_part():
    assert all(any(name.startswith(family) for name in NAMES) for family in FAMILIES)


@pytest.mark.parametrize("loudness", [1.0, 100.0])
@pytest.mark.parametrize(("dtype", "side"), SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_stays_finite_and_within_its_rounding(name, dtype, side, loudness):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = loudness * torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = [*model.forward_intermediates(x, intermediates_only=True), model(x)]
        with torch.autocast("cpu", dtype):
            got = [*model.forward_intermediates(x, intermediates_only=True), model(x)]
    for low, exact in zip(got, want, strict=True):
        assert torch.isfinite(low).all()
        # One rounding a layer, of which there are fewer than 64; errors add as squares.
        assert (low - exact).norm() <= 64**0.5 * torch.finfo(dtype).eps * exact.norm(), tuple(exact.shape)
