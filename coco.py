"""Trains, evaluates and looks at data: MS COCO itself, or one's own.

    python coco.py train --dataset=/path/to/coco --model=imagenet --download
    python coco.py train --dataset=/path/to/coco --model=last            # go on after a stop
    python coco.py evaluate --dataset=/path/to/coco --model=coco
    python coco.py inspect --images photos --annotations train.json
    python coco.py train --images photos --annotations via.json --format via --model=coco
    python coco.py train --images photos --annotations few.json --model=shapes  # a small network

Annotations are in COCO's format (https://cocodataset.org), or as VIA or labelme save them.
"""

import argparse
import contextlib
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import checkpoints
import cli
import distributed
import model as modellib
import report
import utils
import weights
from annotations import LabelmeDataset, ViaDataset
from augmentation import Augmentation, ColorJitter, Compose, ScaleJitter, horizontal_flip, rot90
from coco_dataset import CocoDataset
from coco_dataset import LoadSummary as LoadSummary
from coco_download import SUBSETS
from coco_download import download as download
from config import RESNETS, Config
from downloads import PUBLISHED, SHIPPED
from evaluation import build_coco_results as build_coco_results
from evaluation import evaluate_coco, evaluator, least_score
from families import CATEGORIES as CATEGORIES
from families import CATEGORY_IDS as CATEGORY_IDS
from families import CLASS_NAMES
from inspection import check_objects, draw_sheet, survey
from mask_files import MasksDataset

logger = logging.getLogger(__name__)


class CocoConfig(Config):
    """Configuration of the published weights, mask_rcnn_coco.h5."""

    NAME = "coco"
    NUM_CLASSES = 1 + 80


# Layers with a part for each class.
CLASS_LAYERS = ("classifier.linear_class", "classifier.linear_bbox", "mask.conv5")
# Layers, last epoch, and what the learning rate is multiplied with. For MS COCO as Matterport's.
STAGES = (("heads", 40, 1.0), ("4+", 120, 1.0), ("all", 160, 0.1))
OWN_STAGES = (("heads", 10, 1.0), ("all", 30, 0.1))
# Of networks whose BatchNorm learns, as that of "shapes": small enough to train whole at once.
SMALL_STAGES = (("all", 5, 1.0),)
# What --augment names.
AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": horizontal_flip,
    "turn": rot90,
    "scale": ScaleJitter(0.6, 1.6),
    "color": ColorJitter(),
}


# --- Train ---------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """python coco.py train"""
    model, train_set, val_set = model_and_data(args)
    check = check_objects(train_set, model.config)
    for line in check.warnings:
        logger.warning("%s", line)
    if check.error:
        raise ValueError(check.error)
    if val_set is None:
        train_set, val_set = keep_some(args, train_set, model.config.SEED)
    if args.dataset is None and args.STEPS_PER_EPOCH is None and args.model != "last":
        model.config.STEPS_PER_EPOCH = own_steps(model.config, train_set.num_images)
    judge = None if val_set is None else evaluator(val_set, args.limit)
    with cli.resumable(model, "--model=last"):
        for layers, epochs, rate in stages(args, model.config):
            logger.info("layers %s to epoch %d at %g", layers, epochs, rate)
            model.train_model(
                train_set,
                val_set,
                rate,
                epochs,
                layers,
                augmentation=augmentation(args),
                callbacks=[log_epoch],
                evaluate=judge,
            )
    logger.info("finished: %s", model.log_dir)


def model_and_data(
    args: argparse.Namespace,
) -> tuple[modellib.MaskRCNN, utils.Dataset, utils.Dataset | None]:
    """What to train, what on, and what to evaluate on if that is given.

    A function of its own, so that training does not keep the weight file's content in memory.
    """
    if args.resume and has_run(args):
        args.model = "last"
    # The file first: a wrong one should be noticed before the data are loaded.
    path = model_file(args, args.BACKBONE or CocoConfig.BACKBONE)
    file = None if path is None else weights.read_state_dict(path)
    train_set = training_data(args, names_to_train(args, file))
    val_set = validation_data(args, train_set.class_names)
    if args.SEED is not None:
        torch.manual_seed(args.SEED)
    return model_to_train(args, file, train_set).to(args.device), train_set, val_set


