"""From an evaluation, or a look at a data set, to the files of a page."""

import datetime
import json
import math
import os
import re
import tempfile
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import evaluation
import utils
import weights
from cli import extra, printable
from inspection import ImageSurvey, Survey
from report import charts
from report.mistakes import (
    FALSE,
    FOUND,
    GOOD_IOU,
    IGNORED,
    KINDS,
    LEAST_IOU,
    MISSED,
    POOR,
    WRONG,
    Judgement,
    Kinds,
    confusion,
    judge,
    score_curve,
)
from report.pictures import SIGNS, Mark, draw_marks, save_photo

# Images that are drawn unless one says otherwise.
PICTURES = 200
# What the list of images may take of a page, whose limit is 2 MB.
LIST_BYTES = 1_400_000
# The confusion matrix shows so many classes.
MATRIX_CLASSES = 100
# An anchor with less IoU than this hardly learns an object.
GOOD_FIT = 0.5

_MARK = '<meta name="generator" content="mask-rcnn report">'
_OWN_PICTURE = re.compile(r"\d+(\.jpg|-(truth|found)\.svg)")

# What page.js reads of an image: address, name, number of the folder, name in links if it differs,
# number of the picture or -1, width, height, quality in percent or -1, mistakes, items.
Row = list[Any]


# --- Folders and files ---------------------------------------------------------------------------


def check_folder(folder: str | Path) -> None:
    """Makes the folder of a page, and raises what would keep a page from being written later.

    Raises:
        ValueError: the folder holds something else than an earlier page, or Jinja2 is missing.
    """
    with extra("report"):
        import jinja2  # noqa: F401

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.html"
    if index.is_file() and _MARK in index.read_text("utf-8", errors="replace")[:2000]:
        return
    if others := sorted(path.name for path in folder.iterdir()):
        raise ValueError(
            f"the folder of a report must be new or empty or hold an earlier report, but {folder}"
            f" holds {others[0]!r}; choose another one"
        )


def _write(
    folder: str | Path,
    template: str,
    content: dict[str, Any],
    draw: Callable[[int, Path], None],
    image_ids: Sequence[int],
) -> None:
    """Draws the pictures, then replaces the old ones and the page, which comes last."""
    folder = Path(folder)
    check_folder(folder)
    page = _render(template, content)
    with tempfile.TemporaryDirectory(prefix=".pictures-", dir=folder) as drawn:
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(draw, image_id, Path(drawn)) for image_id in image_ids]
            try:
                for job in utils.progress(jobs, desc="report", unit="picture"):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        pictures = folder / "pictures"
        pictures.mkdir(exist_ok=True)
        for old in pictures.iterdir():
            if _OWN_PICTURE.fullmatch(old.name):
                old.unlink()
        for new in Path(drawn).iterdir():
            new.replace(pictures / new.name)
    utils.write_atomic(folder / "index.html", lambda file: file.write(page.encode()))


def _render(template: str, content: dict[str, Any]) -> str:
    with extra("report"):
        import jinja2
        from markupsafe import Markup
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    environment.filters["number"] = _number
    style, script = ((here / name).read_text("utf-8") for name in ("style.css", "page.js"))
    sign: Any = vars(environment.get_template("macros.html").module)["sign"]
    common = {
        "mark": Markup(_MARK),
        "style": Markup(style),
        "script": Markup(script),
        "sign": lambda kind: sign(kind, SIGNS),
        "version": weights.VERSION,
        "date": datetime.date.today().isoformat(),
    }
    return environment.get_template(template).render({**common, **content})


def _number(value: float, digits: int = 3) -> str:
    """A number as the page shows it, and a dash for NaN."""
    return "\N{EN DASH}" if math.isnan(value) else f"{value:.{digits}f}"


# --- Lists of images -----------------------------------------------------------------------------


