"""What a network got right and wrong, object by object, in an image and in many.

A detection and an object belong together where their masks overlap with an IoU of LEAST_IOU,
whatever their classes. Detections choose in the order of their scores, each the object of the
largest IoU that is free. One whose mask fits no object takes an object of its own class that its
box fits: a poor mask. What lies in a crowd of its class is neither right nor wrong.

Which object a detection has does not depend on detections of lower scores. So one pass serves for
every score from which detections may count.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import evaluation

LEAST_IOU = 0.5
# Masks that AP75 does not count are poor.
GOOD_IOU = 0.75

# The kinds of detections and objects, as the numbers of this list. "ignored" are detections in a
# crowd, and those of scores that do not count.
KINDS = ("found", "poor", "wrong", "false", "missed", "ignored")
FOUND, POOR, WRONG, FALSE, MISSED, IGNORED = range(6)


@dataclass(frozen=True)
class Kinds:
    """What counts from a certain score on.

    Attributes:
        detections: [D] of the detections, FOUND, POOR, WRONG, FALSE or IGNORED.
        objects: [G] of the objects, FOUND, POOR, WRONG or MISSED.
        pairs: [P, (kind, class id of the object, that of the detection)], of every pair, and of
            each that is alone, with 0 for the other one; nothing of what is ignored.
        quality: panoptic quality without regard to classes: the sum of the IoUs of found and poor
            ones, divided by their number and half of that of all objects and detections else; 1
            where there is neither.
    """

    detections: np.ndarray
    objects: np.ndarray
    pairs: np.ndarray
    quality: float


@dataclass(frozen=True)
class Judgement:
    """The detections of an image beside its objects.

    Attributes:
        order: [D] where the detections are in the result, best score first. The others are in
            this order.
        scores: [D] of the detections.
        class_ids: [D] of the detections.
        matches: [D] the number of the object that belongs to it, -1 for none.
        ious: [D] of its mask with that of the object, 0 without one.
        in_crowd: [D] bool, whether it has no object and lies in a crowd of its class.
        object_class_ids: [G] of the objects; crowds are left out.
    """

    order: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    matches: np.ndarray
    ious: np.ndarray
    in_crowd: np.ndarray
    object_class_ids: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """[D] bool: the class is right, and the mask as AP50 wants it."""
        return self._same_class & (self.ious >= LEAST_IOU)

    @property
    def _same_class(self) -> np.ndarray:
        # Without an object the last one is looked up, or the 0 behind it.
        classes = np.append(self.object_class_ids, 0)[self.matches]
        return (self.matches >= 0) & (classes == self.class_ids)

    def kinds(self, score: float) -> Kinds:
        """What is right and wrong if detections count from this score on."""
        same = self._same_class
        detections = np.select(
            [
                (self.scores < score) | self.in_crowd,
                self.matches < 0,
                ~same,
                self.ious < GOOD_IOU,
            ],
            [IGNORED, FALSE, WRONG, POOR],
            FOUND,
        )
        objects = np.full(len(self.object_class_ids), MISSED)
        paired = (detections != IGNORED) & (self.matches >= 0)
        objects[self.matches[paired]] = detections[paired]
        expected = np.append(self.object_class_ids, 0)
        rows = np.stack(
            [detections, np.where(paired, expected[self.matches], 0), self.class_ids], axis=1
        )[detections != IGNORED]
        alone = self.object_class_ids[objects == MISSED]
        missed = np.stack([np.full_like(alone, MISSED), alone, np.zeros_like(alone)], axis=1)
        pairs = np.concatenate([rows, missed]).astype(np.int64)

        right = paired & same
        others = np.count_nonzero(detections == FALSE) + len(alone)
        total = np.count_nonzero(right) + np.count_nonzero(paired & ~same) + others / 2
        quality = float(self.ious[right].sum() / total) if total else 1.0
        return Kinds(detections, objects, pairs, quality)


def judge(instances: Sequence[dict[str, Any]], result: dict[str, Any]) -> Judgement:
    """Finds which detection of an image belongs to which object.

    Args:
        instances: objects and crowds, as evaluation.ground_truth gives them.
        result: of MaskRCNN.detect(..., masks="rle").
    """
    order = np.argsort(-result["scores"], kind="stable")
    results = evaluation.build_coco_results(0, result)
    found = [results[i] for i in order.tolist()]
    class_ids = np.array([d["category_id"] for d in found], dtype=np.int64)
    objects = [i for i in instances if not i["iscrowd"]]
    expected = np.array([i["category_id"] for i in objects], dtype=np.int64)
    masks = evaluation.overlaps(found, objects, "segm")
    boxes = evaluation.overlaps(found, objects, "bbox")
    same = class_ids[:, None] == expected
    # What a mask fits comes before what a box fits; of two objects of one shape, that of the class.
    worth = np.where(masks >= LEAST_IOU, 1 + masks + 1e-9 * same, 0)
    worth = np.where((worth == 0) & same & (boxes >= LEAST_IOU), boxes, worth)
    matches = np.full(len(found), -1)
    for d in np.flatnonzero(worth.any(axis=1)):
        best = worth[d].argmax()
        if worth[d, best] > 0:
            matches[d] = best
            worth[:, best] = 0
    ious = np.zeros(len(found))
    matched = np.flatnonzero(matches >= 0)
    ious[matched] = masks[matched, matches[matched]]

    crowds = [i for i in instances if i["iscrowd"]]
    inside = evaluation.overlaps(found, crowds, "segm") >= LEAST_IOU
    inside &= class_ids[:, None] == [i["category_id"] for i in crowds]
    in_crowd = (matches < 0) & inside.any(axis=1)
    scores = np.asarray(result["scores"], dtype=np.float64)[order]
    return Judgement(order, scores, class_ids, matches, ious, in_crowd, expected)


def confusion(kinds: Iterable[Kinds], class_count: int) -> np.ndarray:
    """How often an object of one class was detected as another, [class, class] int64.

    Rows are what there is, columns what was detected. Row 0 counts detections without an object,
    column 0 objects without a detection.
    """
    counts = np.zeros((class_count, class_count), dtype=np.int64)
    for image in kinds:
        np.add.at(counts, (image.pairs[:, 1], image.pairs[:, 2]), 1)
    return counts


@dataclass(frozen=True)
class ScoreCurve:
    """Precision and recall by the score from which detections count.

    Attributes:
        scores: [S] rising.
        precision: [S] share of the detections that are right, 1 where there is none.
        recall: [S] share of the objects that are found so, 0 where there is none.
    """

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """[S] harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / np.where(total == 0, 1, total)


def score_curve(
    judgements: Iterable[Judgement], scores: Sequence[float] | np.ndarray
) -> ScoreCurve:
    """Precision and recall, of all classes together, if detections count from each score on.

    Right are detections of the right class whose masks have an IoU of LEAST_IOU.
    """
    levels = np.asarray(scores, dtype=np.float64)
    found, right = np.zeros((2, len(levels)))
    objects = 0
    for judgement in judgements:
        objects += len(judgement.object_class_ids)
        counted = ~judgement.in_crowd
        for counts, which in ((found, counted), (right, counted & judgement.right)):
            counts += (judgement.scores[which] >= levels[:, None]).sum(axis=1)
    precision = np.divide(right, found, out=np.ones_like(right), where=found > 0)
    return ScoreCurve(levels, precision, right / max(1, objects))
