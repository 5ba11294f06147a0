"""Convolution of 3 x 3 with a quarter of the multiplications, on the CPU."""

from winograd.ops import conv3x3, is_compiled, is_faster, transform_weight, weight_gradient

__all__ = ["conv3x3", "is_compiled", "is_faster", "transform_weight", "weight_gradient"]
