"""Draws the pictures of the README: python assets/make_pictures.py

Until weights ship with the library, the objects are found with a watershed in a photograph that
scikit-image brings, so the picture shows the drawing and not the network.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import data, filters, measure, segmentation

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import utils  # noqa: E402
import visualize  # noqa: E402


def coins() -> tuple[np.ndarray, np.ndarray]:
    """The photograph [H, W, 3] uint8 and masks [H, W, N] bool of its coins."""
    grey = data.coins()
    markers = np.where(grey < 30, 1, np.where(grey > 150, 2, 0))
    coin = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(grey), markers) == 2)
    labels = measure.label(coin)
    large = [region.label for region in measure.regionprops(labels) if region.area > 400]
    masks = [labels == label for label in large]
    return utils.as_uint8_image(grey), np.stack(masks, axis=2)


if __name__ == "__main__":
    image, masks = coins()
    class_ids = np.ones(masks.shape[2], np.int32)
    picture = visualize.draw_instances(
        image, utils.extract_bboxes(masks), masks, class_ids, ["BG", "coin"]
    )
    Image.fromarray(picture).save(FOLDER / "coins.png", optimize=True)
