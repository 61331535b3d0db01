"""Pytest plugin: lets timm's own test files see the models that visionattn registers, and no others.

timm's tests parametrise over `timm.list_models`. The plugin imports visionattn first, narrows that function to the new
names (those in VISIONATTN_MODELS, separated by commas, if it is set) and drops every test that names no model of ours.
"""

import os

import timm
import timm.models

_before = set(timm.list_models())

import visionattn  # noqa: E402, F401  (registers the models)

_listed = timm.list_models
_wanted = set(filter(None, os.environ.get("VISIONATTN_MODELS", "").split(",")))
OURS = {name for name in set(_listed()) - _before if not _wanted or name in _wanted}


def _list_ours(filter="", module="", **options):
    """`timm.list_models` on our models. The module is ignored, so that all of ours are tested for intermediates."""
    return [name for name in _listed(filter, **options) if name.split(".")[0] in OURS]


timm.list_models = timm.models.list_models = _list_ours


def pytest_collection_modifyitems(config, items):
    """Keep the tests of our models; timm's tests of its own layers and models are not ours to run."""
    parameters = [getattr(item, "callspec", None) for item in items]
    kept = [
        item
        for item, spec in zip(items, parameters, strict=True)
        if spec is not None and str(spec.params.get("model_name", "")).split(".")[0] in OURS
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
