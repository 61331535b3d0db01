"""Where published weights lie, and how a file of weights is opened without executing anything in it."""

from visionattn.weights.reader import read_weights
from visionattn.weights.sources import Source, fetch, source_of

__all__ = ["Source", "fetch", "read_weights", "source_of"]
