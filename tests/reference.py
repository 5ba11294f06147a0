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


def _samples(start, end, bins, ratio, aligned):
    """The sample positions of each bin along an axis, in the boxes' arithmetic."""
    number = np.asarray(start).dtype.type
    shift = number(0.5 if aligned else 0)
    start, end = start - shift, end - shift
    side = end - start if aligned else max(end - start, number(1))
    bin_side = side / number(bins)
    count = ratio or max(0, int(np.ceil(bin_side)))
    return [
        [start + number(p) * bin_side + (number(i) + number(0.5)) * bin_side / number(count)
         for i in range(count)]
        for p in range(bins)
    ]  # fmt: skip


def roi_align(features, boxes, box_index, height, width, ratio, aligned):
    """features [B, C, H, W], boxes [R, 4] in cells -> [R, C, h, w] float64. Finite boxes."""
    _, channels, rows, columns = features.shape
    crops = np.zeros((len(boxes), channels, height, width))

    def value(r, y, x):
        if not (-1 <= y <= rows and -1 <= x <= columns):
            return 0.0
        y, x = min(max(float(y), 0), rows - 1), min(max(float(x), 0), columns - 1)
        return sum(
            (1 - abs(y - row)) * (1 - abs(x - column)) * features[box_index[r], :, row, column]
            for row in {int(np.floor(y)), int(np.ceil(y))}
            for column in {int(np.floor(x)), int(np.ceil(x))}
        )

    for r, (y1, x1, y2, x2) in enumerate(boxes):
        for i, bin_y in enumerate(_samples(y1, y2, height, ratio, aligned)):
            for j, bin_x in enumerate(_samples(x1, x2, width, ratio, aligned)):
                total = sum(value(r, y, x) for y in bin_y for x in bin_x)
                crops[r, :, i, j] = total / max(len(bin_y) * len(bin_x), 1)
    return crops
