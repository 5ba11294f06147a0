"""Data sets in COCO's format: MS COCO itself, or one's own (https://cocodataset.org)."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import coco_download
import evaluation
import image_files
import utils
from boxed_masks import BoxedMasks
from cli import printable
from coco_file import REMARKS, Columns, Content, ImageEntry, as_id, read_content
from file_names import ImageFolder

logger = logging.getLogger(__name__)

Remarks = dict[str, list[Any]]


@dataclass
class LoadSummary:
    """What a file of annotations held.

    Attributes:
        file: the file.
        images: images kept, `negatives` of which have no annotation.
        annotations: annotations kept, `crowds` of which mark crowds.
        classes: classes, without the background.
        remarks: what was dropped or changed and why, with the ids in the file.
    """

    file: Path
    images: int
    negatives: int
    annotations: int
    crowds: int
    classes: int
    remarks: Remarks

    def __str__(self) -> str:
        lines = [
            f"{self.file}: {self.images} images ({self.negatives} without objects),"
            f" {self.annotations} annotations ({self.crowds} crowds), {self.classes} classes"
        ]
        for remark, ids in self.remarks.items():
            first = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
            lines.append(f"  {len(ids)} {remark}: {first}")
        return "\n".join(map(printable, lines))


class Table:
    """The annotations of a file that are used, and what is known of each.

    Args:
        columns: all annotations of the file.
        category_ids: of the file's codes, the id of the class that each belongs to.
        boxes: [A, (x, y, width, height)] float64; NaN where the mask's is to be taken.
        bounds: [A, (x1, y1, x2, y2)] float64, around each mask; may leave the image.
    """

    def __init__(
        self, columns: Columns, category_ids: list[Any], boxes: np.ndarray, bounds: np.ndarray
    ) -> None:
        self.category_ids = category_ids
        self.categories = np.frombuffer(columns.categories, np.int32)
        self.crowds = np.frombuffer(columns.crowds, np.int8)
        self.areas = np.frombuffer(columns.areas)
        self.numbers = np.frombuffer(columns.numbers)
        self.part_ends = np.cumsum(np.frombuffer(columns.part_lengths, np.int32), dtype=np.int64)
        self.last_parts = np.cumsum(np.frombuffer(columns.parts, np.int32), dtype=np.int64)
        self.run_lengths = columns.run_lengths
        self.boxes, self.bounds = boxes, bounds

    def outline(self, index: int) -> list[np.ndarray]:
        """The parts [x, y, x, y, ...] of an outline."""
        first = self.last_parts[index - 1] if index else 0
        last = self.last_parts[index]
        start = self.part_ends[first - 1] if first else 0
        parts = []
        for end in self.part_ends[first:last].tolist():
            parts.append(self.numbers[start:end])
            start = end
        return parts

    def annotation(self, index: int) -> dict[str, Any]:
        """An annotation as CocoDataset documents it."""
        box, area = self.boxes[index].tolist(), float(self.areas[index])
        segmentation: Any
        if index in self.run_lengths:
            size, counts, _ = self.run_lengths[index]
            segmentation = {"size": list(size), "counts": counts}
        else:
            segmentation = self.outline(index)
        return {
            "category_id": self.category_ids[self.categories[index]],
            "iscrowd": int(self.crowds[index]),
            "segmentation": segmentation,
            "bbox": None if math.isnan(box[0]) else box,
            "area": area if 0 <= area < math.inf else None,
        }


class Annotations(Sequence[dict[str, Any]]):
    """The annotations of an image; each is made into a dict when it is asked for.

    A pickle of it holds this image's alone.
    """

    __slots__ = ("indices", "table")

    def __init__(self, table: Table, indices: np.ndarray) -> None:
        self.table, self.indices = table, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return Annotations(self.table, self.indices[key])
        return self.table.annotation(int(self.indices[key]))

    def __reduce__(self) -> Any:
        return _unpack, (_pack(self),)


def _pack(annotations: Annotations) -> tuple[Any, ...]:
    table, chosen = annotations.table, annotations.indices
    parts = [table.outline(i) for i in chosen.tolist()]
    lengths = [len(part) for outline in parts for part in outline]
    codes, categories = np.unique(table.categories[chosen], return_inverse=True)
    return (
        b"".join(part.tobytes() for outline in parts for part in outline),
        lengths,
        [len(outline) for outline in parts],
        {n: table.run_lengths[i] for n, i in enumerate(chosen.tolist()) if i in table.run_lengths}
        if table.run_lengths
        else {},
        [table.category_ids[code] for code in codes],
        categories.tolist(),
        table.crowds[chosen].tobytes(),
        table.areas[chosen].tobytes(),
        table.boxes[chosen].tobytes(),
        table.bounds[chosen].tobytes(),
    )


def _unpack(packed: tuple[Any, ...]) -> Annotations:
    columns = Columns()
    numbers, lengths, parts, run_lengths, category_ids, categories, crowds, areas = packed[:8]
    columns.numbers.frombytes(numbers)
    columns.part_lengths.fromlist(lengths)
    columns.parts.fromlist(parts)
    columns.run_lengths = run_lengths
    columns.categories.fromlist(categories)
    columns.crowds.frombytes(crowds)
    columns.areas.frombytes(areas)
    boxes, bounds = (np.frombuffer(data).reshape(-1, 4) for data in packed[8:])
    return Annotations(Table(columns, category_ids, boxes, bounds), np.arange(len(parts)))


class Extents(NamedTuple):
    """Where the annotations of an image are, without their masks.

    Attributes:
        class_ids: [N], negative for crowds.
        boxes: [N, (y1, x1, y2, x2)] float64, image frame; of no height or width for an annotation
            without a pixel.
        size: (height, width) of the image.
    """

    class_ids: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int]


class CocoDataset(utils.Dataset):
    """Images annotated in COCO's format; prepare() it after loading.

    image_info holds for each image, besides id, source and path: height and width, and a sequence
    of annotations, dicts of category_id, iscrowd, segmentation (outlines, arrays
    [x, y, x, y, ...], or run lengths), bbox [x, y, width, height] and area. The last two are None
    where the file has none that can be used. `summaries` tells what was loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.summaries: list[LoadSummary] = []

    def load_coco(
        self,
        dataset_dir: str | Path,
        subset: str,
        year: int | str = "2017",
        class_ids: Sequence[int] | None = None,
        auto_download: bool = False,
        **options: Any,
    ) -> LoadSummary:
        """Adds a subset of MS COCO in its standard layout.

        Args:
            dataset_dir: holds annotations/instances_{subset}{year}.json and {subset}{year}/.
            subset: "train" or "val"; for 2014 also "minival" and "valminusminival", which share
                the images of "val".
            year: 2014 or 2017.
            class_ids: category ids; only they and images that show one of them are loaded.
            auto_download: fetch what is missing, see coco_download.download.
            options: more of load_annotations.

        Raises:
            ValueError, FileNotFoundError: see load_annotations; or there is no such subset.
        """
        images, annotations = coco_download.layout(dataset_dir, subset, year)
        if auto_download:
            coco_download.download(dataset_dir, subset, year)
        if not annotations.is_file():
            raise FileNotFoundError(
                f"no annotation file {annotations}; {dataset_dir} must hold it and the folder"
                f" {images.name}, which --download fetches"
            )
        return self.load_annotations(images, annotations, "coco", class_ids, **options)

    def load_annotations(
        self,
        images_dir: str | Path,
        annotation_file: str | Path,
        source: str = "custom",
        class_ids: Sequence[int | str] | None = None,
        class_names: Sequence[str] | None = None,
        only_classes: Sequence[str] | None = None,
        crowd_as_objects: bool = False,
    ) -> LoadSummary:
        """Adds the images of any json file in COCO's format.

        Classes are numbered by rising category id, or as class_names says. Annotations without a
        mask get their box as one. What cannot be used is dropped, logged, and listed in the
        summary.

        Args:
            images_dir: what the file's file_name starts from; see file_names for names that are
                not there.
            annotation_file: with the lists images, annotations and categories.
            source: keeps several data sets apart, see utils.Dataset.
            class_ids: category ids; only they and images that show one of them are loaded.
            class_names: the classes in their order, e.g. those of the training data. Categories
                are matched by name, whatever their ids; a class that the file lacks has no
                objects.
            only_classes: names of the classes whose objects are loaded; those of others are left
                out. Without class_names, they are the classes, and the file must have them.
            crowd_as_objects: take what is marked as a crowd (iscrowd) for objects, as some tools
                mark all that was drawn with a brush.

        Raises:
            FileNotFoundError: no such file, or none of its images.
            ValueError: the file is no COCO json, contradicts itself, has objects of other classes
                than class_names, or image ids that this source already has.
        """
        content = read_content(Path(annotation_file))
        chosen = choose_categories(content, class_ids, class_names, only_classes)
        return self._add(content, Path(images_dir), source, chosen, crowd_as_objects)

    def load_files(
        self,
        images_dirs: Sequence[str | Path],
        annotation_files: Sequence[str | Path],
        class_names: Sequence[str] | None = None,
        only_classes: Sequence[str] | None = None,
        crowd_as_objects: bool = False,
    ) -> list[LoadSummary]:
        """Adds the images of several files, whose classes are one where they have one name.

        Args:
            images_dirs: of each file, or one for all of them.
            annotation_files: see load_annotations. An image id that an earlier file has gets the
                name of its file in front, "more.json/7".
            class_names: the classes in their order; by default all that occur.
            only_classes: see load_annotations.
            crowd_as_objects: see load_annotations.

        Raises:
            FileNotFoundError, ValueError: see load_annotations.
        """
        files = [Path(file) for file in annotation_files]
        folders = folder_of_each(images_dirs, files)
        contents = [read_content(file) for file in files]
        if class_names is None and len(files) > 1:
            names = dict.fromkeys(name for c in contents for name in choose_categories(c).names)
            if unknown := [name for name in only_classes or () if name not in names]:
                raise ValueError(
                    f"the classes must be among {shortened([*names])}, got {shortened(unknown)}"
                )
            class_names = list(only_classes or names)
        choices = [choose_categories(c, None, class_names, only_classes) for c in contents]
        return [
            self._add(content, folder, "custom", chosen, crowd_as_objects, rename=True)
            for content, folder, chosen in zip(contents, folders, choices, strict=True)
        ]

    def _add(
        self,
        content: Content,
        folder: Path,
        source: str,
        chosen: "Choice",
        crowd_as_objects: bool,
        *,
        rename: bool = False,
    ) -> LoadSummary:
        file, remarks = content.file, chosen.remarks
        images = usable_images(content.images, folder, remarks)
        if not images.paths:
            first = next((f"; {remark}: {ids[0]}" for remark, ids in remarks.items()), "")
            raise FileNotFoundError(
                printable(
                    f"{folder} must hold the images of {file}, but none of the"
                    f" {len(content.images)} can be used{first}"
                )
            )
        taken = {info["id"] for info in self.image_info if info["source"] == source}
        if (repeated := taken & set(images.ids)) and not rename:
            raise ValueError(
                f"image ids must differ within the source {source!r}, got {min(map(str, repeated))}"
                f" again from {file}; load it as another source, or both with load_files"
            )
        table, used, owners = usable_annotations(content.annotations, images, chosen, remarks)
        table.category_ids = [
            self._add_category(source, class_id, name, chosen.ids)
            for class_id, name in zip(chosen.ids, chosen.names, strict=True)
        ]
        if crowd_as_objects:
            table.crowds = np.zeros_like(table.crowds)
        ends = np.searchsorted(owners, np.arange(len(images.paths)), "right").tolist()
        negatives = kept = start = 0
        for index, end in enumerate(ends):
            annotations = Annotations(table, used[start:end])
            start = end
            if chosen.only_with_objects and not annotations:
                continue
            image_id, (height, width) = images.ids[index], images.sizes[index]
            self.add_image(
                source,
                f"{file.name}/{image_id}" if image_id in repeated else image_id,
                images.paths[index],
                height=height,
                width=width,
                annotations=annotations,
            )
            kept += 1
            negatives += not annotations
        summary = LoadSummary(
            file=file,
            images=kept,
            negatives=negatives,
            annotations=len(used),
            crowds=int(np.count_nonzero(table.crowds[used])),
            classes=len(chosen.names),
            remarks=dict(remarks),
        )
        logger.log(logging.WARNING if remarks else logging.INFO, "%s", summary)
        self.summaries.append(summary)
        return summary

    def _add_category(self, source: str, class_id: Any, name: str, others: Sequence[Any]) -> Any:
        """Adds a class unless its source has one of this name; returns the id of the class."""
        same = [info for info in self.class_info if info["source"] == source]
        ids = {str(info["id"]) for info in same}
        for info in same:
            if info["name"] == name:
                return info["id"]
        if class_id is None or str(class_id) in ids:
            ids |= set(map(str, others))
            class_id = next(i for i in range(1, len(ids) + 2) if str(i) not in ids)
        if isinstance(class_id, int) and class_id < 1:
            # A usual id in exported files, but add_class keeps 0 for the background.
            self.class_info.append({"source": source, "id": class_id, "name": name})
        else:
            self.add_class(source, class_id, name)
        return class_id

    def prepare(self) -> None:
        """Numbers classes and images, see utils.Dataset; names stay whole where it matters."""
        super().prepare()
        whole = [info["name"] for info in self.class_info]
        if len(set(self.class_names)) < len(set(whole)):
            self.class_names = whole

    def extents(self, image_id: int) -> Extents:
        """Where the annotations of an image are; hardly any of them is drawn."""
        info = self.image_info[image_id]
        if "annotations" not in info:
            masks, ids = self.load_boxed_masks(image_id)
            return Extents(ids, masks.boxes.astype(np.float64), masks.size)
        table, chosen = info["annotations"].table, info["annotations"].indices
        categories = [table.category_ids[category] for category in table.categories[chosen]]
        pairs = zip(categories, table.crowds[chosen].tolist(), strict=True)
        class_ids = [self._class_id(info["source"], *pair) for pair in pairs]
        size = info["height"], info["width"]
        boxes = table.bounds[chosen][:, [1, 0, 3, 2]]
        inside = boxes.clip(0, np.tile(size, 2))
        for n in np.flatnonzero((inside[:, 2:] - inside[:, :2]).min(axis=1, initial=2) < 2):
            # Outlines this thin may have no pixel.
            rle = evaluation.as_rle(info["annotations"][n]["segmentation"], *size)
            inside[n] = utils.rle_decode_part(rle)[0]
        return Extents(np.array(class_ids, dtype=np.int32), inside, size)

    def check_size(self, image_id: int) -> None:
        """Raises ValueError unless the file is as large as its annotations say."""
        info = self.image_info[image_id]
        try:
            size = image_files.read_size(info["path"])
        except (OSError, ValueError) as error:
            where = f"{info['source']}.{info['id']} ({info['path']})"
            raise ValueError(f"image {where} cannot be used: {error}") from error
        self._check_size(image_id, size)

    def _check_size(self, image_id: int, size: Sequence[int]) -> None:
        info = self.image_info[image_id]
        if "annotations" in info and tuple(size) != (info["height"], info["width"]):
            raise ValueError(
                f"image {info['source']}.{info['id']} must be {info['width']} x {info['height']}"
                f" as in its annotations, but {info['path']} is {size[1]} x {size[0]} when upright;"
                " correct width and height, or the EXIF orientation"
            )

    def load_image(self, image_id: int) -> np.ndarray:
        """The image [H, W, 3] uint8, RGB; ValueError if its annotations are for another size."""
        image = super().load_image(image_id)
        self._check_size(image_id, image.shape[:2])
        return image

    def load_mask(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks [H, W, N] bool, those without a pixel left out, and class ids [N] int32.

        A negative class id marks a crowd.
        """
        masks, class_ids = self.load_boxed_masks(image_id)
        return np.asarray(masks), class_ids

    def load_boxed_masks(self, image_id: int) -> tuple[BoxedMasks, np.ndarray]:
        """What load_mask gives, each mask in its box."""
        info = self.image_info[image_id]
        if "annotations" not in info:
            masks, class_ids = super().load_mask(image_id)
            return BoxedMasks.from_array(masks), class_ids
        parts, visible = [], []
        for annotation, rle in self._drawn(image_id):
            box, part = utils.rle_decode_part(rle)
            if part.size:
                parts.append((box, part))
                category, crowd = annotation["category_id"], annotation["iscrowd"]
                visible.append(self._class_id(info["source"], category, crowd))
        size = info["height"], info["width"]
        return BoxedMasks(size, parts), np.array(visible, dtype=np.int32)

    def ground_truth(self, image_id: int) -> list[dict[str, Any]]:
        """What evaluation compares with: boxes and areas are those of the file, if it has them."""
        info = self.image_info[image_id]
        if "annotations" not in info:
            return evaluation.instances_of_masks(*self.load_boxed_masks(image_id))
        instances = []
        for annotation, rle in self._drawn(image_id):
            category, crowd = annotation["category_id"], annotation["iscrowd"]
            class_id = self._class_id(info["source"], category, crowd)
            box, area = annotation["bbox"], annotation["area"]
            instances.append(evaluation.instance(class_id, rle, box, area))
        return instances

    def _drawn(self, image_id: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each annotation of an image, and its mask in run lengths."""
        info = self.image_info[image_id]
        if type(self).load_image is CocoDataset.load_image:  # the file is what is loaded
            self.check_size(image_id)
        for annotation in info["annotations"]:
            segmentation = annotation["segmentation"]
            yield annotation, evaluation.as_rle(segmentation, info["height"], info["width"])

    def _class_id(self, source: str, category_id: Any, crowd: int) -> int:
        class_id = self.map_source_class_id(f"{source}.{category_id}")
        return -class_id if crowd else class_id

    def image_reference(self, image_id: int) -> str:
        """The page of an image of MS COCO, the path of any other."""
        info = self.image_info[image_id]
        if info["source"] == "coco":
            return f"https://cocodataset.org/#explore?id={info['id']}"
        return str(info["path"])


def folder_of_each(images_dirs: Sequence[str | Path], files: Sequence[Path]) -> list[Path]:
    """The folder of the images of each file, of one for each or one for all of them."""
    if len(images_dirs) not in (1, len(files)):
        raise ValueError(
            f"there must be one folder of images, or one for each of the {len(files)}"
            f" annotation files, got {len(images_dirs)}"
        )
    repeated = len(files) if len(images_dirs) == 1 else 1
    return [Path(folder) for folder in images_dirs] * repeated


# --- Categories ----------------------------------------------------------------------------------


@dataclass
class Choice:
    """Which categories of a file become which classes.

    Attributes:
        names: of the classes in their order.
        ids: of the categories behind them; None for a class that the file lacks.
        classes: by the key of a category's id the position of its class; LEFT_OUT for categories
            that are known and not wanted.
        only_with_objects: whether images without an object are left out.
        remarks: on categories.
    """

    names: list[str]
    ids: list[Any]
    classes: dict[str, int]
    only_with_objects: bool
    remarks: Remarks


UNKNOWN, LEFT_OUT, AMBIGUOUS = -1, -2, -3


def id_key(value: int | str) -> str:
    """What ids have in common that differ in their type alone: 1, "1" and "1.0"."""
    text = str(value)
    whole, point, rest = text.partition(".")
    return whole if point and whole.lstrip("-").isdecimal() and not rest.strip("0") else text


def choose_categories(
    content: Content,
    class_ids: Sequence[int | str] | None = None,
    class_names: Sequence[str] | None = None,
    only_classes: Sequence[str] | None = None,
) -> Choice:
    """The classes to load; see CocoDataset.load_annotations."""
    if class_ids is not None and (class_names or only_classes):
        raise ValueError("the classes must be chosen by class_ids or by names, got both")
    file, remarks = content.file, defaultdict(list)
    used = {id_key(id_) for id_ in content.annotations.category_codes}
    names, ids = read_categories(content)
    if class_ids is None and class_names is None and only_classes is None:
        for key in groups(content, names) - used:
            remarks["categories dropped, without annotations and only a group of others"].append(
                names.pop(key)
            )
    if class_ids is None:
        for key in coinciding(names, used, file):
            remarks["categories dropped, without annotations and named as another"].append(
                names.pop(key)
            )
    keys: list[str | None]
    if class_ids is not None:
        keys = [id_key(class_id) for class_id in class_ids]
        if unknown := [i for i, key in zip(class_ids, keys, strict=True) if key not in names]:
            raise ValueError(f"class_ids must be category ids of {file}, got {unknown}")
    elif class_names is not None or only_classes is not None:
        keys = find_names(content, names, used, class_names, only_classes)
        class_names = class_names or only_classes
    else:
        rising = sorted((isinstance(ids[key], str), ids[key], key) for key in names)
        keys = [key for _, _, key in rising]
    classes = dict.fromkeys(ids, LEFT_OUT)
    for position, found in enumerate(keys):
        if found is not None and (only_classes is None or names[found] in only_classes):
            classes[found] = position
    return Choice(
        names=list(class_names or (names[found] for found in keys if found is not None)),
        ids=[None if found is None else ids[found] for found in keys],
        classes=classes,
        only_with_objects=class_ids is not None,
        remarks=remarks,
    )


def find_names(
    content: Content,
    names: dict[str, str],
    used: set[str],
    class_names: Sequence[str] | None,
    only_classes: Sequence[str] | None,
) -> list[str | None]:
    """The key of the category of each class, None where there is none."""
    wanted = list(class_names or only_classes or ())
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"the names of classes must differ, got {shortened(wanted)}")
    known = wanted if class_names is not None else [*names.values()]
    if unknown := [name for name in only_classes or () if name not in known]:
        raise ValueError(
            f"the classes must be among {shortened(known)}, got {shortened(unknown)} for"
            f" {content.file}"
        )
    by_name = {name.split(",")[0]: key for key, name in names.items()}
    by_name |= {name: key for key, name in names.items()}
    keys = [by_name.get(name) for name in wanted]
    others = [name for key, name in names.items() if key in used and key not in keys]
    if others and only_classes is None:
        raise ValueError(
            f"{content.file} must have objects of no other classes than {shortened(wanted)}, got"
            f" {shortened(others)}; rename them, or leave them out with only_classes, on a command"
            " line --classes"
        )
    return keys


