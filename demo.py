"""Detects objects in photographs and draws them.

python demo.py                                    # coins and shapes: nothing to download
python demo.py street.jpg holiday/ --output out   # files and folders, 80 classes of COCO
python demo.py street.jpg --stages --json         # the pipeline's stages, COCO-style results
python demo.py cells.png --model nuclei           # cell nuclei under the microscope
python demo.py mine.jpg --model logs/.../best.pth # a model of your own
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import coco
import model as modellib
import utils
import visualize
from config import Config

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files named, and the images directly in the folders named."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"no images in the folder {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no image or folder {path}")
    return found


def sample_images(model: str) -> dict[str, np.ndarray]:
    """What to show where no image is named, by name."""
    import skimage.data

    if model != "shapes":
        return {"astronaut": skimage.data.astronaut()}
    from samples.shapes import scene

    # The scenes of seed 0 were trained on.
    return {"coins": utils.as_uint8_image(skimage.data.coins()), "shapes": scene(1).image}


def class_names(config: Config) -> list[str]:
    if config.CLASS_NAMES:
        return list(config.CLASS_NAMES)
    if len(coco.CLASS_NAMES) == config.NUM_CLASSES:
        return coco.CLASS_NAMES
    return ["BG", *(f"class {i}" for i in range(1, config.NUM_CLASSES))]


def draw_stages(
    model: modellib.MaskRCNN, image: np.ndarray, names: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Detects in one image; the result as of detect(masks="rle"), and a picture of each stage."""
    molded, windows = model.mold_inputs([image])
    prediction = model.predict(molded, windows)
    result = modellib.unmold_detections(prediction, 0, image.shape, windows[0], "rle")

    def pixels(boxes: torch.Tensor) -> np.ndarray:
        return modellib.unmold_boxes(boxes, windows[0], image.shape).cpu().numpy()

    rpn, proposals, detections = prediction.rpn, prediction.proposals, prediction.detections
    best = (rpn.logits[0, :, 1] - rpn.logits[0, :, 0]).sort(descending=True).indices[:100]
    anchors = model.get_anchors(molded.shape[2:])[best]
    refined = modellib.refine_anchors(anchors, rpn.deltas[0, best], model.config)
    boxes, rois = pixels(detections.boxes), pixels(proposals.boxes[detections.roi_index])
    class_ids, scores = detections.class_ids.cpu().numpy(), detections.scores.cpu().numpy()
    mask_probs, shown = prediction.mask_probs.cpu().numpy(), utils.as_uint8_image(image)
    pictures = {
        "1_anchors": visualize.draw_anchor_stage(
            shown, pixels(anchors), pixels(refined), pixels(proposals.boxes[:100])
        ),
        "2_refinement": visualize.draw_refinement_stage(
            shown, rois, boxes, class_ids, names, scores
        ),
        "3_masks": visualize.draw_mask_stage(shown, mask_probs, boxes, class_ids, names, scores),
    }
    return result, pictures


def write(path: Path, content: np.ndarray | list[dict[str, Any]]) -> None:
    """Writes a picture or a JSON file, whole or not at all."""
    if isinstance(content, np.ndarray):
        picture = Image.fromarray(content)
        utils.write_atomic(path, lambda file: picture.save(file, format=path.suffix[1:]))
    else:
        text = json.dumps(content)
        utils.write_atomic(path, lambda file: file.write(text.encode()))


def one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def run(args: argparse.Namespace) -> int:
    """Does what the command line asks; returns the number of images that could not be read."""
    if not 0 <= args.min_confidence <= 1:
        raise ValueError(f"--min-confidence must be in 0..1, got {args.min_confidence}")
    model_name = args.model or ("coco" if args.images else "shapes")
    images: dict[Path, np.ndarray | None] = dict.fromkeys(find_images(args.images))
    if not args.images:
        images = {Path(stem): image for stem, image in sample_images(model_name).items()}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"DETECTION_MIN_CONFIDENCE": args.min_confidence}
    model = modellib.MaskRCNN.from_weights(model_name, **options).to(device)
    names = class_names(model.config)
    category_ids = coco.CATEGORY_IDS if names == coco.CLASS_NAMES else None
    channels = model.config.IMAGE_CHANNEL_COUNT
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    broken, used = 0, set()
    for path, image in tqdm(images.items(), unit="image", disable=len(images) <= 2):
        try:
            if image is None:
                image = utils.load_image(path, channels)
            if args.stages:
                result, pictures = draw_stages(model, image, names)
            else:
                result, pictures = model.detect([image], masks="rle")[0], {}
        except (OSError, ValueError, RuntimeError) as error:
            tqdm.write(f"demo.py: skipped {path}: {one_line(error)}", file=sys.stderr)
            broken += 1
            continue
        stem = path.stem
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10**6))) if n not in used)
        used.add(name)
        arguments = (result["rois"], result["masks"], result["class_ids"], names, result["scores"])
        picture = visualize.draw_instances(utils.as_uint8_image(image), *arguments)
        pictures["4_final" if args.stages else "detections"] = picture
        for stage, content in pictures.items():
            write(output / f"{name}_{stage}.png", content)
        if args.json:
            image_id = int(name) if name.isdecimal() else name
            write(output / f"{name}.json", coco.build_coco_results(image_id, result, category_ids))
        tqdm.write(f"{path}: {len(result['scores'])} objects, {output / name}_*.png")
        if args.show:
            visualize.display_images([picture], [name], cols=1, show=True)
    return broken


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE|FOLDER", help="what to look at")
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="shapes, nuclei, coco, or a .h5 or .pth file; default: coco (shapes without IMAGE)",
    )
    parser.add_argument("--output", default="out", metavar="DIR", help="default: out")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    parser.add_argument("--min-confidence", type=float, default=0.7, help="default: 0.7")
    parser.add_argument("--stages", action="store_true", help="draw the four stages as well")
    parser.add_argument("--json", action="store_true", help="write COCO-style results as well")
    parser.add_argument("--show", action="store_true", help="show each picture in a window")
    args = parser.parse_args(arguments)
    try:
        return 1 if run(args) else 0
    except KeyboardInterrupt:
        return 130
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"demo.py: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
