"""Experiment trackers through accelerate, beside the summary.csv that every run writes."""

from difflib import get_close_matches

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from visionattn.training.config import Config, flatten

_PROJECT = "visionattn"


def choose_trackers(names: list[str] | None) -> list[str]:
    """The trackers `names`, by default TensorBoard where it is installed.

    Raises:
        ValueError: accelerate knows no tracker of a name, or its package is missing.
    """
    available = [str(name) for name in get_available_trackers()]
    if names is None:
        return [name for name in available if name == "tensorboard"]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            nearest = get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1, cutoff=0.0)[0]
            raise ValueError(f"trackers: unknown {name!r}; the nearest known is {nearest!r}")
        if name not in available:
            raise ValueError(f"trackers: {name} is not installed, wanted the package {name} or trackers=[]")
    return list(names)


def begin_tracking(accelerator: Accelerator, config: Config) -> None:
    """Opens the trackers of `accelerator` and gives them the configuration; TensorBoard's lie in output/visionattn."""
    if accelerator.log_with:
        values = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in flatten(config).items()
        }
        accelerator.init_trackers(_PROJECT, config=values)


def end_tracking(accelerator: Accelerator) -> None:
    """Closes the trackers; the processes stay together, which `accelerator.end_training` would end."""
    for tracker in accelerator.trackers:
        tracker.finish()
