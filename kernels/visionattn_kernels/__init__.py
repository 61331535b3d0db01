"""The attention operators behind visionattn, usable without it."""
