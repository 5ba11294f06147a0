"""Detects objects with an exported network, without torch and without this library.

python weights.py export nuclei nuclei.onnx    # once, with the library
python onnx_detect.py nuclei.onnx cells.png more.jpg --output found
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def paste(mask: np.ndarray, box: np.ndarray, shape: tuple[int, ...], rule: str) -> np.ndarray:
    """A mask [M, M] of probabilities in its box, as an image [H, W] bool."""

    def axis(low: float, high: float, side: int) -> tuple[np.ndarray, np.ndarray]:
        cells, border = len(mask), 0
        if rule == "expanded":  # by a cell on either side
            middle, half = (high + low) / 2, (high - low) / 2 * ((cells + 2) / cells)
            low, high, cells, border = int(middle - half), int(middle + half) + 1, cells + 2, 1
        pixels = np.arange(side)
        pixels = pixels[(pixels + 1 > low) & (pixels < high)]  # those that the box touches
        position = (2 * pixels + 1 - 2 * low) * cells / (2 * (high - low)) - 0.5 - border
        distance = abs(position[:, None].astype("f4") - np.arange(len(mask), dtype="f4"))
        return pixels, np.maximum(1 - distance, 0)  # bilinear weights of the cells

    (y1, x1, y2, x2), full = map(float, box), np.zeros(shape[:2], bool)
    (y, down), (x, across) = axis(y1, y2, shape[0]), axis(x1, x2, shape[1])
    values = down @ mask @ across.T
    full[np.ix_(y, x)] = (np.maximum(values, mask.min()) if rule == "rounded" else values) >= 0.5
    return full


def main() -> None:
    parser = argparse.ArgumentParser(description="Detects objects with an exported network.")
    parser.add_argument("network", help="an .onnx of weights.py export")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--output", type=Path, default=".", help="folder of the pictures")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.network, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    names = json.loads(about["class_names"])
    for path in args.images:
        pixels = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        boxes, class_ids, scores, masks, _ = session.run(None, {"images": pixels[None]})
        for i, (box, mask) in enumerate(zip(boxes, masks, strict=True)):
            color = np.random.default_rng(i).integers(64, 256, 3)
            inside = paste(mask, box, pixels.shape, about["mask_paste"])
            pixels[inside] = pixels[inside] / 2 + color / 2
            (y1, x1, y2, x2), name = box.round().astype(int), names[class_ids[i]]
            pixels[y1:y2, [x1, x2 - 1]] = pixels[[y1, y2 - 1], x1:x2] = color
            print(f"{path}: {name} {scores[i]:.3f}, y1 {y1} x1 {x1} y2 {y2} x2 {x2}")
        Image.fromarray(pixels).save(args.output / f"{path.stem}_detections.png")


if __name__ == "__main__":
    main()
