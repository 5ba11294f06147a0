"""Data sets whose masks are pictures: one for each object, or one for all objects of an image."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import image_files
import utils
from annotations import DrawnDataset, Object, ReadImage, Request, Size
from coco_dataset import Remarks
from outlines import draw

# Of files whose values are exact; those of a JPEG are not.
SUFFIXES = frozenset((".png", ".tif", ".tiff", ".bmp", ".gif"))
# What may follow the name of an image in that of its label image, as in a_mask.png.
LABEL_WORDS = ("mask", "masks", "label", "labels", "instances")
# The border between objects in the label images of PASCAL VOC, which belongs to none.
VOID = 224 << 16 | 224 << 8 | 192


class MaskFile(NamedTuple):
    """A picture of one object, or of all objects of an image."""

    path: Path
    class_name: str
    is_label_image: bool


class MasksDataset(DrawnDataset):
    """A folder of images and a folder of masks. Of the image a.jpg the masks are

    - a.png, a_mask.png, a_masks.png, a_label.png, a_labels.png or a_instances.png: a label image,
      where each value, or colour, other than 0 is one object;
    - a/*.png: one object in each file;
    - a_*.png, with anything else for the star: one object in each file.

    They may lie in folders named after their classes, cat/a.png and dog/a.png. With folders
    SegmentationObject and SegmentationClass (PASCAL VOC, CVAT), the first tells the objects apart
    and the colours of the second are the classes, which a labelmap.txt may name.

    A file of one object holds it where its values are at least half of its largest.
    """

    def read(self, request: Request) -> Iterator[ReadImage]:
        """Each image that has masks, and its objects."""
        root, remarks = request.annotations, request.remarks
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}, which is to hold the masks")
        if os.path.realpath(root) == os.path.realpath(request.images):
            raise ValueError(f"masks must be in a folder of their own, got {root}")
        images: dict[str, Path] = {}
        for path in image_files.list_images(request.images):
            if images.setdefault(path.stem, path) is not path:
                remarks["images dropped, another has the same name but for its end"].append(
                    path.name
                )
        classes = None
        if (root / "SegmentationObject").is_dir():
            classes, root = ClassPictures(root), root / "SegmentationObject"
        masks = find_masks(root, images, request)
        alone: list[str] | None = []  # label images with one object each
        for stem, path in images.items():
            if stem not in masks:
                remarks["images dropped, without a file or folder of masks"].append(path.name)
                continue
            try:
                size = image_files.read_size(path)
                colours = None if classes is None else classes.read(stem, size)
            except (OSError, ValueError) as error:
                remarks["images dropped, unreadable"].append(f"{path.name} ({error})")
                continue
            used, objects = 0, []
            for file in masks[stem]:
                try:
                    values = read_values(file.path, size, classes is not None)
                except (OSError, ValueError) as error:
                    remarks["masks dropped, unreadable or of another size"].append(str(error))
                    continue
                used += 1
                if not file.is_label_image:
                    objects += objects_of_file(file, values, remarks)
                    continue
                if classes is not None and colours is not None:
                    found = classes.objects(file, values, colours, remarks)
                else:
                    found = objects_of_labels(file, values)
                objects += found
                if len(found) > 1:
                    alone = None
                elif found and alone is not None:
                    alone.append(str(file.path))
            if masks[stem] and not used:
                remarks["images dropped, none of their masks can be used"].append(path.name)
                continue
            yield ReadImage(path, size, objects)
        if alone:
            remarks["label images of one value each, which makes all of it one object"] += alone


class ClassPictures:
    """The pictures of PASCAL VOC and CVAT whose colours are the classes.

    Args:
        root: holds SegmentationClass and, where classes are to have other names than their
            colours, labelmap.txt with lines as "cat:250,50,83::".
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "SegmentationClass"
        self.names: dict[int, str] = {}
        labelmap = root / "labelmap.txt"
        lines = labelmap.read_text(encoding="utf-8-sig").splitlines() if labelmap.is_file() else []
        for line in lines:
            if not line.strip() or line.startswith("#"):
                continue
            try:
                name, colour = line.split(":")[:2]
                red, green, blue = (int(part) for part in colour.split(","))
            except ValueError as error:
                raise ValueError(
                    f'{labelmap} must have lines as "cat:250,50,83", got {line!r}'
                ) from error
            self.names[red << 16 | green << 8 | blue] = name.strip()

    def read(self, stem: str, size: Size) -> np.ndarray:
        """The colours [H, W] of the classes in an image."""
        return read_values(self.folder / f"{stem}.png", size, True)

    def objects(
        self, file: MaskFile, values: np.ndarray, colours: np.ndarray, remarks: Remarks
    ) -> list[Object]:
        """The objects of a label image; their classes are the most frequent colours in them."""
        objects = []
        for found in objects_of_labels(file, values, VOID):
            (y1, x1, y2, x2), part = draw(found.drawings, values.shape)
            inside = colours[y1:y2, x1:x2][part]
            candidates, counts = np.unique(
                inside[(inside != 0) & (inside != VOID)], return_counts=True
            )
            if not len(counts):
                remarks["objects dropped, without a class"].append(found.where)
                continue
            colour = int(candidates[counts.argmax()])
            objects.append(found._replace(class_name=self.names.get(colour, f"#{colour:06x}")))
        return objects


# --- Which masks are whose -----------------------------------------------------------------------


def find_masks(root: Path, images: dict[str, Path], request: Request) -> dict[str, list[MaskFile]]:
    """The mask files of each image, by the stem of its name."""
    masks: dict[str, list[MaskFile]] = {}
    unknown: list[str] = []

    def take(folder: Path, class_name: str, depth: int) -> None:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if path.name in images:
                    files = [f for f in sorted(path.iterdir()) if _is_mask(f)]
                    found = masks.setdefault(path.name, [])
                    found += [MaskFile(f, class_name, False) for f in files]
                elif depth == 0:
                    take(path, path.name, 1)
                else:
                    unknown.append(str(path.relative_to(root)))
            elif _is_mask(path):
                stem, is_label_image = owner(path.stem, images)
                if stem is None:
                    unknown.append(str(path.relative_to(root)))
                else:
                    masks.setdefault(stem, []).append(MaskFile(path, class_name, is_label_image))
            elif image_files.is_image_file(path):
                inexact = "masks left out, of a format that blurs values; save them as PNG"
                request.remarks[inexact].append(str(path.relative_to(root)))

    take(root, request.class_name, 0)
    if unknown:
        request.remarks["masks left out, no image has their name"] += unknown
    return masks


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def owner(stem: str, images: dict[str, Path]) -> tuple[str | None, bool]:
    """The stem of the image that a mask file belongs to, and whether it is a label image."""
    if stem in images:
        return stem, True
    start = len(stem)
    while (start := stem.rfind("_", 0, start)) > 0:  # the longest name that fits
        if stem[:start] in images:
            return stem[:start], stem[start + 1 :].lower() in LABEL_WORDS
    return None, False


# --- Objects in pictures -------------------------------------------------------------------------


def read_values(path: Path, size: Size, as_colours: bool = False) -> np.ndarray:
    """The values [H, W] of a mask file as they are stored; colours are 0xRRGGBB.

    Args:
        size: of the image that it belongs to.
        as_colours: looks up the colours of a palette.

    Raises:
        OSError, ValueError: a file that cannot be read, or is of another size.
    """
    if image_files.read_size(path) != size:
        raise ValueError(f"{path} must be {size[1]} x {size[0]}, as its image")
    try:
        with Image.open(path) as file:
            clear = np.array(file.getchannel("A")) == 0 if "A" in file.getbands() else None
            is_grey = file.mode in ("1", "L", "LA", "I", "F") or file.mode.startswith("I;")
            if as_colours or not (is_grey or file.mode == "P"):
                values = np.array(file.convert("RGB"))
            else:
                values = np.array(file.getchannel("L") if file.mode == "LA" else file)
    except Exception as error:  # image decoders raise whatever they stumble over
        raise ValueError(f"{path} cannot be read: {error}") from error
    if values.ndim == 3:
        red, green, blue = (values[:, :, i].astype(np.int64) for i in range(3))
        values = red << 16 | green << 8 | blue
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        raise ValueError(f"{path} must have whole numbers, got fractions")
    values = values.astype(np.int64)
    if clear is not None:
        values[clear] = 0
    if values.shape != size:  # turned by its own orientation
        raise ValueError(f"{path} must be stored upright")
    return values


def objects_of_file(file: MaskFile, values: np.ndarray, remarks: Remarks) -> list[Object]:
    """The object of a file of its own."""
    mask = values >= max(1, values.max() / 2)
    if not mask.any():
        remarks["masks dropped, without a pixel"].append(str(file.path))
        return []
    return [Object(file.class_name, [utils.rle_encode(mask)], str(file.path))]


def objects_of_labels(file: MaskFile, values: np.ndarray, void: int = 0) -> list[Object]:
    """The objects of a label image: its values, but for 0 and void."""
    numbers, inverse = np.unique(values, return_inverse=True)
    labels = np.where((numbers == 0) | (numbers == void), 0, np.arange(1, len(numbers) + 1))
    from scipy import ndimage  # a quarter of a second that other formats do not need

    boxes = ndimage.find_objects(labels[inverse.reshape(values.shape)])
    objects = []
    for number, box in zip(numbers.tolist(), boxes, strict=False):
        if box is not None:
            y, x = box
            corners = (y.start, x.start, y.stop, x.stop)
            rle = utils.rle_encode(values[box] == number, corners, values.shape)
            objects.append(Object(file.class_name, [rle], f"{file.path}, value {number}"))
    return objects
