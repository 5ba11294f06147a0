"""Non-maximum suppression in TensorFlow's arithmetic, with kernels for CPU and CUDA."""

from nms.ops import batched_nms, is_compiled, nms

__all__ = ["batched_nms", "is_compiled", "nms"]
