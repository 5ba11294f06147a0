"""Detects objects in photographs and videos and draws them.

python demo.py                                    # coins and shapes: nothing to download
python demo.py street.jpg holiday/ --output out   # files and folders, 80 classes of COCO
python demo.py street.jpg --model detectron2_r101 # detectron2's weights
python demo.py street.jpg --stages --json         # the pipeline's stages, COCO-style results
python demo.py cells.png --model nuclei           # cell nuclei under the microscope
python demo.py mine.jpg --model logs/.../best.pth # a model of your own
python demo.py city.tif --tile 1024 --overlap 200 # a large image, in windows
python demo.py clip.mp4 --every 2 --json          # a video: objects keep their colour and number
python demo.py photos --coco found.json --polygons # annotations to correct and to train on
python demo.py test2017 --list image_info_test-dev2017.json --results results.json --no-pictures
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import cli
import coco
import coco_export
import image_files
import model as modellib
import outlines
import tiles
import utils
import video
from annotations import read_json
from detections import unmold_boxes, unmold_detections
from downloads import PUBLISHED, SHIPPED
from families import class_names
from file_names import ImageFolder


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files named, and the images directly in the folders named."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = image_files.list_images(path)
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
    from samples.scenes import scene

    # The scenes of seed 0 were trained on.
    return {"coins": utils.as_uint8_image(skimage.data.coins()), "shapes": scene(1).image}


def draw_stages(
    model: modellib.MaskRCNN, image: np.ndarray, names: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Detects in one image; the result as of detect(masks="rle"), and a picture of each stage."""
    molded, windows = model.mold_inputs([image])
    prediction = model.predict(molded, windows)
    result = unmold_detections(
        prediction,
        0,
        image.shape,
        windows[0],
        "rle",
        model.config,
    )

    import visualize  # for matplotlib, which takes longer to import than a small network detects

    def pixels(boxes: torch.Tensor) -> np.ndarray:
        return unmold_boxes(boxes, windows[0], image.shape, model.config).cpu().numpy()

    rpn, proposals, detections = prediction.rpn, prediction.proposals, prediction.detections
    # Of two logits the foreground's comes last, and counts above the background's.
    ranks = rpn.logits[0, :, -1] - (rpn.logits[0, :, 0] if rpn.logits.shape[2] == 2 else 0)
    best = ranks.sort(descending=True).indices[:100]
    anchors = model.get_anchors(molded.shape[2:])[best]
    refined = modellib.refine_anchors(anchors, rpn.deltas[0, best], windows[0], model.config)
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


def write(path: Path, content: np.ndarray | list[Any] | dict[str, Any]) -> None:
    """Writes a picture or a JSON file, whole or not at all."""
    if isinstance(content, np.ndarray):
        picture = Image.fromarray(content)
        mark = image_files.output_mark()
        utils.write_atomic(path, lambda file: picture.save(file, format="png", pnginfo=mark))
    else:
        text = json.dumps(content)
        utils.write_atomic(path, lambda file: file.write(text.encode()))


