"""The network beside the numbers of the Keras reference, stage by stage: how far apart they are.

The reference was run once, on deterministic weights (keras_weights.py). Other instruction sets,
numbers of threads and kernels of convolution round differently, so each bound follows from a rule:

- Boxes: 1e-4 of the side of the network's input, a fortieth of a pixel of 256, a tenth of 1024.
  Deltas of the head: what moves a side of the largest box that far.
- Probabilities of classes: 3e-4. Logits of the head: what moves a probability that far, four times
  as much, since the slope of a softmax is at most a quarter.
- Masks: two of the 255 steps in which the reference's are stored.
- Feature maps and RPN outputs: 2e-5 of the root mean square of the map; ten times as much for the
  worst single value, also in RoIAlign.
- What is whole, such as pixels of the image, ranks and the steps of a mask: one of fifty.

The rules are round numbers near what the reference's own kernels differ by among themselves: 1e-4,
3e-4 and 2e-5 for proposals, probabilities and maps. Kernels of SSE4.1, AVX2 and AVX-512 come to a
sixth of a bound in the small configuration (test_matrix.py), to two thirds with ResNet-101 at
1024 x 1024 (slow tests); a change of the arithmetic breaks one by far (test_mutations.py).

Rois of the reference whose crop it calls unstable itself are left out, and so are the masks of its
detections at the border, where it loses a last row of samples to rounding.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from conftest import SHARED, SmallConfig, load_golden
from reference_inputs import synthetic_image
from torch import Tensor

import model as modellib
import utils
from coco import CocoConfig

BOX = 1e-4  # of the side of the network's input
PROBABILITY = 3e-4
MASK = 2 / 255
RMS, WORST = 2e-5, 2e-4
WHOLE = 0.02

STAGES = ("features", "proposals", "heads", "detections", "result")  # methods of Case
SIZES = {"small": (200, 256), "coco": (480, 640)}  # of the image "synth"
CONFIGS = {"small": SmallConfig, "coco": CocoConfig}


class Difference(NamedTuple):
    """How far a stage is from the reference, and how far it may be."""

    stage: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound  # not if it is NaN

    def __str__(self) -> str:
        return f"{self.stage} {self.value:.1e} (at most {self.bound:.1e})"


def build_model(config: str, weights, **options) -> modellib.MaskRCNN:
    """The model of configuration "small" or "coco", for the reference's weights."""
    model = modellib.MaskRCNN(CONFIGS[config](**options))
    model.load_weights(weights, verbose=False)
    return model.eval()


def read_image(config: str, name: str) -> np.ndarray:
    """Image "synth", or "photo1" from ../shared, for which the reference was run."""
    if name == "synth":
        return synthetic_image(*SIZES[config])
    photo = utils.load_image(SHARED / "golden" / "photo1.jpg")
    side = min(photo.shape[:2])
    y, x = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
    return photo if config == "coco" else photo[y : y + side, x : x + side]