def shortened(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")


def read_categories(content: Content) -> tuple[dict[str, str], dict[str, Any]]:
    """Names and ids of the categories, by the keys of the ids."""
    names: dict[str, str] = {}
    ids: dict[str, Any] = {}
    for category in content.categories:
        id_, name = as_id(category.get("id")), category.get("name")
        name = str(name) if type(name) in (str, int, float) else ""
        name = printable(name).strip()
        if id_ is None or not name or names.setdefault(id_key(id_), name) != name:
            raise ValueError(
                f"{content.file}: a category must have a name and an id of its own, 0, 1, ... or a"
                f" string, got {category}"[:500]
            )
        ids.setdefault(id_key(id_), id_)
    if not names:
        raise ValueError(
            f"{content.file} has no categories, and a model needs at least one: list the classes"
            ' of its objects, as {"categories": [{"id": 1, "name": "cell"}]}'
        )
    return names, ids


def groups(content: Content, names: dict[str, str]) -> set[str]:
    """The keys of categories that are the supercategory of another one."""
    found = set()
    for category in content.categories:
        group = category.get("supercategory")
        own = id_key(as_id(category.get("id")))  # type: ignore[arg-type]
        found |= {key for key, name in names.items() if name == group and key != own}
    return found


def coinciding(names: dict[str, str], used: set[str], file: Path) -> list[str]:
    """The keys of categories without annotations whose name another one has."""
    by_name = defaultdict(list)
    for key, name in names.items():
        by_name[name].append(key)
    dropped = []
    for name, keys in by_name.items():
        in_use = [key for key in keys if key in used]
        if len(in_use) > 1:
            raise ValueError(
                f"{file} must have one name for each category, got {name!r} for the ids"
                f" {' and '.join(in_use)}; rename one, or give their annotations one id"
            )
        dropped += [key for key in keys if key != (in_use or keys)[0]]
    return dropped


# --- Images --------------------------------------------------------------------------------------


class Images(NamedTuple):
    """The images of a file that are there.

    Attributes:
        ids: of each.
        paths: of each.
        sizes: (height, width) of each.
        by_id: the position of an image, or AMBIGUOUS.
        by_key: the same by the key of an id, where one image alone has it.
    """

    ids: list[Any]
    paths: list[Path]
    sizes: list[tuple[int, int]]
    by_id: dict[Any, int]
    by_key: dict[str, int]

    def find(self, image_id: int | str) -> int:
        """The position of an image; UNKNOWN or AMBIGUOUS if it cannot be told."""
        return self.by_id.get(image_id, self.by_key.get(id_key(image_id), UNKNOWN))


def usable_images(entries: Sequence[ImageEntry], folder: Path, remarks: Remarks) -> Images:
    """The images whose files are there."""
    images = Images([], [], [], {}, {})
    named: dict[Any, list[tuple[str, ImageEntry]]] = defaultdict(list)
    for position, entry in enumerate(entries):
        if entry.id is None or entry.name is None:
            remarks["images dropped, no id or file_name, at the positions"].append(position)
        else:
            named[entry.id].append((entry.name, entry))
    for image_id in [i for i, same in named.items() if len(same) > 1]:
        files = list(dict.fromkeys(name for name, _ in named[image_id]))
        if len(set(named[image_id])) == 1:
            remarks["images listed more than once"].append(image_id)
        else:
            remarks["images dropped, several with one id"].append(
                f"{image_id} ({', '.join(files)})"
            )
            images.by_id[image_id] = AMBIGUOUS
            del named[image_id]

    place = ImageFolder(folder)
    firsts = [same[0] for same in named.values()]
    seen: set[Path] = set()
    paths = place.find_all([name for name, _ in firsts])
    for image_id, (name, entry), path in zip(named, firsts, paths, strict=True):
        if path is None:
            missing = remarks["images dropped, no such file"]
            hint = place.hint(name) if len(missing) < 5 else ""
            missing.append(f"{image_id} ({folder / name}{hint and '; ' + hint})")
            continue
        if path not in (folder / name, folder / name.replace("\\", "/")):
            remarks["images found under another form of their name"].append(
                f"{image_id} ({name}: {path})"
            )
        elif place.is_outside(name):
            remarks["images outside of the folder"].append(f"{image_id} ({path})")
        size = usable_size(entry, path)
        if size is None:
            remarks["images dropped, unreadable"].append(f"{image_id} ({path})")
            continue
        if path in seen:
            remarks["images that share their file with another"].append(f"{image_id} ({path})")
        seen.add(path)
        images.by_id[image_id] = len(images.ids)
        images.ids.append(image_id)
        images.paths.append(path)
        images.sizes.append(size)
    for image_id, position in images.by_id.items():
        key = id_key(image_id)
        images.by_key[key] = AMBIGUOUS if key in images.by_key else position
    return images


def usable_size(entry: ImageEntry, path: Path) -> tuple[int, int] | None:
    """Height and width as the file says or, where that cannot be, those of the image itself."""
    height, width = entry.height, entry.width
    if (
        isinstance(height, int)
        and isinstance(width, int)
        and min(height, width) > 0
        and height * width <= image_files.MAX_PIXELS
    ):
        return height, width
    try:
        return image_files.read_size(path)
    except Exception:  # pillow's decoders raise whatever they stumble over
        return None


# --- Annotations ---------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")  # numbers of any size
def usable_annotations(
    columns: Columns, images: Images, chosen: Choice, remarks: Remarks
) -> tuple[Table, np.ndarray, np.ndarray]:
    """The annotations of wanted categories that can be used.

    Returns:
        all annotations; the indices of those that can be used, image by image; and the positions
        of their images.
    """
    owners = decoded(columns.images, columns.image_codes, images.find)
    classes = decoded(
        columns.categories,
        columns.category_codes,
        lambda id_: chosen.classes.get(id_key(id_), UNKNOWN),
    )
    count = len(columns)
    sizes = np.array(images.sizes, dtype=np.float64)[owners.clip(0)]
    table = Table(columns, [], np.frombuffer(columns.boxes).reshape(-1, 4), find_bounds(columns))
    open_ = np.ones(count, dtype=bool)

    def say(text: str, which: np.ndarray) -> None:
        if (which := which & open_).any():
            remarks[f"annotations {text}"] += map(columns.name, np.flatnonzero(which).tolist())

    def drop(text: str, which: np.ndarray) -> None:
        say(text, which)
        open_[which] = False

    drop("dropped, no such image", owners == UNKNOWN)
    drop("dropped, several images have the id of theirs", owners == AMBIGUOUS)
    drop("dropped, no such category", classes == UNKNOWN)
    open_ &= classes != LEFT_OUT
    drop("dropped, repeated", repeated(columns, table, open_))
    codes = np.frombuffer(columns.remarks, np.int8)
    for code, text in enumerate(REMARKS):
        if text.startswith("dropped"):
            drop(text, codes == code)
    wrong = [i for i, rle in columns.run_lengths.items() if rle.size != tuple(sizes[i])]
    drop("dropped, mask of another size than the image", np.isin(np.arange(count), wrong))
    far = np.abs(table.bounds).max(axis=1, initial=0)
    drop("dropped, outline far outside of the image", ~(far < 10 * sizes.max(axis=1)))
    drop("dropped, outline far longer than around the image", too_long(table, sizes))

    for code, text in enumerate(REMARKS):
        if text and not text.startswith("dropped"):
            say(text, codes == code)
    for text, which in scales(table.bounds, sizes, open_):
        say(text, which)
    table.boxes, text, which = checked_boxes(table, sizes)
    say(text, which)
    table.categories = classes.astype(np.int32)
    used = np.flatnonzero(open_)
    used = used[np.argsort(owners[used], kind="stable")]
    return table, used, owners[used]


def decoded(
    codes: Sequence[int], known: Mapping[Any, int], find: Callable[[Any], int]
) -> np.ndarray:
    """What `find` says of the id behind each code; UNKNOWN for those without an id."""
    table = np.array([*map(find, known), UNKNOWN], dtype=np.int64)
    return table[np.frombuffer(codes, np.int32)]  # type: ignore[call-overload]


def find_bounds(columns: Columns) -> np.ndarray:
    """The boxes [A, (x1, y1, x2, y2)] float64 around the masks; zeros where there is none."""
    bounds = np.zeros((len(columns), 4))
    lengths = np.frombuffer(columns.part_lengths, np.int32)
    parts = np.frombuffer(columns.parts, np.int32)
    if len(lengths):
        points = np.frombuffer(columns.numbers).reshape(-1, 2)
        starts = (np.cumsum(lengths, dtype=np.int64) - lengths) // 2
        firsts = (np.cumsum(parts, dtype=np.int64) - parts)[parts > 0]
        for side, ufunc in ((slice(0, 2), np.minimum), (slice(2, 4), np.maximum)):
            of_parts = ufunc.reduceat(points, starts, axis=0)
            bounds[parts > 0, side] = ufunc.reduceat(of_parts, firsts, axis=0)
    for index, rle in columns.run_lengths.items():
        bounds[index] = rle.bounds
    return bounds


def repeated(columns: Columns, table: Table, among: np.ndarray) -> np.ndarray:
    """Which annotations are those of an earlier one with the same id."""
    ids: np.ndarray = np.frombuffer(columns.ids, np.int64)
    if columns.other_ids:
        codes: dict[Any, int] = {}
        ids = np.array([codes.setdefault(columns.name(i), len(codes)) for i in range(len(ids))])
    order = np.flatnonzero(among)
    order = order[np.argsort(ids[order], kind="stable")]
    result = np.zeros(len(ids), dtype=bool)
    first = order[0] if len(order) else 0
    for i in order[1:][np.diff(ids[order]) == 0].tolist() and order.tolist()[1:]:
        if ids[i] != ids[first]:
            first = i
        elif fingerprint(columns, table, i) == fingerprint(columns, table, first):
            result[i] = True
    return result


def fingerprint(columns: Columns, table: Table, index: int) -> tuple[Any, ...]:
    """All that is known of an annotation."""
    outline = [part.tobytes() for part in table.outline(index)]
    rle = columns.run_lengths.get(index)
    values = columns.images[index], columns.categories[index], columns.crowds[index]
    return *values, table.boxes[index].tobytes(), table.areas[index].tobytes(), outline, rle


def too_long(table: Table, sizes: np.ndarray) -> np.ndarray:
    """Which outlines are so long that pycocotools, which walks them, would need gigabytes."""
    limits = np.minimum(100 * sizes.sum(axis=1), 1e7)
    sides = (table.bounds[:, 2:] - table.bounds[:, :2]).max(axis=1, initial=0)
    ends = np.concatenate([[0], table.part_ends])[np.concatenate([[0], table.last_parts])]
    result = np.zeros(len(sizes), dtype=bool)
    for index in np.flatnonzero(~(np.diff(ends) / 2 * sides <= limits)).tolist():
        for part in table.outline(index):
            points = part.reshape(-1, 2)
            steps = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1)
            result[index] |= not steps.sum() <= limits[index]
    return result