def names_to_train(args: argparse.Namespace, file: weights.WeightFile | None) -> Sequence[str]:
    """The classes of the file, where the data are to be numbered as they are; else none."""
    if file is None or not weights.is_whole(file):
        return ()
    names = weights.read_options(file).get("CLASS_NAMES") or ()
    # A run goes on with its own classes. On MS COCO so do the heads of a network that knows more:
    # torchvision has a class for each id, those that no object has too.
    knows_coco = args.dataset is not None and not args.classes and set(CLASS_NAMES) <= set(names)
    return names if args.model == "last" or knows_coco else ()


def keep_some(
    args: argparse.Namespace, dataset: utils.Dataset, seed: int
) -> tuple[utils.Dataset, utils.Dataset | None]:
    """What to train on, and images held out to evaluate on; None if there are too few."""
    rest, kept = dataset.split(0.2 if args.val_share is None else args.val_share, seed)
    logger.info("%d images to train on, %d to evaluate on", rest.num_images, kept.num_images)
    return rest, kept if kept.num_images else None


def own_steps(config: Config, images: int) -> int:
    """Steps that take each image of one's own data once, but enough for an epoch to matter."""
    batch = config.IMAGES_PER_GPU * config.GRADIENT_ACCUMULATION * distributed.world_size()
    return max(100, math.ceil(images / batch))


def stages(args: argparse.Namespace, config: Config) -> list[tuple[str, int, float]]:
    """Layers, last epoch and learning rate of each stage."""
    rate = config.LEARNING_RATE
    if args.epochs or args.layers:
        return [(args.layers or "all", args.epochs or 40, rate)]
    own = SMALL_STAGES if config.TRAIN_BN else OWN_STAGES
    schedule = own if args.dataset is None else STAGES
    return [(layers, epochs, rate * factor) for layers, epochs, factor in schedule]


def augmentation(args: argparse.Namespace) -> Augmentation:
    """What happens to training images: --augment, or what suits most data."""
    names = args.augment or (["flip", "scale", "color"] if args.dataset is None else ["flip"])
    return Compose(*(AUGMENTATIONS[name] for name in names))


def model_to_train(
    args: argparse.Namespace, file: weights.WeightFile | None, dataset: utils.Dataset
) -> modellib.MaskRCNN:
    """A model for the classes of the data set, with the weights that --model asks for."""
    options = config_options(args)
    options |= {"NUM_CLASSES": dataset.num_classes, "CLASS_NAMES": dataset.class_names}
    if file is None:
        return modellib.MaskRCNN(CocoConfig(**options), args.logs)
    if not weights.is_whole(file):  # a ResNet, pretrained on ImageNet
        config = CocoConfig(**options)
        return modellib.MaskRCNN.from_weights(file, config, model_dir=args.logs)

    known = weights.read_options(file)
    names = known.get("CLASS_NAMES") or (CLASS_NAMES if args.model == "coco" else None)
    same = known["NUM_CLASSES"] == dataset.num_classes and names in (None, dataset.class_names)
    if args.model == "last" and not same:
        raise ValueError(
            f"the data set must have the classes of {file.path}, {names or known['NUM_CLASSES']},"
            f" got {dataset.class_names}; start a new run from it with --model={file.path}"
        )
    if not same:
        logger.info("other classes than the file's: %s start anew", ", ".join(CLASS_LAYERS))
    exclude = () if same else CLASS_LAYERS
    model = modellib.MaskRCNN.from_weights(file, CocoConfig, exclude, args.logs, **options)
    if args.model == "last":
        logger.info("going on from %s", model.resume(file))
    return model


def has_run(args: argparse.Namespace) -> bool:
    """Whether there is a checkpoint to go on from; all processes see what the main one sees."""
    found: list[Path] = []
    if distributed.is_main():
        with contextlib.suppress(FileNotFoundError):
            found = checkpoints.find_checkpoints(args.logs, CocoConfig.NAME)
    return distributed.from_main(bool(found))


