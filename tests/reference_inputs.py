"""Inputs for which the reference was run, made by formula."""

import zlib

import numpy as np


def uniform(key, shape=None):
    """float64 numbers in [0, 1), the same on every platform."""
    return np.random.RandomState(zlib.crc32(key.encode())).random_sample(shape)


def synthetic_image(height, width):
    """Image "synth" of the reference: two gradients, 24 rectangles and noise, uint8 RGB."""
    random = np.random.RandomState(7)
    y, x = np.mgrid[:height, :width]
    diagonal = ((y + x) * 100) // (height + width) + 60
    image = np.stack([y * 160 // height + 30, x * 160 // width + 30, diagonal], axis=2)
    for _ in range(24):
        u = random.random_sample(7)
        h, w = int(u[0] * height * 0.4) + 8, int(u[1] * width * 0.4) + 8
        top, left = int(u[2] * (height - h)), int(u[3] * (width - w))
        image[top : top + h, left : left + w] = np.floor(u[4:7] * 240)
    image += np.floor(random.random_sample((height, width, 3)) * 16).astype(image.dtype)
    return image.clip(0, 255).astype(np.uint8)