def look(
    model: modellib.MaskRCNN, image: np.ndarray, names: list[str], args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Detects in one image; the result as of detect(masks="rle"), and what to show, by name."""
    several = len(tiles.views(image.shape, model.config)) > 1
    result, pictures = draw_stages(model, image, names) if args.stages else ({}, {})
    if several or not args.stages:
        result = model.detect([image], verbose=int(several), masks="rle")[0]
    if not args.pictures:
        return result, {}
    import visualize

    arguments = (result["rois"], result["masks"], result["class_ids"], names, result["scores"])
    picture = visualize.draw_instances(utils.as_uint8_image(image), *arguments)
    return result, {**pictures, "4_final" if args.stages else "detections": picture}


def look_at_video(
    model: modellib.MaskRCNN, source: str, name: str, names: list[str], args: argparse.Namespace
) -> int:
    """Detects in a video, and draws into a copy of it; returns 1 if it could not be read whole."""
    tracker, target, lines = video.Tracker(), None, Path(args.output, f"{name}.jsonl")
    if args.pictures:
        target = Path(args.output, f"{name}_detections.mp4")
    result: dict[str, Any] = {}
    numbers: list[int] = []

    def draw(frame: video.Frame) -> np.ndarray | None:
        nonlocal result, numbers
        if frame.index % args.every == 0:
            image = frame.grey if model.config.IMAGE_CHANNEL_COUNT == 1 else frame.image
            result = model.detect([image], masks="rle")[0]
            numbers = tracker.update(result)
            if args.json:
                found = coco.build_coco_results(frame.index, result, category_ids(names))
                found = as_polygons(found) if args.polygons else found
                found = [{**f, "track_id": n} for f, n in zip(found, numbers, strict=True)]
                line = {"frame": frame.index, "time": frame.time, "detections": found}
                with lines.open("a" if frame.index else "w") as file:
                    print(json.dumps(line), file=file)
        if target is None:
            return None
        import visualize

        class_ids, scores = result["class_ids"], result["scores"]
        texts = zip(class_ids, numbers, scores, strict=True)
        return visualize.paint_instances(
            frame.image,
            result["rois"],
            result["masks"],
            class_ids,
            names,
            colors=[visualize.hue_color(number) for number in numbers],
            captions=[f"{names[i]} #{number} {score:.2f}" for i, number, score in texts],
        )

    count, problem = video.redraw(source, target, draw)
    where = f", {target}" if target is not None else ""
    print(f"{source}: {count} frames, {tracker.count} objects{where}")
    if problem is not None:
        print(f"demo.py: {source}: {problem}; {count} frames could be read", file=sys.stderr)
    return int(problem is not None)


def category_ids(names: list[str]) -> list[int] | None:
    """COCO's ids of COCO's classes by class id; other classes have none but their class ids."""
    return coco.CATEGORY_IDS if names == coco.CLASS_NAMES else None


def detect(args: argparse.Namespace) -> int:
    """Does what the command line asks; returns 1 if something could not be read, or not whole."""
    model_name = args.model or ("coco" if args.images else "shapes")
    status = 0
    videos = [name for name in args.images if video.is_video(name)]
    for source in videos:
        video.check(source)
    images: dict[Path, np.ndarray | None]
    if args.list is not None:
        ids, missing = listed_images(args.list, args.images)
        images = dict.fromkeys(ids)
        for name in missing:
            print(f"demo.py: skipped {name}: no such file in {args.images[0]}", file=sys.stderr)
            status = 1
    else:
        ids = {}
        images = dict.fromkeys(find_images([name for name in args.images if name not in videos]))
    if not args.images:
        images = {Path(stem): image for stem, image in sample_images(model_name).items()}
    for file in (args.results, args.coco):
        if file is not None:  # what cannot be written should be known before hours of detection
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    options = {"DETECTION_MIN_CONFIDENCE": args.min_confidence, **cli.config_options(args)}
    model = modellib.MaskRCNN.from_weights(model_name, **options).to(args.device)
    names = class_names(model.config)
    output = Path(args.output)
    if args.pictures or args.json:
        output.mkdir(parents=True, exist_ok=True)

    used, records, all_results = set[str](), [], []
    folder = args.images[0] if args.list else common_folder(list(images))
    for path, image in tqdm(images.items(), unit="image", disable=len(images) <= 2):
        try:
            if image is None:
                image = image_files.load_image(
                    path, model.config.IMAGE_CHANNEL_COUNT, model.config.IMAGE_BIT_DEPTH
                )
            result, pictures = look(model, image, names, args)
            once = len(tiles.views(image.shape, model.config)) == 1  # twice may take minutes
            hint = below(model, image) if once and not len(result["scores"]) else ""
        except cli.EXPECTED as error:
            tqdm.write(f"demo.py: skipped {path}: {cli.one_line(error)}", file=sys.stderr)
            status = 1
            continue
        name = utils.unused_name(path.stem, used)
        image_id = ids.get(path, int(name) if name.isdecimal() else name)
        found = coco.build_coco_results(image_id, result, category_ids(names))
        if args.results is not None or args.coco is not None:
            records.append(coco_export.image_record(image_id, path, folder, image.shape[:2]))
            all_results += found
        for stage, picture in pictures.items():
            write(output / f"{name}_{stage}.png", picture)
        if args.json:
            write(output / f"{name}.json", as_polygons(found) if args.polygons else found)
        where = f", {output / name}_*.png" if args.pictures else ""
        tqdm.write(f"{path}: {len(result['scores'])} objects{hint}{where}")
        if args.show:
            import visualize

            visualize.display_images([picture], [name], cols=1, show=True)
    for source in videos:
        name = utils.unused_name(video.output_name(source), used)
        try:
            status |= look_at_video(model, source, name, names, args)
        except cli.EXPECTED as error:
            print(f"demo.py: skipped {source}: {cli.one_line(error)}", file=sys.stderr)
            status = 1
    if args.results is not None:
        write(Path(args.results), all_results)
    if args.coco is not None:
        ids_of_classes = category_ids(names)
        content = coco_export.to_coco(records, all_results, names, ids_of_classes, args.polygons)
        write(Path(args.coco), content)
        print(f"{args.coco}: annotations of the images in {folder}")
    return status


def listed_images(file: str, folders: Sequence[str]) -> tuple[dict[Path, int | str], list[str]]:
    """The images of a folder that a list in COCO's format names.

    Returns:
        Their ids by path, and the names of those that are not there.
    """
    if len(folders) != 1 or not Path(folders[0]).is_dir():
        raise ValueError(f"--list needs the folder of its images, got {folders}")
    content = read_json(Path(file))
    items = content.get("images") if isinstance(content, dict) else None
    if not isinstance(items, list) or not all(
        isinstance(item, dict)
        and isinstance(item.get("file_name"), str)
        and type(item.get("id")) in (int, str)
        for item in items
    ):
        raise ValueError(f"{file} must have a list images, each with an id and a file_name")
    names = [item["file_name"] for item in items]
    paths = ImageFolder(folders[0]).find_all(names)
    ids: dict[Path, int | str] = {}
    for item, path in zip(items, paths, strict=True):
        if path is not None and ids.setdefault(path, item["id"]) != item["id"]:
            raise ValueError(f"{file} must name each image once, got {item['file_name']} again")
    if not ids:
        raise FileNotFoundError(f"{folders[0]} must hold the images of {file}, found none")
    return ids, [name for name, path in zip(names, paths, strict=True) if path is None]


def common_folder(paths: Sequence[Path]) -> str:
    """The folder that all images are in; without any, the current one."""
    folders = [path.parent.absolute() for path in paths]
    return os.path.relpath(os.path.commonpath(folders or [Path.cwd()]))


def below(model: modellib.MaskRCNN, image: np.ndarray) -> str:
    """What to say of an image in which nothing was found: the best that is below the threshold."""
    confidence = model.config.DETECTION_MIN_CONFIDENCE
    model.config.DETECTION_MIN_CONFIDENCE = 0.0
    try:
        scores = model.detect([image], masks="box")[0]["scores"]
    finally:
        model.config.DETECTION_MIN_CONFIDENCE = confidence
    if not len(scores):
        return " (none at any score)"
    return (
        f" ({len(scores)} scored below --min-confidence {confidence:g}, the best of them"
        f" {scores.max():.2g})"
    )


def as_polygons(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with outlines instead of run lengths."""
    return [{**r, "segmentation": outlines.mask_polygons(r["segmentation"])} for r in results]


def build_parser() -> cli.Parser:
    """The parser of the command line."""
    parser = cli.Parser(prog="demo.py", description=__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER|VIDEO", help="what to look at")
    names = ", ".join([*SHIPPED, *PUBLISHED])
    text = f"{names}, or a file (.h5, .pth, .pkl); default: coco (shapes without IMAGE)"
    add("--model", metavar="NAME|FILE", help=text)
    add("--output", default="out", metavar="DIR", help="of what is written; default: out")
    cli.add_device(parser)
    cli.add_bit_depth(parser)
    cli.add_views(parser)
    text = "least score of what is shown, 0 to 1; default: 0.7"
    add("--min-confidence", type=cli.share, default=0.7, metavar="X", help=text)
    add("--stages", action="store_true", help="draw the four stages as well")
    add("--json", action="store_true", help="write results in COCO's format as well")
    text = "detect in every Nth frame of a video and show that in those between; default: 1"
    add("--every", type=cli.whole(1), default=1, metavar="N", help=text)
    text = "write the results of all images into one file, as evaluation servers take it"
    add("--results", metavar="OUT.json", help=text)
    text = "write all detections as annotations: images, annotations and categories"
    add("--coco", metavar="OUT.json", help=text)
    text = "outlines instead of run lengths, in --json and --coco"
    add("--polygons", action="store_true", help=text)
    text = (
        "of the images in COCO's format, as image_info_test-dev2017.json: only these, with its ids"
    )
    add("--list", metavar="FILE.json", help=text)
    add("--no-pictures", dest="pictures", action="store_false", help="draw nothing")
    add("--show", action="store_true", help="show each picture in a window")
    parser.set_defaults(run=detect)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if (args.list or args.results or args.coco) and not args.images:
        raise ValueError("--list, --results and --coco are for images of one's own")
    views = (args.DETECTION_TILE, args.DETECTION_SCALES, args.DETECTION_FLIPS)
    if args.stages and any(view is not None for view in views):
        raise ValueError("--stages shows images as a whole, without --tile, --scale and --flip")
    if any(map(video.is_video, args.images)):
        if args.list or args.results or args.coco or args.stages or args.show:
            raise ValueError("--list, --results, --coco, --stages and --show are not for videos")
    elif args.every > 1:
        raise ValueError("--every is for videos")
    if not args.pictures and (args.stages or args.show):
        raise ValueError("--no-pictures does not go with --stages and --show")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run(build_parser(), arguments, check)


if __name__ == "__main__":
    utils.keep_memory()
    sys.exit(main())
