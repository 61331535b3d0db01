"""The backbones; importing this package registers every one with timm."""

from visionattn.backbones import nat as nat
