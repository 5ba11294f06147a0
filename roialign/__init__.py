"""Crop and bilinear resize in TensorFlow's arithmetic, with kernels for CPU and CUDA."""

from roialign.ops import crop_and_resize, is_compiled

__all__ = ["crop_and_resize", "is_compiled"]