def model_file(args: argparse.Namespace, backbone: object = None) -> Path | None:
    """The file behind --model, in all processes after the main one has found or fetched it.

    Args:
        backbone: for which to look for ImageNet weights.
    """
    path = None
    if distributed.is_main() and args.model == "last":
        path = checkpoints.read_last(args.logs, CocoConfig.NAME).path
    elif distributed.is_main() and args.model != "random":
        path = weights.find_weights(args.model, backbone)
    return distributed.from_main(path)


def log_epoch(record: dict[str, Any]) -> None:
    """Logs the numbers of an epoch that matter most."""
    names = ("loss", "val_loss", "bbox_AP", "segm_AP")
    numbers = ", ".join(f"{name} {record[name]:.3f}" for name in names if name in record)
    logger.info("epoch %d: %s", record["epoch"], numbers)


# --- Evaluate and inspect ------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> None:
    """python coco.py evaluate"""
    if args.model in ("imagenet", "random"):
        raise ValueError(f"evaluate needs a trained model, got --model={args.model}")
    if args.report:
        report.check_folder(args.report)
    path = model_file(args)
    assert path is not None
    file = weights.read_state_dict(path)
    model = modellib.MaskRCNN.from_weights(file, **config_options(args)).to(args.device)
    del file
    names = model.config.CLASS_NAMES or (CLASS_NAMES if args.model == "coco" else [])
    dataset = evaluation_data(args, names)
    count = min(args.limit or dataset.num_images, dataset.num_images)
    logger.info("%s on %d of %d images (see --limit)", path, count, dataset.num_images)
    least = least_score(model.config)
    result = evaluate_coco(
        model,
        dataset,
        limit=args.limit,
        min_confidence=least,
        max_detections=args.max_detections,
        results_path=args.results,
    )
    if result is None:
        return
    print(result)
    if args.report:
        report.write_evaluation(
            args.report,
            dataset.at_bit_depth(model.config.IMAGE_BIT_DEPTH),
            result,
            score=args.report_score,
            pictures=args.report_images,
            title=f"{path.name} on {data_name(args)}",
        )
        print(f"report: {Path(args.report, 'index.html')}")


def inspect_data(args: argparse.Namespace) -> None:
    """python coco.py inspect"""
    if args.report:
        report.check_folder(args.report)
    dataset = training_data(args)
    config = CocoConfig(**config_options(args), NUM_CLASSES=dataset.num_classes)
    check = check_objects(dataset, config)
    found = survey(dataset, config, args.limit)
    print("\n".join([str(found), *check.warnings]))
    draw_sheet(found, args.output)
    print(f"sheet: {args.output}")
    if args.report:
        problems = [*check.warnings, *([check.error] if check.error else [])]
        report.write_inspection(
            args.report,
            found,
            problems=problems,
            pictures=args.report_images,
            title=data_name(args),
        )
        print(f"report: {Path(args.report, 'index.html')}")
    if check.error:
        raise ValueError(check.error)


def data_name(args: argparse.Namespace) -> str:
    """What a report calls the data."""
    if args.dataset is not None:
        return f"MS COCO {args.year or '2017'}"
    return ", ".join(Path(file).name for file in args.annotations)


# --- Data ----------------------------------------------------------------------------------------

# What reads the formats that --format names.
FORMATS: dict[str, Any] = {
    "coco": CocoDataset,
    "via": ViaDataset,
    "labelme": LabelmeDataset,
    "masks": MasksDataset,
}


def training_data(args: argparse.Namespace, names: Sequence[str] = ()) -> utils.Dataset:
    """What to train on, or to inspect.

    Args:
        names: of the classes, the background's first; empty for those of the data.
    """
    if args.dataset is None:
        dataset = load_own(args, args.images, args.annotations, names)
    else:
        subsets = ["train", "valminusminival"] if args.year == "2014" else ["train"]
        dataset = load_subsets(args, subsets, names)
    if args.classes:
        all_images = dataset.num_images
        key = "annotations" if args.format == "coco" else "objects"
        dataset.image_info = [info for info in dataset.image_info if info[key]]
        dataset.prepare()
        logger.info("%d of %d images show these classes", dataset.num_images, all_images)
    return dataset


