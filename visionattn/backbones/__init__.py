"""The backbones; importing this package registers every one with timm."""

from visionattn.backbones import dinat_s, nat, nat_isotropic

__all__ = ["dinat_s", "nat", "nat_isotropic"]
