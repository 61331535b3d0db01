"""Vision backbones of the attention literature, registered into timm on import."""
