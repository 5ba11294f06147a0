"""The page of an evaluation of 5,000 images: `python benchmarks/report.py --dataset DIR`.

The images are those of a folder in MS COCO's layout, over and over, and the detections are their
ground truth, moved, missed, misnamed, with false ones of low scores: 36 an image. No network runs.
"""

import argparse
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluation
import report
import utils
from coco_dataset import CocoDataset

IMAGES, DETECTIONS = 5000, 36


def repeated(folder: str, subset: str, count: int) -> CocoDataset:
    """The images of a subset of MS COCO as often as it takes."""
    dataset = CocoDataset()
    dataset.load_coco(folder, subset)
    infos = dataset.image_info
    dataset.image_info = [{**infos[i % len(infos)], "id": i + 1} for i in range(count)]
    dataset.prepare()
    return dataset


class Perturbed:
    """A model that knows the answers, and spoils them; it detects in the order of the data set."""

    def __init__(self, dataset: CocoDataset, different: int) -> None:
        self.config = types.SimpleNamespace(
            BATCH_SIZE=1,
            NUM_CLASSES=dataset.num_classes,
            DETECTION_MIN_CONFIDENCE=0.0,
            IMAGE_BIT_DEPTH=None,
        )
        self.rng = np.random.default_rng(0)
        self.candidates = [self.spoil(dataset, i) for i in range(different)]
        self.count = 0

    def spoil(self, dataset: CocoDataset, image_id: int) -> list[tuple[Any, ...]]:
        """Masks near objects and elsewhere, as (box, class id, run lengths, mean score)."""
        found = []
        for instance in evaluation.ground_truth(dataset, image_id):
            (y1, x1, y2, x2), part = utils.rle_decode_part(instance["segmentation"])
            for share, score in ((0.05, 0.85), (0.3, 0.3), (2, 0.1), (4, 0.1)):
                size = instance["segmentation"]["size"]
                shift = self.rng.uniform(-1, 1, 2) * part.shape * share
                moved = np.round(np.add((y1, x1), shift)).astype(int)
                top, left = moved.clip(0, np.subtract(size, part.shape)).tolist()
                box = (top, left, top + y2 - y1, left + x2 - x1)
                rle = utils.rle_encode(part, box, size)
                found.append((box, instance["category_id"], rle, score))
        return found

    def detect(self, images: list[np.ndarray], masks: str) -> list[dict[str, Any]]:
        candidates = self.candidates[self.count % len(self.candidates)]
        self.count += len(images)
        chosen = [i for i in range(len(candidates)) if self.rng.random() < 0.8][:DETECTIONS]
        boxes = [candidates[i][0] for i in chosen]
        other = self.rng.integers(1, self.config.NUM_CLASSES, len(chosen))
        named = [candidates[i][1] for i in chosen]
        scores = self.rng.normal([candidates[i][3] for i in chosen], 0.15)
        return [
            {
                "rois": np.array(boxes, dtype=np.float64).reshape(-1, 4),
                "class_ids": np.where(self.rng.random(len(chosen)) < 0.1, other, named),
                "scores": scores.clip(0, 1).astype(np.float32),
                "masks": [candidates[i][2] for i in chosen],
            }
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--dataset", required=True, help="a folder in MS COCO's layout")
    parser.add_argument("--subset", default="val", help="of MS COCO 2017; default: val")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"default: {IMAGES}")
    parser.add_argument("--output", help="where to write the report; default: nowhere")
    args = parser.parse_args()
    dataset = repeated(args.dataset, args.subset, args.images)
    different = len({info["path"] for info in dataset.image_info})
    model = Perturbed(dataset, different)

    start = time.perf_counter()
    result = evaluation.evaluate_coco(model, dataset)
    assert result is not None
    print(f"evaluation without a network  {time.perf_counter() - start:6.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(args.output or folder)
        start, cpu = time.perf_counter(), time.process_time()
        report.write_evaluation(output, dataset, result)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        pictures = [path.stat().st_size for path in (output / "pictures").iterdir()]
        print(
            f"report of {result.images} images, {result.objects} objects,"
            f" {len(result.results)} detections"
        )
        print(f"  seconds     {seconds:6.1f} ({cpu:.1f} of a core)")
        print(f"  index.html  {(output / 'index.html').stat().st_size / 1e6:6.2f} MB")
        print(f"  pictures    {sum(pictures) / 1e6:6.2f} MB in {len(pictures)} files")


if __name__ == "__main__":
    main()
