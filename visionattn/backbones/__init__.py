"""The backbones; importing this package registers every one with timm."""

from visionattn.backbones import biformer, davit_va, dinat_s, halonet, nat, nat_isotropic, ulsam, van

__all__ = ["biformer", "davit_va", "dinat_s", "halonet", "nat", "nat_isotropic", "ulsam", "van"]