def validation_data(args: argparse.Namespace, names: Sequence[str]) -> utils.Dataset | None:
    """What to evaluate each epoch on; None if there are no such images.

    Args:
        names: of the classes of the training data, the background's first.
    """
    if args.dataset is not None:
        return load_subsets(args, ["minival" if args.year == "2014" else "val"], names)
    if args.val_annotations is not None:
        return load_own(args, args.val_images or args.images, args.val_annotations, names)
    return None


def evaluation_data(args: argparse.Namespace, names: Sequence[str]) -> utils.Dataset:
    """What to evaluate a model on; `names` as in validation_data, empty if nobody knows them."""
    if args.dataset is None:
        return load_own(args, args.images, args.annotations, names)
    return load_subsets(args, ["minival" if args.year == "2014" else "val"], names)


def load_subsets(
    args: argparse.Namespace, subsets: Sequence[str], names: Sequence[str] = ()
) -> utils.Dataset:
    """Subsets of MS COCO as one data set; `names` as in load_own."""
    dataset = CocoDataset()
    for subset in subsets:
        dataset.load_coco(
            args.dataset,
            subset,
            args.year or "2017",
            auto_download=args.download,
            class_names=names[1:] or None,
            only_classes=args.classes,
            crowd_as_objects=args.crowd_as_objects,
        )
    dataset.prepare()
    return dataset


def load_own(
    args: argparse.Namespace,
    images: Sequence[str],
    annotations: Sequence[str],
    names: Sequence[str] = (),
) -> utils.Dataset:
    """A data set of one's own, in the format that --format names.

    Args:
        names: of classes, the background's first, in the order of their ids; empty for those of
            the files. Classes are told apart by name, whatever ids the files give them.
    """
    dataset = FORMATS[args.format]()
    special = args.crowd_as_objects if args.format == "coco" else args.class_attribute
    dataset.load_files(images, annotations, names[1:] or None, args.classes, special)
    dataset.prepare()
    return dataset


# --- Options -------------------------------------------------------------------------------------

EXAMPLES = {
    "train": """examples:
  python coco.py train --dataset=/path/to/coco --model=coco
  python coco.py train --dataset=/path/to/coco --model=imagenet --download
  python coco.py train --dataset=/path/to/coco --model=last
  python coco.py train --images photos --annotations train.json --val-annotations val.json \\
      --model coco --layers heads --epochs 10 --steps 100
  python coco.py train --images a b --annotations a.json b.json --classes cat,dog --model coco
  python coco.py train --images photos --annotations via.json --format via --model coco
  python coco.py train --images photos --annotations photos --format labelme --model coco
  python coco.py train --images photos --annotations few.json --model shapes \\
      --augment flip,turn,scale,color
  torchrun --nproc-per-node=8 -- coco.py train --dataset=/path/to/coco --model=imagenet
  python coco.py train --dataset=/path/to/coco --model=imagenet --logs=job7 --resume

Stages without --epochs and --layers: on MS COCO heads to epoch 40, stage 4 and up to epoch 120,
all layers to epoch 160 at a tenth of the learning rate; on one's own data heads to epoch 10, all
layers to epoch 30 at a tenth, and from shapes all layers to epoch 5. What is not given is as in the
file of --model, or as in config.py.""",
    "evaluate": """examples:
  python coco.py evaluate --dataset=/path/to/coco --model=coco --limit 0
  python coco.py evaluate --dataset=/path/to/coco --model=detectron2_r50 --limit 0
  python coco.py evaluate --dataset=/path/to/coco --model=last --results results.json
  python coco.py evaluate --images photos --annotations val.json --model logs/coco.../best.pth
  python coco.py evaluate --images photos --annotations val.json --format via --model last
  python coco.py evaluate --images photos --annotations val.json --model last --report report""",
    "inspect": """examples:
  python coco.py inspect --dataset=/path/to/coco --image-dim 512
  python coco.py inspect --images photos --annotations train.json --output sheet.png
  python coco.py inspect --images photos --annotations train.json --report report
  python coco.py inspect --images photos --annotations photos --format labelme
  python coco.py inspect --images photos --annotations masks --format masks""",
}
COMMANDS = {
    "train": (train, "train a model; every epoch leaves a checkpoint"),
    "evaluate": (evaluate, "compute COCO's numbers for boxes and masks"),
    "inspect": (inspect_data, "draw annotated images and count what is in a data set"),
}