def scales(
    bounds: np.ndarray, sizes: np.ndarray, among: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Remarks on annotations that do not fit their images, and on which."""
    limits = sizes[:, ::-1]
    low, high = bounds[:, :2].clip(0, limits), bounds[:, 2:].clip(0, limits)
    sides = bounds[:, 2:] - bounds[:, :2]
    inside = ((high - low) / np.where(sides > 0, sides, 1)).prod(axis=1)
    small = (sides < 1).all(axis=1)
    yield (
        "that lie outside of the image by half or more: drawn on another size of it?",
        ~small & (inside < 0.5) & (sides > 0).all(axis=1),
    )
    unit = small & (bounds >= 0).all(axis=1) & (bounds <= 1).all(axis=1)
    yield "smaller than a pixel, with coordinates in 0..1: a share of width and height?", unit
    yield "smaller than a pixel", small & ~unit & (sides > 0).any(axis=1)
    chosen, farthest = bounds[among & ~small], limits[among].min(initial=math.inf)
    if len(chosen) >= 5 and farthest >= 200 and chosen.min() >= 0 and 80 < chosen.max() <= 100:
        yield "all of which lie in the first 100 x 100 pixels: in percent?", ~small


def checked_boxes(table: Table, sizes: np.ndarray) -> tuple[np.ndarray, str, np.ndarray]:
    """The boxes [A, 4] of the file, NaN where the mask's is to be taken; which of them and why."""
    boxes = table.boxes.copy()
    with np.errstate(all="ignore"):
        boxes[~((boxes[:, 2:] > 0).all(axis=1) & np.isfinite(boxes.sum(axis=1)))] = np.nan
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        # A pixel wider, so that rounding does not matter to small objects.
        ours, theirs = (b + np.array((-0.5, -0.5, 0.5, 0.5)) for b in (table.bounds, corners))
        sides = np.minimum(ours[:, 2:], theirs[:, 2:]) - np.maximum(ours[:, :2], theirs[:, :2])
        both = sides.clip(0).prod(axis=1)
        areas = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (ours, theirs))
        overlaps = both / (sum(areas) - both)
        leaves, mask_leaves = (
            ((b[:, :2] < -2).any(axis=1) | (b[:, 2:] > sizes[:, ::-1] + 2).any(axis=1))
            for b in (corners, table.bounds)
        )
        wrong = (overlaps < 0.5) | (leaves & ~mask_leaves)
    boxes[wrong] = np.nan
    return boxes, "whose box does not fit their mask: the mask's is used", wrong
