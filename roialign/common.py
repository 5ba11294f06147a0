"""What the operators of roialign share: the checks of their kernels and the tensor they return."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Beyond 2^24, a float32 cannot tell the last pixel from the one after.
MAX_SIDE = 1 << 24


class Checks(NamedTuple):
    """What the kernels of an operator refuse, and how the messages call it and what it crops."""

    operator: str
    image: str

    def kinds(self, values: Tensor, boxes: Tensor, box_index: Tensor) -> None:
        """What every kernel refuses, the fake ones too, which mixed devices may lead to.

        Args:
            values: the image, or the gradient of the crops.
        """
        if values.dtype not in (torch.float32, torch.float64) or boxes.dtype != values.dtype:
            raise TypeError(
                f"{self.operator}: {self.image} and boxes must both be float32 or float64, got "
                f"{values.dtype} and {boxes.dtype}"
            )
        if box_index.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{self.operator}: box_index must be int32 or int64, got {box_index.dtype}"
            )
        if not values.device == boxes.device == box_index.device:
            raise ValueError(
                f"{self.operator}: {self.image}, boxes and box_index must be on one device, got "
                f"{values.device}, {boxes.device} and {box_index.device}"
            )
        if values.dim() != 4:
            raise ValueError(
                f"{self.operator}: {self.image} must be [B, C, H, W], or grad [R, C, h, w], got "
                f"shape {tuple(values.shape)}"
            )
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"{self.operator}: boxes must be [R, 4], got shape {tuple(boxes.shape)}"
            )

    def sizes(
        self, boxes: Tensor, box_index: Tensor, crop_size: Sequence[int], image_size: Sequence[int]
    ) -> None:
        """What else the kernels refuse, for crops (h, w) of images (B, H, W)."""
        if box_index.shape != boxes.shape[:1]:
            raise ValueError(
                f"{self.operator}: box_index must be [R] = [{len(boxes)}], got "
                f"{list(box_index.shape)}"
            )
        if min(crop_size) < 1:
            height, width = crop_size
            raise ValueError(
                f"{self.operator}: crops must be of at least one pixel, got {height} x {width}"
            )
        images, height, width = image_size
        if images < 0 or not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
            raise ValueError(
                f"{self.operator}: {self.image} must have sides of 1 to {MAX_SIDE} pixels, got "
                f"{images} of {height} x {width}"
            )
        known = (box_index >= 0) & (box_index < images)
        if known.device.type == "cpu" and not known.all():
            raise IndexError(
                f"{self.operator}: box_index must be within 0..{images - 1}, got "
                f"{box_index[~known][0]}"
            )

    def gradient(self, grad: Tensor, boxes: Tensor) -> None:
        """What the kernels of the gradient refuse besides."""
        if len(grad) != len(boxes):
            raise ValueError(
                f"{self.operator}: grad must be [R, C, h, w] with the R of boxes, got shapes "
                f"{tuple(grad.shape)} and {tuple(boxes.shape)}"
            )


def empty_like(values: Tensor, count: int, height: int, width: int) -> Tensor:
    """[count, C, height, width] with the channels, dtype, device and memory format of values."""
    last = not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (count, values.shape[1], height, width),
        dtype=values.dtype,
        device=values.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def to_float(values: Tensor) -> Tensor:
    """Half precision as float32, which the kernels take, under autocast."""
    return values if values.dtype == torch.float64 else values.float()
