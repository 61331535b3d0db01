"""The names that visionattn registers, for tests that run on each of them."""

import timm

_TIMM_NAMES = set(timm.list_models())

import visionattn  # noqa: E402, F401  (registers the models)

OURS = sorted(set(timm.list_models()) - _TIMM_NAMES)
TINY = [name for name in OURS if name.startswith("test_")]
PUBLISHED = [name for name in OURS if name not in TINY]