def build_parser() -> cli.Parser:
    """The parser of all commands."""
    parser = cli.Parser(prog="coco.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, text) in COMMANDS.items():
        model = "" if name == "inspect" else " --model MODEL"
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            usage=f"coco.py {name} (--dataset DIR | --images DIR --annotations FILE){model} ...",
            epilog=EXAMPLES[name],
        )
        command.set_defaults(run=function)
        add_data_options(command, name)
        if name != "inspect":
            add_model_options(command, name)
        if name == "train":
            add_training_options(command)
        else:
            add_output_options(command, name)
    return parser


def add_data_options(parser: cli.Parser, command: str) -> None:
    """Which images, annotations and sizes."""
    add = parser.add_argument_group("MS COCO").add_argument
    add("--dataset", metavar="DIR", help="the folder with MS COCO in its standard layout")
    add("--year", choices=SUBSETS, help="of MS COCO; default: 2017")
    add(
        "--download",
        type=cli.boolean,
        nargs="?",
        const=True,
        metavar="true|false",
        help="fetch what is missing of MS COCO",
    )

    add = parser.add_argument_group("data of one's own, instead of --dataset").add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    text = "the folder of the images, or one for each of several files"
    add("--images", metavar="DIR", **several, help=text)
    text = "the json that describes them, or several; labelme and masks: a folder"
    add("--annotations", metavar="FILE", **several, help=text)
    add("--format", choices=FORMATS, default="coco", help="of the annotations; default: coco")
    text = "VIA's region attribute that holds the class; default: the only one"
    add("--class-attribute", metavar="NAME", help=text)
    if command == "train":
        add("--val-annotations", metavar="FILE", **several, help="what to evaluate each epoch on")
        text = "where its images are; default: --images"
        add("--val-images", metavar="DIR", **several, help=text)
        text = "share of the images kept to evaluate on without --val-annotations; default: 0.2"
        add("--val-share", type=cli.share, metavar="X", help=text)

    add = parser.add_argument_group("which objects").add_argument
    text = "only these classes, by name, and to train on only images that show one of them"
    add("--classes", type=cli.names, metavar="A,B", help=text)
    text = "take crowds (iscrowd) for objects, as some tools mark what was drawn with a brush"
    add("--crowd-as-objects", action="store_true", help=text)

    group = parser.add_argument_group("how many images, and how large")
    add = group.add_argument
    text = "images to look at" if command == "inspect" else "images to evaluate"
    add(
        "--limit", type=cli.whole(0), default=500, metavar="N", help=f"{text}, 0: all; default: 500"
    )
    text = "side of the network input, a multiple of 64"
    add("--image-dim", type=cli.whole(1), metavar="N", help=text)
    cli.add_bit_depth(group)
    text = "go on without images that cannot be read"
    add(
        "--skip-unreadable",
        dest="SKIP_UNREADABLE_IMAGES",
        action="store_const",
        const=True,
        help=text,
    )


