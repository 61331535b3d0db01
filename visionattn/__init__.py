"""Vision backbones of the attention literature: `import visionattn` registers them with timm."""

from visionattn import backbones as _backbones  # noqa: F401  (registers on import)

__version__ = "0.1.0"
