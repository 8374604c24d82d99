"""Official transformer names <-> diffusers names, for the parity tests: the product's own map."""

from musubi_tuner.ltxv2.transformer.diffusers_names import diffusers_tensor as to_diffusers

__all__ = ["to_diffusers"]