class _Names:
    """What images are called on a page whose index.html lies in `folder`.

    An image is named after its file, and addressed by its id, or by "source.id" where several
    sources of the data set have one id.
    """

    def __init__(self, dataset: utils.Dataset, folder: str | Path) -> None:
        self.dataset = dataset
        self.folder = Path(folder).resolve()
        ids = Counter(str(info["id"]) for info in dataset.image_info)
        self.repeated = {name for name, count in ids.items() if count > 1}
        self.folders: dict[str, int] = {}

    def row(self, image_id: int) -> Row:
        """Address, name, number of the folder (-1: no file), and name in links if it differs."""
        info = self.dataset.image_info[image_id]
        address = str(info["id"])
        if address in self.repeated:
            address = f"{info['source']}.{address}"
        link = self.dataset.source_image_link(image_id)
        if link is None:
            return [printable(address), printable(address), -1, 0]
        if re.match(r"https?://", str(link)):
            start, _, quoted = str(link).rpartition("/")
            name = urllib.parse.unquote(quoted)
        else:
            path = Path(link)
            name, quoted = path.name, urllib.parse.quote(os.fsencode(path.name))
            start = self._relative(path.parent)
        number = self.folders.setdefault(start, len(self.folders))
        return [printable(address), printable(name), number, 0 if quoted == name else quoted]

    def _relative(self, parent: Path) -> str:
        try:
            path = Path(os.path.relpath(parent.resolve(), self.folder)).as_posix()
            return urllib.parse.quote(os.fsencode(path))
        except ValueError:  # on another drive
            return parent.resolve().as_uri()


def _within_limit(rows: Iterable[Row]) -> list[Row]:
    """The first rows, as many as LIST_BYTES take."""
    taken, size = [], 0
    for row in rows:
        size += len(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()) + 1
        if size > LIST_BYTES:
            break
        taken.append(row)
    return taken


def _items(pairs: Iterable[Sequence[int]], kinds: int, classes: int) -> list[int]:
    """Equal (kind, class, other class), each as one number, followed by -count if there are more.

    A list of 5,000 images with ten of them each must not fill the page.
    """
    items = []
    for (kind, one, other), count in sorted(Counter(map(tuple, pairs)).items()):
        items.append((one * classes + other) * kinds + kind)
        if count > 1:
            items.append(-count)
    return items


def _frame(rows: Sequence[Row]) -> str:
    """Width by height of the frames of pictures, that of most images."""
    ratios = [row[5] / row[6] for row in rows if row[4] >= 0 and row[6]]
    return f"{np.clip(np.median(ratios), 0.75, 1.6) if ratios else 1.0:.3f}"


def _class_names(dataset: utils.Dataset) -> list[str]:
    return [printable(name) for name in dataset.class_names]


def _photo(dataset: utils.Dataset, image_id: int, drawn: Path) -> tuple[int, int]:
    image = dataset.load_image(image_id)
    save_photo(image, drawn / f"{image_id}.jpg")
    height, width = image.shape[:2]
    return height, width


# --- An evaluation -------------------------------------------------------------------------------


