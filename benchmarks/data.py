"""Data sets: seconds and memory of loading and of one training item: `python benchmarks/data.py`.

A file of COCO's size, 118 287 images with 1.1 million objects, is made by a formula and loaded by
CocoDataset and by pycocotools; and one training item is made of photographs with many objects.
Each row is measured in a process of its own. Memory is the highest above what the process had
before, for items after the image was read once.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGES, OBJECTS = 118_287, 1_100_000
ITEMS = [(n, size) for size in ((480, 640), (3024, 4032)) for n in (9, 100, 450)]
ROW = "{:44} {:>8} {:>9}"


def outline(number: int, height: int, width: int, points: int) -> list[float]:
    """A circle somewhere in an image, [x, y, x, y, ...], rounded as COCO's."""
    radius = min(height, width) / 4 * ((number * 0.382) % 1) + 3
    x = radius + (width - 2 * radius) * ((number * 0.618) % 1)
    y = radius + (height - 2 * radius) * ((number * 0.755) % 1)
    angles = [2 * math.pi * i / points for i in range(points)]
    return [
        round(v, 2) for a in angles for v in (x + radius * math.cos(a), y + radius * math.sin(a))
    ]


def annotation(number: int, image_id: int, height: int, width: int, points: int) -> dict[str, Any]:
    part = outline(number, height, width, points)
    x, y = min(part[::2]), min(part[1::2])
    return {
        "segmentation": [part],
        "area": round(0.7 * (max(part[::2]) - x) * (max(part[1::2]) - y), 4),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [x, y, round(max(part[::2]) - x, 2), round(max(part[1::2]) - y, 2)],
        "category_id": number % 80 + 1,
        "id": number + 1,
    }


def write_file(folder: Path, images: int, objects: int) -> None:
    """An annotation file, and image files without content: none of them is read."""

    def lines(items: Iterator[Any]) -> Iterator[str]:
        for i, item in enumerate(items):
            yield (", " if i else "") + json.dumps(item)

    (folder / "images").mkdir()
    size = {"height": 480, "width": 640}
    with (folder / "file.json").open("w") as file:
        file.write('{"images": [')
        file.writelines(
            lines({"id": i + 1, "file_name": f"{i:012}.jpg", **size} for i in range(images))
        )
        file.write('], "annotations": [')
        file.writelines(
            lines(annotation(i, i % images + 1, 480, 640, 6 + i * 7 % 38) for i in range(objects))
        )
        categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    for i in range(images):
        (folder / "images" / f"{i:012}.jpg").touch()


def peak() -> float:
    """The highest memory of this process so far in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(folder: Path, with_pycocotools: bool) -> tuple[float, float]:
    """Seconds and MB of loading."""
    if with_pycocotools:
        from pycocotools.coco import COCO

        before, start = peak(), time.perf_counter()
        COCO(str(folder / "file.json"))
    else:
        from coco_dataset import CocoDataset

        before, start = peak(), time.perf_counter()
        CocoDataset().load_annotations(folder / "images", folder / "file.json")
    return time.perf_counter() - start, peak() - before


def check(folder: Path) -> tuple[float, float]:
    """Seconds and MB of what train and inspect check before they begin."""
    import inspection
    from coco_dataset import CocoDataset
    from config import Config

    dataset = CocoDataset()
    dataset.load_annotations(folder / "images", folder / "file.json")
    dataset.prepare()
    before, start = peak(), time.perf_counter()
    inspection.check_objects(dataset, Config(NUM_CLASSES=81))
    return time.perf_counter() - start, peak() - before


def item(folder: Path, count: int, height: int, width: int) -> tuple[float, float]:
    """Seconds and MB of one training item, the image being read included."""
    import numpy as np
    from PIL import Image

    from coco_dataset import CocoDataset
    from config import Config
    from dataset import TorchDataset, horizontal_flip

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).save(folder / "a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": height, "width": width}],
        "annotations": [annotation(i, 1, height, width, 40) for i in range(count)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)],
    }
    (folder / "item.json").write_text(json.dumps(content))
    dataset = CocoDataset()
    dataset.load_annotations(folder, folder / "item.json")
    dataset.prepare()
    config = Config(NUM_CLASSES=81, MAX_GT_INSTANCES=count)
    data = TorchDataset(dataset, config, horizontal_flip)
    dataset.load_image(0)
    before, start = peak(), time.perf_counter()
    _, target = data[0]
    seconds = time.perf_counter() - start
    assert len(target["class_ids"]) > 0.9 * count
    return seconds, peak() - before


def measure(*arguments: object) -> tuple[str, str]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--row", *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, megabytes = map(float, run.stdout.split()[-2:])
    return f"{seconds:.2f}", f"{megabytes:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--images", type=int, default=IMAGES, help="of the large file")
    parser.add_argument("--objects", type=int, default=OBJECTS, help="of the large file")
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        kind, folder, *rest = args.row
        if kind == "item":
            print(*item(Path(folder), *map(int, rest)))
        elif kind == "check":
            print(*check(Path(folder)))
        else:
            print(*load(Path(folder), kind == "pycocotools"))
        return
    print(ROW.format("", "seconds", "MB"))
    with tempfile.TemporaryDirectory() as folder:
        for count, (height, width) in ITEMS:
            name = f"one item, {count} objects, {height} x {width}"
            print(ROW.format(name, *measure("item", folder, count, height, width)), flush=True)
        write_file(Path(folder), args.images, args.objects)
        for kind, name in (
            ("ours", "loading COCO's size"),
            ("pycocotools", "the same with pycocotools"),
            ("check", "the check before training"),
        ):
            print(ROW.format(name, *measure(kind, folder)), flush=True)


if __name__ == "__main__":
    main()