def add_model_options(parser: cli.Parser, command: str) -> None:
    """Which model, and where it computes. An option in capitals is one of Config."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    starts = ("imagenet", "random") if command == "train" else ()
    models = ", ".join([*PUBLISHED, *SHIPPED, *starts, "last"])
    text = f"weights: {models} or a file (.h5, .pth, .pkl)"
    add("--model", required=True, help=text)
    add("--logs", default="logs", metavar="DIR", help="holds the checkpoints; default: logs")
    if command == "evaluate":
        cli.add_views(group)
    if command == "train":
        text = "go on as --model=last does where there is a checkpoint, and begin with --model else"
        add("--resume", action="store_true", help=text)
        text = "of a new model; default: resnet101"
        add("--backbone", dest="BACKBONE", choices=tuple(RESNETS), help=text)
    text = "images at once, in each process"
    add("--batch", dest="IMAGES_PER_GPU", type=cli.whole(1), metavar="N", help=text)
    cli.add_device(group)


def add_output_options(parser: cli.Parser, command: str) -> None:
    """Which file to write."""
    add = parser.add_argument_group("output").add_argument
    if command == "evaluate":
        text = "write the detections in COCO's result format"
        add("--results", metavar="OUT.json", help=text)
        text = "how many detections of a class in an image count, best first; default: COCO's 100"
        add("--max-detections", type=cli.whole(10), default=100, metavar="N", help=text)
    else:
        text = "the picture of annotated images; default: inspect.png"
        add("--output", default="inspect.png", metavar="FILE", help=text)
    text = "write a page to look at, DIR/index.html; needs the extra [report]"
    add("--report", metavar="DIR", help=text)
    if command == "evaluate":
        text = "detections count in the report from here on; default: where F1 is highest"
        add("--report-score", type=cli.share, metavar="X", help=text)
    text = f"images drawn in the report, 0: all; default: {report.PICTURES}"
    add("--report-images", type=cli.whole(0), default=report.PICTURES, metavar="N", help=text)


def add_training_options(parser: cli.Parser) -> None:
    """How to train. An option in capitals is one of Config."""
    add = parser.add_argument_group("training").add_argument
    text = "one stage only, of heads, 3+, 4+, 5+, all or a regular expression"
    add("--layers", help=text)
    add("--epochs", type=cli.whole(1), metavar="N", help="one stage only, to this epoch")
    text = "of an epoch; default: 1000, and for one's own data once through it, at least 100"
    add("--steps", dest="STEPS_PER_EPOCH", type=cli.whole(1), metavar="N", help=text)
    add("--lr", dest="LEARNING_RATE", type=cli.positive, metavar="X", help="learning rate")
    text = (
        "what happens to images at random: flip, turn (by quarters, where no side is up), scale,"
        " color; default: flip, and for one's own data flip,scale,color"
    )
    add("--augment", type=cli.names, metavar="A,B", help=text)
    text = "batches that make one step"
    add("--accumulate", dest="GRADIENT_ACCUMULATION", type=cli.whole(1), metavar="N", help=text)
    add("--amp", dest="AMP", choices=("bf16", "fp16"), help="compute in 16 bits")
    text = "processes that load images"
    add("--workers", dest="NUM_WORKERS", type=cli.whole(0), metavar="N", help=text)
    text = "of new weights, order, augmentation and the images kept to evaluate on"
    add("--seed", dest="SEED", type=cli.whole(0), metavar="N", help=text)


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of Config that the command line sets."""
    options = cli.config_options(args)
    if args.image_dim is not None:
        # Config's proportion, 800 to 1024.
        options |= {"IMAGE_MAX_DIM": args.image_dim, "IMAGE_MIN_DIM": args.image_dim * 25 // 32}
    return options


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if (args.dataset is None) == (args.annotations is None):
        raise ValueError("the data must be --dataset, or --images and --annotations")
    if (args.images is None) != (args.annotations is None):
        raise ValueError("--images and --annotations must come together")
    if args.dataset is None and (args.year or args.download):
        raise ValueError("--year and --download are for --dataset")
    if args.dataset is not None and (args.format != "coco" or args.class_attribute):
        raise ValueError("--format and --class-attribute are for --annotations")
    if args.format != "coco" and args.crowd_as_objects:
        raise ValueError("--crowd-as-objects is for --format coco")
    if args.class_attribute and args.format != "via":
        raise ValueError("--class-attribute is for --format via")
    if args.command == "train":
        check_validation(args)
        check_augmentation(args)
    if args.download and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--download must not run under torchrun; run inspect --download before")
    CocoConfig(**config_options(args)).validate()


def check_validation(args: argparse.Namespace) -> None:
    """Raises ValueError for options of the validation data that do not go together."""
    if args.dataset is not None and (args.val_annotations or args.val_images):
        raise ValueError("--val-annotations and --val-images are for --annotations")
    if args.val_images and not args.val_annotations:
        raise ValueError("--val-images needs --val-annotations")
    if args.val_share is not None and (args.dataset is not None or args.val_annotations):
        raise ValueError("--val-share is for --annotations without --val-annotations")


def check_augmentation(args: argparse.Namespace) -> None:
    """Raises ValueError for a name that --augment does not know."""
    for name in args.augment or ():
        if name not in AUGMENTATIONS:
            raise ValueError(f"--augment must be of {', '.join(AUGMENTATIONS)}, got {name!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run(build_parser(), arguments, check)


if __name__ == "__main__":
    utils.keep_memory()
    sys.exit(main())
