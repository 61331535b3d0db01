"""What all tests share: the names that visionattn registers."""

import sys
from pathlib import Path

import timm

_TIMM_NAMES = set(timm.list_models())

import visionattn  # noqa: E402, F401  (registers the models)

OURS = sorted(set(timm.list_models()) - _TIMM_NAMES)
TINY = [name for name in OURS if name.startswith("test_")]
PUBLISHED = [name for name in OURS if name not in TINY]

# The reference answers come with the module that made them.
sys.path.insert(0, str(Path(__file__).parent / "golden"))


def pytest_generate_tests(metafunc):
    """`tiny` runs a test on every family's smallest model, `variant` on every published variant."""
    if "tiny" in metafunc.fixturenames:
        metafunc.parametrize("tiny", TINY)
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", PUBLISHED)