class Case:
    """One image through the network; the five methods give the differences of its stages."""

    def __init__(self, model: modellib.MaskRCNN, name: str) -> None:
        self.model, self.name, self.config = model, name, model.config.NAME
        everywhere = (self.config, name) == ("small", "synth")
        folder = {} if everywhere else {"folder": SHARED / "golden"}
        golden = load_golden(f"inference_{self.config}.npz", **folder)
        prefix = f"{name}/"
        self.golden = {k.removeprefix(prefix): golden[k] for k in golden if k.startswith(prefix)}
        self.maps: dict[str, Tensor] = {}  # [B, C, h, w]
        self.image = read_image(self.config, name)
        self._detect()

    def _detect(self) -> None:
        """One call of detect(), and what it computes on its way."""
        model, fpn = self.model, self.model.fpn
        watched = {"conv1_relu": fpn.C1[2], "pyramid": fpn}
        watched |= {name: getattr(fpn, name) for name in ("C1", "C2", "C3", "C4", "C5")}

        def keep(name, module, inputs, output):
            self.maps[name] = output

        def predict(images, windows):
            self.shape = tuple(images.shape[2:])
            self.prediction = type(model).predict(model, images, windows)
            return self.prediction

        hooks = [
            module.register_forward_hook(functools.partial(keep, name))
            for name, module in watched.items()
        ]
        try:
            with mock.patch.object(model, "predict", predict):
                self.found = model.detect([self.image])[0]
        finally:
            for hook in hooks:
                hook.remove()
        self.pyramid = self.maps.pop("pyramid")
        self.maps |= zip(("P2", "P3", "P4", "P5", "P6"), self.pyramid, strict=True)

    def all(self) -> Iterator[Difference]:
        """In the order of the data, each computed when it is asked for."""
        for stage in STAGES:
            yield from getattr(self, stage)()

    def features(self) -> Iterator[Difference]:
        """From the pixels to the outputs of the RPN."""
        rpn = self.prediction.rpn
        stages = self.maps | {"rpn_class_logits": rpn.logits, "rpn_bbox": rpn.deltas}
        for stage, tensor in stages.items():
            ours, theirs = self._samples(stage, tensor)
            rms = root_mean_square(theirs)
            yield Difference(stage, root_mean_square(ours - theirs) / rms, RMS)
            yield Difference(f"{stage}, worst", np.abs(ours - theirs).max() / rms, WORST)

    def proposals(self) -> Iterator[Difference]:
        """As sets: neighbours of nearly equal scores may swap ranks."""
        ours, theirs = self.prediction.proposals.boxes.numpy(), self.golden["rpn_rois"]
        theirs = theirs[theirs.any(axis=1)]
        yield Difference("number of proposals", abs(len(ours) - len(theirs)), 0)
        distance = np.abs(ours[:, None] - theirs).max(axis=2)
        farthest = max(distance.min(axis=0).max(), distance.min(axis=1).max())
        yield Difference("proposals", farthest, BOX)
        ranks = np.abs(distance.argmin(axis=1) - np.arange(len(ours)))
        yield Difference("ranks of proposals", np.mean(ranks > 0), WHOLE)

    @torch.no_grad()
    def heads(self) -> Iterator[Difference]:
        """The crops and outputs of the classifier for the reference's own proposals."""
        boxes = torch.from_numpy(self.golden["rpn_rois"])
        rois = modellib.Rois(boxes, torch.zeros(len(boxes), dtype=torch.int64))
        pyramid = self.pyramid[:4]
        crops = modellib.pyramid_roi_align(pyramid, rois, 7, self.shape, self.model.config)
        ours, theirs = self._samples("roi_align_classifier", crops, per_roi=True)
        yield Difference(
            "crops, worst", np.abs(ours - theirs).max() / root_mean_square(theirs), WORST
        )
        logits, deltas = self.model.classifier(pyramid, rois, self.shape)
        for stage, tensor, bound in (
            ("mrcnn_class_logits", logits, 4 * PROBABILITY),
            ("mrcnn_class", logits.softmax(dim=1), PROBABILITY),
            ("mrcnn_bbox", deltas, BOX / 0.1),  # in units of BBOX_STD_DEV
        ):
            ours, theirs = self._samples(stage, tensor, per_roi=True)
            yield Difference(stage, np.abs(ours - theirs).max(), bound)

    def detections(self) -> Iterator[Difference]:
        """The list of detections with its 28 x 28 masks."""
        found, theirs = self.prediction.detections, self._their_detections()
        rows, columns = self._matches()
        # The reference lost a row of the crops of two rois of this image.
        lost = 2 if (self.config, self.name) == ("coco", "synth") else 0
        missing = max(len(found.boxes), len(theirs)) - len(rows)
        yield Difference("unlike detections", missing, lost)
        if len(rows) == 0:
            return
        theirs = theirs[columns]
        yield Difference("boxes", np.abs(found.boxes.numpy()[rows] - theirs[:, :4]).max(), BOX)
        scores = np.abs(found.scores.numpy()[rows] - theirs[:, 5]).max()
        yield Difference("scores", scores, PROBABILITY)
        # In our order: detections of nearly equal scores may swap places.
        rise = np.diff(theirs[:, 5]).max(initial=0)
        yield Difference("order, as a rise of score", rise, 2 * PROBABILITY)
        stable = ~np.isin(columns, self.golden["border_detections"])
        ours = self.prediction.mask_probs.numpy()[rows[stable]] * 255
        steps = self.golden["class_masks_u8"][columns[stable]]
        worst = np.abs(ours - steps).max() - 0.5  # they are rounded
        yield Difference("masks, worst", max(worst, 0) / 255, MASK)
        yield Difference("steps of masks", np.mean(np.rint(ours) != steps), WHOLE)

    def result(self) -> Iterator[Difference]:
        """What detect() returns, in pixels of the image."""
        rows, columns = self._matches()
        boxes, masks = self.found["rois"][rows], self.found["masks"][:, :, rows]
        theirs = self.golden["result_rois"][columns]
        yield Difference("rois, on average", np.abs(boxes - theirs).mean(), WHOLE)
        classes = self.found["class_ids"][rows] != self.golden["result_class_ids"][columns]
        yield Difference("class_ids", classes.sum(), 0)
        scores = self.found["scores"][rows] - self.golden["result_scores"][columns]
        yield Difference("scores of the result", np.abs(scores).max(), PROBABILITY)

        same = (boxes == theirs).all(axis=1) & ~np.isin(columns, self.golden["border_detections"])
        masks, columns = masks[:, :, same], columns[same]
        if "result_masks_packed" in self.golden:
            shape = self.golden["result_masks_shape"]
            packed = np.unpackbits(self.golden["result_masks_packed"])[: shape.prod()]
            theirs = packed.reshape(shape)[:, :, columns].astype(bool)
            wrong, size = (masks ^ theirs).sum((0, 1)), (masks | theirs).sum((0, 1))
        else:
            size = self.golden["result_mask_area"][columns]
            wrong = np.abs(masks.sum((0, 1)) - size)
        # In a mask of less than fifty pixels one may differ.
        yield Difference("pixels of a mask", (wrong / np.maximum(size, 50)).max(), WHOLE)

    def _samples(
        self, stage: str, tensor: Tensor, per_roi: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Our and the reference's values at the places that it stored, but for unstable rois."""
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 2, 3, 1)  # NHWC as there
        places, shape = self.golden[f"{stage}.idx"], self.golden[f"{stage}.shape"]
        assert tensor.shape == tuple(shape[1:] if per_roi else shape)
        if per_roi:
            unstable = self.golden["onednn_unstable_rois"]
            stable = ~np.isin(places // np.prod(shape[2:]), unstable)
        else:
            stable = np.full(len(places), True)
        ours, theirs = tensor.flatten()[places].numpy(), self.golden[f"{stage}.val"]
        return ours[stable].astype(np.float64), theirs[stable].astype(np.float64)

    def _their_detections(self) -> np.ndarray:
        """[N, (y1, x1, y2, x2, class, score)] without the padding."""
        return self.golden["detections"][self.golden["detections"][:, 4] > 0]

    def _matches(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of our and of the reference's detections that are meant to be the same."""
        found, theirs = self.prediction.detections, self._their_detections()
        distance = np.abs(found.boxes.numpy()[:, None] - theirs[:, :4]).max(axis=2)
        distance[found.class_ids.numpy()[:, None] != theirs[:, 4]] = np.inf
        rows = np.flatnonzero(distance.min(axis=1) <= 10 * BOX)
        return rows, distance.argmin(axis=1)[rows]


def root_mean_square(values: np.ndarray) -> float:
    return np.sqrt(np.mean(np.square(values, dtype=np.float64)))


# ------------------------------------------------------------------ other forms of the network


def assert_same_objects(outputs, model: modellib.MaskRCNN, images) -> int:
    """Compares what an exported network gives with what detect and predict give.

    Args:
        outputs: boxes, class_ids, scores, masks and image_index.
        images: of one size.

    Returns:
        The number of objects.
    """
    *found, image_index = outputs
    assert (np.diff(image_index) >= 0).all()
    expected = [model.detect([image], masks="box")[0] for image in images]
    assert np.bincount(image_index, minlength=len(images)).tolist() == [
        len(result["scores"]) for result in expected
    ]
    for i, result in enumerate(expected):
        boxes, class_ids, scores, masks = (values[image_index == i] for values in found)
        np.testing.assert_array_equal(class_ids, result["class_ids"])
        np.testing.assert_allclose(boxes, result["boxes"], rtol=0, atol=0.01)
        np.testing.assert_allclose(scores, result["scores"], rtol=0, atol=1e-4)
        probs = model.predict(*model.mold_inputs([images[i]])).mask_probs.numpy()
        if len(probs) == len(masks):  # else some boxes were too thin to be seen
            np.testing.assert_allclose(masks, probs, rtol=0, atol=1e-3)
    return len(image_index)