def write_evaluation(
    folder: str | Path,
    dataset: utils.Dataset,
    result: evaluation.CocoEvaluation,
    *,
    score: float | None = None,
    pictures: int | None = PICTURES,
    title: str = "Evaluation",
) -> None:
    """Writes the page of an evaluation: its numbers, curves and confusions, and its images.

    Images come with the least panoptic quality first; see report.mistakes for what is counted.
    Under torchrun, for the main process alone.

    Args:
        folder: see check_folder; of an earlier page, all files are replaced.
        dataset: what was evaluated on, at the bit depth of the model (see at_bit_depth).
        result: what evaluate_coco returned.
        score: detections count from here on; None for the score of the highest F1, in steps of
            0.05.
        pictures: so many images are drawn; None or 0 for all.
        title: of the page.

    Raises:
        ValueError: the folder holds something else, Jinja2 is missing, or an image cannot be used.
    """
    judgements = {i: judge(result.truth[i], result.detections[i]) for i in result.truth}
    curve = score_curve(judgements.values(), np.arange(21) / 20)
    chosen = float(curve.scores[:20][curve.f1[:20].argmax()]) if score is None else score
    at = score_curve(judgements.values(), [chosen])
    kinds = {i: judgement.kinds(chosen) for i, judgement in judgements.items()}
    mistakes = {i: _mistakes(image) for i, image in kinds.items()}
    ids = sorted(kinds, key=lambda i: (kinds[i].quality, -mistakes[i], i))
    drawn = ids[: pictures or None]

    names = _Names(dataset, folder)
    pictured = set(drawn)
    rows = _within_limit(
        [
            *names.row(i),
            i if i in pictured else -1,
            *_size(dataset, result, i)[::-1],
            round(100 * kinds[i].quality),
            mistakes[i],
            _items(kinds[i].pairs.tolist(), IGNORED, dataset.num_classes),
        ]
        for i in ids
    )
    matrix = confusion(kinds.values(), dataset.num_classes)
    totals = Counter(k for image in kinds.values() for k in image.pairs[:, 0].tolist())
    content = {
        "title": printable(title),
        "result": result,
        "score": chosen,
        "is_best": score is None,
        "at": {"precision": at.precision[0], "recall": at.recall[0], "f1": at.f1[0]},
        "totals": [totals[kind] for kind in range(IGNORED)],
        "metrics": _metrics(result),
        "classes": _classes(dataset, result, matrix),
        "charts": {
            "precision": {
                kind: _precision_chart(result.precision[kind]) for kind in ("segm", "bbox")
            },
            "scores": _score_chart(judgements.values(), chosen),
            "curve": charts.lines(
                [
                    ("precision", curve.scores, curve.precision),
                    ("recall", curve.scores, curve.recall),
                    ("F1", curve.scores, curve.f1),
                ],
                marker=chosen,
                axes=("score", ""),
            ),
        },
        "matrix": _matrix(dataset, matrix),
        "least_iou": LEAST_IOU,
        "good_iou": GOOD_IOU,
        "order": "most wrong",
        "mistakes": "mistakes",
        "frame": _frame(rows),
        "data": {
            "classes": _class_names(dataset),
            "kinds": [
                ["found", "found"],
                ["poor", "poor mask"],
                ["wrong", "wrong class"],
                ["false", "false"],
                ["missed", "missed"],
            ],
            "panels": [["-truth", "Ground truth"], ["-found", "Prediction"]],
            "folders": [*names.folders],
            "measure": "quality",
            "drawn": len(drawn),
            "images": rows,
        },
        "images": len(ids),
    }

    def draw(image_id: int, to: Path) -> None:
        size = _photo(dataset, image_id, to)
        truth, found = result.truth[image_id], result.detections[image_id]
        marks = _marks(dataset, truth, found, judgements[image_id], kinds[image_id])
        for name, side in zip(("truth", "found"), marks, strict=True):
            (to / f"{image_id}-{name}.svg").write_text(draw_marks(side, size), "utf-8")

    _write(folder, "evaluation.html", content, draw, drawn)


def _mistakes(image: Kinds) -> int:
    return int(np.isin(image.pairs[:, 0], (WRONG, FALSE, MISSED)).sum())


def _size(
    dataset: utils.Dataset, result: evaluation.CocoEvaluation, image_id: int
) -> tuple[int, int]:
    """Height and width of an image, from whatever tells them without reading it; else 0."""
    info = dataset.image_info[image_id]
    if "height" in info and "width" in info:
        return int(info["height"]), int(info["width"])
    masks = [i["segmentation"] for i in result.truth[image_id]]
    masks += list(result.detections[image_id]["masks"])
    return tuple(map(int, masks[0]["size"])) if masks else (0, 0)  # type: ignore[return-value]


METRIC_TEXTS = {
    "AP": "IoU 0.50 to 0.95, mean",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, below 32² pixels",
    "APm": "medium",
    "APl": "large, above 96² pixels",
    "AR1": "recall, 1 an image",
    "AR10": "recall, 10",
    "AR100": "recall, as many as count",
    "ARs": "recall, small",
    "ARm": "recall, medium",
    "ARl": "recall, large",
}


