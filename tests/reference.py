"""Slow oracles of the operators: loops over single numbers, straight from the definitions."""

import numpy as np


def iou(a, b):
    """Intersection over union of two boxes (y1, x1, y2, x2), in their own arithmetic."""
    height = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    width = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - height * width
    return height * width / union if union > 0 else 0.0


def nms(boxes, scores, threshold, group=None):
    """Indices of the kept boxes in order of rank. Finite, ordered boxes in float64."""
    boxes = np.asarray(boxes, np.float64).tolist()
    group = np.zeros(len(boxes)) if group is None else group
    keep = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(group[i] != group[k] or iou(boxes[i], boxes[k]) <= threshold for k in keep):
            keep.append(i)
    return keep


def _position(start, end, i, count, size):
    start, end, last = np.float32(start), np.float32(end), np.float32(size - 1)
    if count == 1:
        return np.float32(0.5) * (start + end) * last
    return start * last + np.float32(i) * ((end - start) * last / np.float32(count - 1))


def crop_and_resize(image, boxes, box_index, crop_height, crop_width, extrapolation_value=0.0):
    """image [B, C, H, W], boxes [R, 4] -> [R, C, h, w] float64; the positions are float32."""
    _, channels, height, width = image.shape
    crops = np.full((len(boxes), channels, crop_height, crop_width), extrapolation_value)
    for r, (y1, x1, y2, x2) in enumerate(boxes):
        for i in range(crop_height):
            for j in range(crop_width):
                y = _position(y1, y2, i, crop_height, height)
                x = _position(x1, x2, j, crop_width, width)
                if not (0 <= y <= height - 1 and 0 <= x <= width - 1):
                    continue
                value = 0.0
                for row in {int(np.floor(y)), int(np.ceil(y))}:
                    for column in {int(np.floor(x)), int(np.ceil(x))}:
                        share = (1 - abs(float(y) - row)) * (1 - abs(float(x) - column))
                        value = value + share * image[box_index[r], :, row, column].astype(float)
                crops[r, :, i, j] = value
    return crops
