"""Detects objects with an exported network, without torch and without this library.

python weights.py export nuclei nuclei.onnx    # once, with the library
pip install onnxruntime numpy pillow
python onnx_detect.py nuclei.onnx cells.png more.jpg --output found
"""

import argparse
import colorsys
import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def paste(mask: np.ndarray, box: np.ndarray, shape: tuple[int, ...], rule: str) -> np.ndarray:
    """A mask [M, M] of probabilities in its box, as an image [H, W] bool."""

    def axis(low: float, high: float, side: int) -> tuple[np.ndarray, np.ndarray]:
        cells, border = len(mask), 0
        if rule == "expanded":  # by a cell on either side
            middle, half = (high + low) / 2, (high - low) / 2 * ((cells + 2) / cells)
            low, high, cells, border = int(middle - half), int(middle + half) + 1, cells + 2, 1
        pixels = np.arange(max(math.floor(low), 0), min(math.ceil(high), side))
        position = (2 * pixels + 1 - 2 * low) * cells / (2 * (high - low)) - 0.5 - border
        distance = abs(position[:, None].astype("f4") - np.arange(len(mask), dtype="f4"))
        return pixels, np.maximum(1 - distance, 0)  # bilinear weights of the cells

    (y1, x1, y2, x2), full = map(float, box), np.zeros(shape[:2], bool)
    (y, down), (x, across) = axis(y1, y2, shape[0]), axis(x1, x2, shape[1])
    values = down @ mask @ across.T
    full[np.ix_(y, x)] = (np.maximum(values, mask.min()) if rule == "rounded" else values) >= 0.5
    return full


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", help="an .onnx of weights.py export")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--output", type=Path, default="out", help="of the pictures; default: out")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.network, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    names = json.loads(about["class_names"])
    args.output.mkdir(parents=True, exist_ok=True)
    for path in map(Path, args.images):
        pixels = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        boxes, class_ids, scores, masks, _ = session.run(None, {"images": pixels[None]})
        colors = [colorsys.hsv_to_rgb(i * 0.618, 1, 255) for i in range(len(boxes))]
        for box, mask, color in zip(boxes, masks, colors, strict=True):
            inside = paste(mask, box, pixels.shape, about["mask_paste"])
            pixels[inside] = pixels[inside] * 0.5 + np.array(color) * 0.5
        picture = Image.fromarray(pixels)
        for (y1, x1, y2, x2), i, score, color in zip(boxes, class_ids, scores, colors, strict=True):
            ImageDraw.Draw(picture).rectangle((x1, y1, x2, y2), outline=tuple(map(int, color)))
            print(f"{path}: {names[i]} {score:.3f}, y1 {y1:g} x1 {x1:g} y2 {y2:g} x2 {x2:g}")
        picture.save(args.output / f"{path.stem}_detections.png")