def _metrics(result: evaluation.CocoEvaluation) -> list[dict[str, Any]]:
    return [
        {"name": name, "text": text, "segm": result.segm[name], "bbox": result.bbox[name]}
        for name, text in METRIC_TEXTS.items()
    ]


def _classes(
    dataset: utils.Dataset, result: evaluation.CocoEvaluation, matrix: np.ndarray
) -> list[dict[str, Any]]:
    """A row for each class that is there or was detected."""
    names, precision = _class_names(dataset), result.precision["segm"]
    rows = []
    for i in range(1, dataset.num_classes):
        objects, detections = int(matrix[i].sum()), int(matrix[:, i].sum())
        if not objects and not detections:
            continue
        at50 = precision[0, :, i - 1]
        name = dataset.class_names[i]
        rows.append(
            {
                "id": i,
                "name": names[i],
                "objects": objects,
                "found": int(matrix[i, i]),
                "missed": int(matrix[i, 0]),
                "wrong": objects - int(matrix[i, i]) - int(matrix[i, 0]),
                "false": int(matrix[0, i]),
                "segm": result.segm_per_class[name],
                "segm50": float(at50.mean()) if objects and at50.min() >= 0 else math.nan,
                "bbox": result.bbox_per_class[name],
                "curve": charts.sparkline(at50) if at50.min() >= 0 else "",
            }
        )
    return sorted(rows, key=lambda row: -row["objects"])


def _precision_chart(precision: np.ndarray) -> str:
    """Precision by recall, the mean over the classes that have objects."""
    there = precision[:, :, (precision > -1).all(axis=(0, 1))]
    if not there.shape[2]:
        return charts.lines([], axes=("recall", "precision"))
    curves = there.mean(axis=2)
    recalls = np.linspace(0, 1, curves.shape[1])
    return charts.lines(
        [
            ("IoU 0.50", recalls, curves[0]),
            ("IoU 0.75", recalls, curves[5]),
            ("mean of 0.50 to 0.95", recalls, curves.mean(axis=0)),
        ],
        axes=("recall", "precision"),
    )


def _score_chart(judgements: Iterable[Judgement], chosen: float) -> str:
    """True and false detections by score."""
    right, false = [np.zeros(0)], [np.zeros(0)]
    for judgement in judgements:
        right.append(judgement.scores[judgement.right])
        false.append(judgement.scores[~judgement.right & ~judgement.in_crowd])
    above, below = (np.histogram(np.concatenate(s), 20, (0, 1))[0] for s in (right, false))
    return charts.mirrored(above, below, chosen, axes=("score", "detections"))


def _matrix(dataset: utils.Dataset, matrix: np.ndarray) -> dict[str, Any]:
    """The confusion matrix of the classes that occur, and the most frequent confusions."""
    names = _class_names(dataset)
    weight = matrix.sum(axis=0) + matrix.sum(axis=1)
    weight[0] = 0
    most = np.argsort(-weight, kind="stable")[:MATRIX_CLASSES]
    shown = sorted(int(i) for i in most if weight[i])
    order = [*shown, 0]
    totals = np.maximum(matrix.sum(axis=1), 1)
    rows = [
        {
            "name": names[t] if t else "",
            "id": t,
            "cells": [
                {"id": p, "count": int(matrix[t, p]), "share": float(matrix[t, p] / totals[t])}
                for p in order
            ],
        }
        for t in order
    ]
    confused = [(t, p) for t, p in np.argwhere(matrix).tolist() if t and p and t != p]
    confused.sort(key=lambda pair: -matrix[pair])
    return {
        "names": [names[i] for i in shown],
        "rows": rows,
        "left_out": int((weight > 0).sum()) - len(shown),
        "pairs": [
            {"truth": t, "found": p, "names": (names[t], names[p]), "count": int(matrix[t, p])}
            for t, p in confused[:12]
        ],
    }


