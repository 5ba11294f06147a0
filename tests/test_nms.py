"""nms and batched_nms: both CPU kernels against a loop, the reference's numbers and edge cases."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import load_golden
from test_operators import run_unbuilt

from nms import batched_nms, is_compiled, nms
from nms.ops import _nms as plain_nms

NAN, INF = math.nan, math.inf
KERNELS = [
    pytest.param(plain_nms, id="plain"),
    pytest.param(
        nms,
        id="compiled",
        marks=pytest.mark.skipif("cpu" not in is_compiled(), reason="nms is not compiled"),
    ),
]
both_kernels = pytest.mark.parametrize("kernel", KERNELS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random_boxes(count, seed=0, side=60):
    """Boxes on a grid of whole pixels, with many exact ties of IoU and of score."""
    generator = np.random.RandomState(seed)
    corner = generator.randint(0, side, (count, 2))
    boxes = np.concatenate([corner, corner + generator.randint(1, 25, (count, 2))], axis=1)
    return torch.tensor(boxes, dtype=torch.float32), torch.tensor(
        generator.randint(0, 40, count) / 40, dtype=torch.float32
    )


@both_kernels
@both_dtypes
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 2, 65, 300])
def test_keeps_what_a_loop_keeps(kernel, dtype, threshold, count):
    boxes, scores = random_boxes(count, seed=count)
    keep = kernel(boxes.to(dtype), scores.to(dtype), threshold)
    assert keep.dtype == torch.int64
    assert keep.tolist() == reference.nms(boxes, scores, threshold)


@both_kernels
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_keeps_what_the_reference_keeps(kernel, threshold):
    golden = load_golden("training_side.npz")
    boxes, scores = (torch.from_numpy(golden[f"nms/{name}"]) for name in ("boxes", "scores"))
    for dtype in (torch.float32, torch.float64):
        keep = kernel(boxes.to(dtype), scores.to(dtype), threshold)
        assert keep.tolist() == golden[f"nms/keep_{threshold}"].tolist()


@both_kernels
@pytest.mark.parametrize(("dtype", "numpy"), [(torch.float32, np.float32), (torch.float64, float)])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_threshold_to_the_last_bit(kernel, dtype, numpy, threshold):
    edge = numpy(threshold)
    for iou, kept in (
        (np.nextafter(edge, numpy(0)), 2),
        (edge, 2),
        (np.nextafter(edge, numpy(1)), 1),
    ):
        boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, iou]], dtype=dtype)
        assert len(kernel(boxes, torch.tensor([1.0, 0.5]), threshold)) == kept


@both_kernels
@both_dtypes
def test_an_exact_tie_is_not_above_the_threshold(kernel, dtype):
    # 63 / 90 is 0.7, yet 63 > 0.7 * 90 in float64
    boxes = torch.tensor([[0, 0, 1, 90], [0, 0, 1, 63]], dtype=dtype)
    assert kernel(boxes, torch.tensor([1.0, 0.5]), 0.7).tolist() == [0, 1]
    assert kernel(boxes, torch.tensor([1.0, 0.5]), 0.69).tolist() == [0]


@both_kernels
def test_touching_boxes_do_not_overlap(kernel):
    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20]])
    assert kernel(boxes, torch.tensor([1.0, 2.0, 3.0]), 0.0).tolist() == [2, 1, 0]


@both_kernels
def test_equal_scores_keep_their_order(kernel):
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(200, 1) + 20 * torch.arange(200.0)[:, None]
    assert kernel(boxes, torch.zeros(200), 0.5).tolist() == list(range(200))
    assert kernel(boxes[:1].repeat(200, 1), torch.zeros(200), 0.5).tolist() == [0]


@both_kernels
def test_flipped_corners_are_put_in_order(kernel):
    boxes, scores = random_boxes(300)
    flipped = boxes.clone()
    flipped[::2] = flipped[::2][:, [2, 1, 0, 3]]
    flipped[::3] = flipped[::3][:, [0, 3, 2, 1]]
    assert torch.equal(kernel(flipped, scores, 0.5), kernel(boxes, scores, 0.5))


@both_kernels
@both_dtypes
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_suppresses_nothing(kernel, dtype, position, value):
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10.5]], dtype=dtype)
    boxes[0, position] = value
    scores = torch.tensor([3.0, 2.0, 1.0])
    assert kernel(boxes, scores, 0.0).tolist() == [0, 1]
    assert kernel(boxes, scores, 0.5).tolist() == [0, 1]
    assert kernel(boxes, scores, 1.0).tolist() == [0, 1, 2]


@both_kernels
def test_an_area_beyond_float32_suppresses_nothing(kernel):
    boxes = torch.tensor([[-3e38, -3e38, 3e38, 3e38], [0, 0, 10, 10], [0, 0, 3e38, 3e38]])
    assert kernel(boxes, torch.tensor([3.0, 2.0, 1.0]), 0.0).tolist() == [0, 1, 2]


@both_kernels
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_boxes_without_area_suppress_nothing(kernel, threshold):
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 5, 10, 5], [0, 0, 10, 10]])
    assert kernel(boxes, torch.tensor([4.0, 3, 2, 1]), threshold).tolist() == [0, 1, 2, 3]


@both_kernels
def test_a_nan_score_ranks_last_and_suppresses_nothing(kernel):
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    scores = torch.tensor([NAN, -INF, NAN, INF, 0.5])
    assert kernel(boxes, scores, 0.5).tolist() == [3, 0, 2]
    assert kernel(boxes, torch.full((5,), NAN), 0.5).tolist() == [0, 1, 2, 3, 4]


@both_kernels
def test_no_boxes(kernel):
    keep = kernel(torch.empty(0, 4), torch.empty(0), 0.5)
    assert keep.shape == (0,)
    assert keep.dtype == torch.int64


@both_kernels
def test_strided_inputs(kernel):
    boxes, scores = random_boxes(300)
    columns = boxes.t().contiguous().t()
    wide = torch.stack([scores, -scores], dim=1)[:, 0]
    assert not columns.is_contiguous()
    assert torch.equal(kernel(columns, wide, 0.5), kernel(boxes, scores, 0.5))


@pytest.mark.skipif("cpu" not in is_compiled(), reason="nms is not compiled")
@both_dtypes
def test_kernels_agree_on_many_boxes(dtype):
    generator = torch.Generator().manual_seed(1)
    centre = torch.rand(1500, 2, generator=generator, dtype=dtype)
    size = torch.rand(1500, 2, generator=generator, dtype=dtype) * 0.2
    boxes = torch.cat([centre - size, centre + size], dim=1)
    boxes[::97] = NAN
    scores = torch.rand(1500, generator=generator)
    for threshold in (0.1, 0.7):
        assert torch.equal(nms(boxes, scores, threshold), plain_nms(boxes, scores, threshold))


@both_dtypes
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_groups_do_not_meet(dtype, threshold):
    boxes, scores = random_boxes(400, seed=3)
    boxes = boxes - 20  # some coordinates are negative
    group = torch.tensor(np.random.RandomState(4).randint(0, 9, 400) * 10**15 - 10**15)
    keep = batched_nms(boxes.to(dtype), scores.to(dtype), group, threshold)
    assert keep.tolist() == reference.nms(boxes, scores, threshold, group)


def test_groups_of_small_boxes_keep_their_precision():
    # In the unit frame, with an IoU one bit around the threshold, in the last of 700 groups.
    threshold = np.float32(0.5)
    for iou, kept in ((threshold, 2), (np.nextafter(threshold, np.float32(1)), 1)):
        pair = torch.tensor([[0, 0, 1, 1], [0, 0, 1, iou]])
        boxes = pair.repeat(700, 1)
        group = torch.arange(700).repeat_interleave(2)
        keep = batched_nms(boxes, torch.ones(1400), group, float(threshold))
        assert len(keep) == 700 * kept


def test_groups_with_coordinates_that_are_not_finite():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, INF, 10], [NAN, 0, 10, 10], [0, 0, 10, 10.0]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.4])
    assert batched_nms(boxes, scores, torch.tensor([0, 0, 0, 0]), 0.5).tolist() == [1, 2, 0]
    assert batched_nms(boxes, scores, torch.tensor([0, 1, 1, 1]), 0.5).tolist() == [1, 2, 0, 3]
    assert (
        batched_nms(boxes[:0], scores[:0], torch.tensor([], dtype=torch.long), 0.5).tolist() == []
    )


BOXES, SCORES = torch.zeros(3, 4), torch.zeros(3)


@pytest.mark.parametrize(
    ("boxes", "scores", "threshold", "error", "message"),
    [
        (BOXES.long(), SCORES, 0.5, TypeError, "boxes must be float32 or float64, got torch.int64"),
        (BOXES.half(), SCORES, 0.5, TypeError, "boxes must be float32 or float64, got"),
        (BOXES, SCORES.long(), 0.5, TypeError, "scores must be float32 or float64, got"),
        (BOXES[:, :3], SCORES, 0.5, ValueError, r"\[N, \(y1, x1, y2, x2\)\], got shape \(3, 3\)"),
        (BOXES[0], SCORES, 0.5, ValueError, r"got shape \(4,\)"),
        (BOXES, SCORES[:2], 0.5, ValueError, r"scores must be \[N\] = \[3\] .* got \[2\]"),
        (BOXES, SCORES[:, None], 0.5, ValueError, r"got \[3, 1\]"),
        (BOXES, SCORES.to("meta"), 0.5, ValueError, "on cpu like boxes, got .* on meta"),
        (BOXES, SCORES, 1.5, ValueError, "iou_threshold must be within 0..1, got 1.5"),
        (BOXES, SCORES, -0.1, ValueError, "iou_threshold must be within 0..1, got -0.1"),
        (BOXES, SCORES, NAN, ValueError, "iou_threshold must be within 0..1, got nan"),
    ],
)
def test_errors(boxes, scores, threshold, error, message):
    with pytest.raises(error, match=message):
        nms(boxes, scores, threshold)


def test_group_errors():
    with pytest.raises(TypeError, match="group must be int64, got torch.float32"):
        batched_nms(BOXES, SCORES, SCORES, 0.5)
    with pytest.raises(ValueError, match=r"shape and device of scores, \(3,\) on cpu, got \(2,\)"):
        batched_nms(BOXES, SCORES, torch.zeros(2, dtype=torch.long), 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((BOXES[:, :3], SCORES, 0.5), ValueError, r"boxes must be \[N, .*3, 3"),
        ((BOXES[0], SCORES, 0.5), ValueError, r"boxes must be \[N, .*4"),
        ((BOXES, SCORES[:2], 0.5), ValueError, r"scores must be \[N\] .*2"),
        (
            (BOXES.half(), SCORES, 0.5),
            TypeError,
            "boxes must be float32 or float64, got .*(Half|16)",
        ),
        (
            (BOXES, SCORES.long(), 0.5),
            TypeError,
            "scores must be float32 or float64, got .*(Long|64)",
        ),
        ((BOXES, SCORES, NAN), ValueError, "iou_threshold must be within 0..1, got nan"),
        ((BOXES, SCORES, -1.0), ValueError, "iou_threshold must be within 0..1, got -1"),
        ((BOXES, SCORES, INF), ValueError, "iou_threshold must be within 0..1, got inf"),
        ((BOXES, SCORES.to("meta"), 0.5), ValueError, "be on one device, got cpu and meta"),
        ((BOXES.to("meta"), SCORES, 0.5), ValueError, "be on one device, got meta and cpu"),
    ],
)
@pytest.mark.parametrize("kernel", [plain_nms, torch.ops.nms.nms], ids=["plain", "operator"])
def test_the_operator_itself_refuses_what_nms_refuses(kernel, arguments, error, message):
    with pytest.raises(error, match=f"^nms: .*{message}"):
        kernel(*arguments)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@pytest.mark.parametrize("count", [0, 1, 70])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(count, requires_grad):
    boxes, scores = random_boxes(count)
    arguments = boxes.requires_grad_(requires_grad), scores.requires_grad_(requires_grad), 0.5
    torch.library.opcheck(torch.ops.nms.nms.default, arguments)


def test_autocast_computes_in_float32():
    boxes, scores = random_boxes(100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nms(boxes.bfloat16(), scores, 0.5), nms(boxes, scores, 0.5))


def test_an_unbuilt_checkout_works(tmp_path):
    code = """
import torch
from nms import batched_nms, is_compiled, nms
boxes = torch.tensor([[0., 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]])
scores = torch.tensor([.1, .2, .3])
print(is_compiled(), nms(boxes, scores, 0.5).tolist())
print(batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.5).tolist())
"""
    assert run_unbuilt(code, tmp_path) == ("() [2, 1]\n[2, 1, 0]", "")
