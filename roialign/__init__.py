"""What a detector reads in boxes: crop and resize in TensorFlow's arithmetic, and RoIAlign.

Both have kernels for CPU and CUDA. The compiled ones are loaded by ops.py, after the schemas.
"""

from roialign.align import roi_align
from roialign.ops import crop_and_resize, is_compiled

__all__ = ["crop_and_resize", "is_compiled", "roi_align"]