def _marks(
    dataset: utils.Dataset,
    truth: Sequence[dict[str, Any]],
    result: dict[str, Any],
    judgement: Judgement,
    kinds: Kinds,
) -> tuple[list[Mark], list[Mark]]:
    """What is marked in the ground truth, and in the prediction."""
    names = dataset.class_names
    many_classes = dataset.num_classes > 2
    objects = [i for i in truth if not i["iscrowd"]]
    expected = [
        Mark(
            KINDS[kind],
            instance["segmentation"],
            instance["bbox"],
            names[instance["category_id"]] if many_classes else "",
        )
        for kind, instance in zip(kinds.objects.tolist(), objects, strict=True)
    ]
    found = []
    results = evaluation.build_coco_results(0, result)
    for d, kind in enumerate(kinds.detections.tolist()):
        if kind == IGNORED:
            continue
        detection = results[judgement.order[d]]
        text = f"{judgement.scores[d]:.2f}"
        if many_classes:
            text = f"{names[detection['category_id']]} {text}"
        elif kind == FOUND:
            text = ""
        if kind == POOR:
            text += f" IoU {judgement.ious[d]:.2f}"
        elif kind == WRONG:
            text += f", is {names[judgement.object_class_ids[judgement.matches[d]]]}"
        found.append(Mark(KINDS[kind], detection["segmentation"], detection["bbox"], text))
    return expected, found


# --- A data set before training ------------------------------------------------------------------

# How anchors and the network see an object, as numbers of the kinds on the page.
_FITS, _UNFIT, _CROWD, _LOST = range(4)
_SURVEY_KINDS = [
    ["found", "with an anchor"],
    ["poor", "without an anchor"],
    ["wrong", "crowd"],
    ["missed", "not visible"],
]


