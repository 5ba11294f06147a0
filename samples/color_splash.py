"""Colour splash: objects keep their colours, and all else turns grey.

python samples/color_splash.py                          # a cup of coffee: nothing to download
python samples/color_splash.py street.jpg clip.mp4      # photographs and videos, classes of COCO
python samples/color_splash.py street.jpg --classes person,dog
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of the library

import cli
import utils
import video
from families import class_names
from model import MaskRCNN


def color_splash(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] uint8 with its colours where any of the masks [H, W, N] bool is set."""
    grey = np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    return np.where(masks.any(axis=2, keepdims=True), image, grey)


def run(args: argparse.Namespace) -> int:
    """Writes <name>_splash.png or .mp4 for each image or video; 1 if one was not read whole."""
    model = MaskRCNN.from_weights(
        args.model or ("coco" if args.images else "shapes"),
        DETECTION_MIN_CONFIDENCE=args.min_confidence,
    ).to(args.device)
    names = class_names(model.config)
    classes = args.classes or (names[1:] if args.images else ["circle"])
    if unknown := set(classes) - set(names[1:]):
        raise ValueError(f"--classes must be among {', '.join(names[1:])}; got {unknown.pop()}")
    class_ids = [names.index(name) for name in classes]

    def splash(image: np.ndarray) -> np.ndarray:
        r = model.detect([image])[0]
        return color_splash(image, r["masks"][:, :, np.isin(r["class_ids"], class_ids)])

    for source in args.images:
        if not video.is_video(source) and not Path(source).is_file():
            raise FileNotFoundError(f"no image or video {source}")
    output, used, status = Path(args.output), set[str](), 0
    output.mkdir(parents=True, exist_ok=True)
    for source in args.images or ["coffee"]:
        if video.is_video(source):
            path = output / f"{utils.unused_name(video.output_name(source), used)}_splash.mp4"
            _, problem = video.redraw(source, path, lambda frame: splash(frame.image))
            if problem is not None:
                print(f"color_splash.py: {source}: {problem}", file=sys.stderr)
                status = 1
        else:
            try:
                picture = splash(utils.load_image(source) if args.images else sample())
            except cli.EXPECTED as error:
                print(f"color_splash.py: skipped {source}: {cli.one_line(error)}", file=sys.stderr)
                status = 1
                continue
            path = output / f"{utils.unused_name(Path(source).stem, used)}_splash.png"
            Image.fromarray(picture).save(path)
        print(path)
    return status


def sample() -> np.ndarray:
    """A photograph of scikit-image with a cup and a spoon, which are round."""
    import skimage.data

    return skimage.data.coffee()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(prog="color_splash.py", description=__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|VIDEO", help="what to look at")
    text = "default: coco (without IMAGE: shapes, which ships)"
    add("--model", metavar="NAME|FILE", help=text)
    text = "what keeps its colours, names with commas between them; default: all classes"
    add("--classes", type=cli.names, metavar="NAMES", help=text)
    text = "least score of an object, 0 to 1; default: 0.7"
    add("--min-confidence", type=cli.share, default=0.7, metavar="X", help=text)
    add("--output", default="out", metavar="DIR", help="of the pictures; default: out")
    cli.add_device(parser)
    parser.set_defaults(run=run)
    return cli.run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
