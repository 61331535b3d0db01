"""The backbones; importing this package registers every one with timm."""

from visionattn.backbones import (
    agent,
    biformer,
    davit_va,
    dinat_s,
    ela,
    halonet,
    inline,
    l2vit,
    mala,
    nat,
    nat_isotropic,
    ulsam,
    van,
)

__all__ = [
    "agent",
    "biformer",
    "davit_va",
    "dinat_s",
    "ela",
    "halonet",
    "inline",
    "l2vit",
    "mala",
    "nat",
    "nat_isotropic",
    "ulsam",
    "van",
]