def write_inspection(
    folder: str | Path,
    survey: Survey,
    *,
    problems: Sequence[str] = (),
    pictures: int | None = PICTURES,
    title: str = "Data set",
) -> None:
    """Writes the page of a data set before training: classes, sizes, problems and its images.

    Images with the most objects that training hardly sees come first.

    Args:
        folder: see check_folder; of an earlier page, all files are replaced.
        survey: what inspection.survey returned.
        problems: lines on what is wrong, such as inspection.check_objects finds.
        pictures: so many images are drawn; None or 0 for all.
        title: of the page.

    Raises:
        ValueError: the folder holds something else, or Jinja2 is missing.
    """
    dataset = survey.dataset
    kinds = {image.image_id: _survey_kinds(image) for image in survey.images}
    images = {image.image_id: image for image in survey.images}
    mistakes = {i: int((kinds[i] % 2 == 1).sum()) for i in images}  # _UNFIT and _LOST
    worst = sorted(images, key=lambda i: -mistakes[i])
    some = (pictures or len(worst)) if worst else 0
    # Half of the pictures are those of problems, half a sample of the rest.
    half = [i for i in worst[: some // 2] if mistakes[i]]
    rest = [i for i in worst if i not in set(half)]
    count = min(some - len(half), len(rest))
    sample = [rest[n * len(rest) // count] for n in range(count)]
    drawn = sorted([*half, *sample], key=lambda i: (-mistakes[i], i))
    pictured = set(drawn)
    ids = [*drawn, *(i for i in worst if i not in pictured)]

    names = _Names(dataset, folder)
    rows = _within_limit(
        [
            *names.row(i),
            i if i in pictured else -1,
            *images[i].size[::-1],
            -1,
            mistakes[i],
            _items(_survey_pairs(images[i], kinds[i]), len(_SURVEY_KINDS), dataset.num_classes),
        ]
        for i in ids
    )
    config, fits = survey.config, survey.fits
    remarks = [
        f"{len(found)} {remark}: {_first(found)}"
        for summary in getattr(dataset, "summaries", ())
        for remark, found in summary.remarks.items()
    ]
    counts = [int((image.class_ids > 0).sum()) for image in survey.images]
    content = {
        "title": printable(title),
        "survey": survey,
        "objects": sum(counts),
        "crowds": sum(int((image.class_ids < 0).sum()) for image in survey.images),
        "empty": counts.count(0),
        "crowded": sum(n > config.MAX_GT_INSTANCES for n in counts),
        "max_instances": config.MAX_GT_INSTANCES,
        "good_fit": GOOD_FIT,
        "scales": [round(scale) for scale in config.RPN_ANCHOR_SCALES],
        "shares": [
            (level, int((fits < level).sum()), float((fits < level).mean()) if len(fits) else 0.0)
            for level in (0.3, 0.5, 0.7)
        ],
        "sizes": _sizes(survey),
        "problems": list(map(printable, [*problems, *survey.faults, *remarks])),
        "classes": _survey_classes(survey, kinds),
        "totals": [sum(int((k == kind).sum()) for k in kinds.values()) for kind in range(4)],
        "order": "most problems",
        "mistakes": "problems",
        "frame": _frame(rows),
        "charts": {
            "sides": charts.log_histogram(
                survey.sides, list(map(float, config.RPN_ANCHOR_SCALES)), ("pixels", "objects")
            ),
            "fits": charts.histogram(fits, np.linspace(0, 1, 21), GOOD_FIT, ("IoU", "objects")),
            "counts": charts.counts(counts, ("objects", "images")),
        },
        "data": {
            "classes": _class_names(dataset),
            "kinds": _SURVEY_KINDS,
            "panels": [["-truth", "Annotations"]],
            "folders": [*names.folders],
            "measure": "",
            "drawn": len(drawn),
            "images": rows,
        },
        "images": len(ids),
    }

    def draw(image_id: int, to: Path) -> None:
        size = _photo(dataset, image_id, to)
        instances = evaluation.ground_truth(dataset, image_id)
        marks = [
            Mark(
                _SURVEY_KINDS[kind][0],
                instance["segmentation"],
                instance["bbox"],
                dataset.class_names[instance["category_id"]] if dataset.num_classes > 2 else "",
            )
            for kind, instance in zip(kinds[image_id].tolist(), instances, strict=True)
        ]
        (to / f"{image_id}-truth.svg").write_text(draw_marks(marks, size), "utf-8")

    _write(folder, "inspection.html", content, draw, drawn)


def _first(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")


def _survey_kinds(image: ImageSurvey) -> np.ndarray:
    """[N] for each annotation how training sees it."""
    crowd, lost = image.class_ids < 0, image.sides <= 0
    return np.select([crowd, lost, image.fits < GOOD_FIT], [_CROWD, _LOST, _UNFIT], _FITS)


def _survey_pairs(image: ImageSurvey, kinds: np.ndarray) -> Iterator[tuple[int, int, int]]:
    for kind, class_id in zip(kinds.tolist(), np.abs(image.class_ids).tolist(), strict=True):
        yield kind, class_id, 0


def _sizes(survey: Survey) -> list[tuple[str, int]]:
    """The most frequent sizes of images."""
    counts = Counter(image.size for image in survey.images)
    return [(f"{w} x {h}", count) for (h, w), count in counts.most_common(5)]


def _survey_classes(survey: Survey, kinds: dict[int, np.ndarray]) -> list[dict[str, Any]]:
    names = _class_names(survey.dataset)
    empty = np.zeros(0, dtype=np.int64)
    class_ids = np.concatenate([empty, *(abs(i.class_ids) for i in survey.images)])
    seen = np.concatenate([empty, *(kinds[i.image_id] for i in survey.images)])
    sides = np.concatenate([empty, *(i.sides for i in survey.images)])
    images: Counter[int] = Counter()
    for image in survey.images:
        images.update(set(np.abs(image.class_ids).tolist()))
    rows = []
    for i in range(1, survey.dataset.num_classes):
        of_class = class_ids == i
        objects = of_class & (seen != _CROWD)
        visible = sides[objects & (seen != _LOST)]
        rows.append(
            {
                "id": i,
                "name": names[i],
                "objects": int(objects.sum()),
                "images": images[i],
                "crowds": int((of_class & (seen == _CROWD)).sum()),
                "side": float(np.median(visible)) if len(visible) else math.nan,
                "unfit": int((of_class & (seen == _UNFIT)).sum()),
                "lost": int((of_class & (seen == _LOST)).sum()),
            }
        )
    return sorted(rows, key=lambda row: -row["objects"])
