"""The readers of VIA and labelme against masks drawn by other means."""

import base64
import io
import json
import os

import numpy as np
import pytest
import skimage.draw
from conftest import SHARED, needs_shared
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

import annotations

HEIGHT, WIDTH = 60, 90
STAR = [(10, 5), (40, 12), (70, 5), (50, 30), (72, 55), (38, 44), (8, 52), (25, 28)]
POLYGON = {
    "name": "polygon",
    "all_points_x": [x for x, _ in STAR],
    "all_points_y": [y for _, y in STAR],
}
RECT = {"name": "rect", "x": 12, "y": 7, "width": 20, "height": 31}
CIRCLE = {"name": "circle", "cx": 44, "cy": 30, "r": 17.5}
ELLIPSE = {"name": "ellipse", "cx": 45, "cy": 30, "rx": 30, "ry": 11, "theta": 0.4}
POINT = {"name": "point", "cx": 10, "cy": 11}
POLYLINE = {"name": "polyline", "all_points_x": [1, 50, 60], "all_points_y": [1, 20, 50]}


@pytest.fixture
def folder(tmp_path):
    """Two photographs; that of b.jpg lies on its side, as a phone stores it."""
    Image.new("RGB", (WIDTH, HEIGHT), "gray").save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH), "gray").save(tmp_path / "b.jpg", exif=exif)
    return tmp_path


def region(shape, **attributes):
    return {"shape_attributes": shape, "region_attributes": attributes}


def via(name, regions):
    """An entry as VIA writes it, version 1 with the regions in a dict."""
    entry = {"filename": name, "size": 1234, "regions": regions, "file_attributes": {}}
    return entry if isinstance(regions, list) else {"fileref": "", "base64_img_data": "", **entry}


def save(folder, content, name="regions.json"):
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def read_via(folder, *entries, **options):
    data = annotations.ViaDataset()
    path = save(folder, {f"{i}": entry for i, entry in enumerate(entries)})
    data.summary = data.load_annotations(folder, path, **options)
    data.prepare()
    return data


def subpixel(inside, height=HEIGHT, width=WIDTH, n=8):
    """The share of each pixel that lies in a shape: inside(y, x) of n x n points in it."""
    y, x = np.mgrid[: height * n, : width * n]
    values = inside((y + 0.5) / n, (x + 0.5) / n).astype(float)
    return values.reshape(height, n, width, n).mean(axis=(1, 3))


def assert_draws(mask, share):
    """All pixels inside of the shape, none outside, and of those on its border about half."""
    assert mask[share == 1].all()
    assert not mask[share == 0].any()
    assert abs(mask.sum() - share.sum()) < 0.1 * ((share > 0) & (share < 1)).sum() + 1


def polygon_share(points, height=HEIGHT, width=WIDTH, n=8):
    big = Image.new("1", (width * n, height * n))
    ImageDraw.Draw(big).polygon([(x * n, y * n) for x, y in points], fill=1)
    return np.asarray(big).reshape(height, n, width, n).mean(axis=(1, 3))


# --- VIA -----------------------------------------------------------------------------------------


def test_shapes_of_via_cover_their_pixels(folder):
    regions = [region(shape) for shape in (POLYGON, RECT, CIRCLE, ELLIPSE)]
    masks, class_ids = read_via(folder, via("a.png", regions)).load_mask(0)
    assert (masks.shape, masks.dtype) == ((HEIGHT, WIDTH, 4), bool)
    np.testing.assert_array_equal(class_ids, [1, 1, 1, 1])
    assert_draws(masks[:, :, 0], polygon_share(STAR))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[7:38, 12:32] = True
    np.testing.assert_array_equal(masks[:, :, 1], expected)
    assert_draws(masks[:, :, 2], subpixel(lambda y, x: (y - 30) ** 2 + (x - 44) ** 2 <= 17.5**2))
    # skimage turns the other way about, between pixel centres.
    rows, columns = skimage.draw.ellipse(29.5, 44.5, 11, 30, (HEIGHT, WIDTH), rotation=-0.4)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[rows, columns] = True
    assert (masks[:, :, 3] != expected).sum() <= 0.02 * expected.sum()
    assert masks[40, 67, 3]  # the y axis points down, so it does to the lower right
    assert not masks[20, 67, 3]


@pytest.mark.parametrize("version", ["1", "2", "project"])
def test_each_version_of_via(folder, version):
    regions = [region(RECT, kind="fig"), region(CIRCLE, kind="date")]
    if version == "1":
        content = {"a.png1234": via("a.png", {"0": regions[0], "1": regions[1]})}
    else:
        content = {"a.png1234": via("a.png", regions), "b.jpg1234": via("b.jpg", [])}
    if version == "project":
        content = {
            "_via_settings": {"ui": {}, "core": {}, "project": {"name": "fruit"}},
            "_via_img_metadata": content,
            "_via_attributes": {"region": {"kind": {"type": "dropdown"}}, "file": {}},
            "_via_data_format_version": "2.0.10",
            "_via_image_id_list": list(content),
        }
    data = annotations.ViaDataset()
    data.load_annotations(folder, save(folder, content))
    data.prepare()
    assert data.class_names == ["BG", "date", "fig"]
    masks, class_ids = data.load_mask(0)
    np.testing.assert_array_equal(class_ids, [2, 1])
    assert masks[:, :, 0].sum() == 20 * 31
    if version != "1":  # b.jpg shows no object
        assert data.num_images == 2
        assert data.load_mask(1)[0].shape == (HEIGHT, WIDTH, 0)


def test_masks_are_as_large_as_the_upright_image(folder):
    data = read_via(folder, via("b.jpg", [region(RECT)]))
    masks, _ = data.load_mask(0)
    assert masks.shape[:2] == data.load_image(0).shape[:2] == (HEIGHT, WIDTH)
    assert masks[7:38, 12:32, 0].all()


def test_a_shape_may_leave_the_image(folder):
    far = {"name": "rect", "x": -30, "y": 50, "width": 60, "height": 500}
    masks, _ = read_via(folder, via("a.png", [region(far)])).load_mask(0)
    assert masks.sum() == masks[50:, :30].sum() == 10 * 30


def test_the_class_is_in_the_attribute_that_one_names(folder):
    boxes = {"fig": False, "date": True}
    regions = [region(RECT, kind=boxes, note="ripe"), region(CIRCLE, kind=" fig ", note="")]
    entry = via("a.png", regions)
    with pytest.raises(ValueError, match=r"must be in one of \['kind', 'note'\]"):
        read_via(folder, entry)
    data = read_via(folder, entry, attribute="kind")
    assert data.class_names == ["BG", "date", "fig"]
    np.testing.assert_array_equal(data.load_mask(0)[1], [1, 2])
    # Validation data may lack a class, and must not have another one.
    data = read_via(folder, entry, attribute="kind", class_names=["nut", "fig", "date"])
    np.testing.assert_array_equal(data.load_mask(0)[1], [3, 2])
    message = r"regions.json must have .* of \['date'\], got \['fig'\], .* in a.png, region 1"
    with pytest.raises(ValueError, match=message):
        read_via(folder, entry, attribute="kind", class_names=["date"])
    with pytest.raises(ValueError, match=r"one of \['kind', 'note'\], got 'class'"):
        read_via(folder, entry, attribute="class")


def test_without_attributes_there_is_one_class(folder):
    entry = via("a.png", [region(RECT)])
    assert read_via(folder, entry).class_names == ["BG", "object"]
    assert read_via(folder, entry, class_names=["balloon"]).class_names == ["BG", "balloon"]


def test_what_has_no_area_is_left_out_with_a_warning(folder, caplog):
    regions = [region(POINT), region(RECT), region(POLYLINE)]
    data = read_via(folder, via("a.png", regions))
    assert data.load_mask(0)[0].sum(axis=(0, 1)).tolist() == [20 * 31]
    listed = {"regions left out, points and lines without an area": named(0, 2)}
    assert data.summary.remarks == listed
    assert (data.summary.images, data.summary.annotations, data.summary.classes) == (1, 1, 1)
    assert [record.getMessage() for record in caplog.records] == [str(data.summary)]
    with pytest.raises(ValueError, match="must have objects with an area, found none; regions"):
        read_via(folder, via("a.png", [region(POINT)]))


def named(*numbers):
    return [f"a.png, region {number}" for number in numbers]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (region({"name": "polygon", "all_points_x": [1, 2, 3]}), "malformed"),
        (region({**POLYGON, "all_points_y": [1, 2]}), "malformed"),
        (region({"name": "polygon", "all_points_x": [1, 9], "all_points_y": [1, 9]}), "of fewer"),
        (
            region({"name": "polygon", "all_points_x": [], "all_points_y": []}),
            "of fewer than three",
        ),
        (region({"name": "polygon", "all_points_x": 3, "all_points_y": 4}), "malformed"),
        (region({**RECT, "width": None}), "malformed"),
        (region({**CIRCLE, "r": float("nan")}), "with numbers that are not finite"),
        (region({**CIRCLE, "r": 1e300}), "far outside of the image"),
        (region({**ELLIPSE, "theta": float("inf")}), "malformed"),
        (region({**RECT, "x": 200}), "without a pixel in the image"),
        (region({**RECT, "width": 0}), "without a pixel in the image"),
        (region({**RECT, "x": 0.2, "y": 0.3, "width": 0.5, "height": 0.6}), "not larger than a"),
        (region({"name": "cuboid"}), "of an unknown shape, 'cuboid'"),
        ({"region_attributes": {}}, "malformed"),
        ({"region_attributes": [], "shape_attributes": []}, "malformed"),
        ("RECT", "malformed"),
        (7, "malformed"),
        (None, "malformed"),
    ],
)
def test_a_region_that_cannot_be_used_is_dropped_and_listed(folder, wrong, reason):
    data = read_via(folder, via("a.png", [region(RECT), wrong, region(CIRCLE)]))
    assert data.load_mask(0)[0].any(axis=(0, 1)).tolist() == [True, True]
    ((remark, items),) = data.summary.remarks.items()
    assert remark.startswith(f"regions dropped, {reason}")
    assert [item[:15] for item in items] == named(1)
    assert str(data.summary).count("\n") == 1


@pytest.mark.parametrize("value", [None, "", " ", {}, {"fig": True, "date": True}, [], True])
def test_a_region_without_a_class_is_dropped_and_listed(folder, value):
    regions = [region(RECT, kind="fig"), region(CIRCLE, kind=value), region(RECT)]
    regions[2]["region_attributes"] = [] if value == [] else {}
    data = read_via(folder, via("a.png", regions))
    assert data.load_mask(0)[1].tolist() == [1]
    assert sum(map(len, data.summary.remarks.values())) == 2


def test_classes_may_be_numbers(folder):
    regions = [
        region(RECT, kind=value) for value in (0, 1.0, "1", 2.5, " a\n b ", "\ud800", "\x1b[2J")
    ]
    data = read_via(folder, via("a.png", regions))
    assert data.class_names == ["BG", "0", "1", "2.5", "a b"]
    np.testing.assert_array_equal(data.load_mask(0)[1], [1, 2, 2, 3, 4])
    listed = {"regions dropped, of a class whose name cannot be printed": named(5, 6)}
    assert data.summary.remarks == listed


def test_an_image_that_cannot_be_used_is_dropped_and_listed(folder):
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "inside").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "inside" / "c.png")
    names = ["a.png", "gone.png", "broken.png", "c.png", "a\0.png"]
    entries = [via(name, [region(RECT)]) for name in names]
    data = read_via(folder, *entries, via("d.png", 7), {"filename": 8, "regions": []})
    assert [info["id"] for info in data.image_info] == ["a.png"]
    missing = data.summary.remarks[f"images dropped, no such file in {folder}"]
    assert missing == ["gone.png", "c.png (c.png lies in inside/)", "a\0.png"]
    assert [i.split()[0] for i in data.summary.remarks["images dropped, unreadable"]] == [
        "broken.png"
    ]
    assert data.summary.remarks["images dropped, malformed"] == ["5", "6"]
    with pytest.raises(FileNotFoundError, match=r"none can be used; images dropped.*: gone.png"):
        read_via(folder, via("gone.png", [region(RECT)]))


def test_images_of_one_name_in_different_folders_differ(folder):
    for name in ("left", "right", "more"):
        (folder / name).mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name / "a.png")
    names = ["left\\a.png", "right/a.png", "a.png"]
    data = read_via(folder, *(via(name, [region(RECT)]) for name in names))
    assert [info["id"] for info in data.image_info] == ["left/a.png", "right/a.png", "a.png"]
    data.load_annotations(folder / "more", save(folder, {"0": via("a.png", [region(RECT)])}))
    assert data.image_info[3]["id"] == (folder / "more" / "a.png").as_posix()


def test_of_two_entries_for_one_file_that_of_its_size_is_meant(folder):
    size = (folder / "a.png").stat().st_size
    one, two = via("a.png", [region(RECT)]), via("a.png", [region(CIRCLE)])
    data = read_via(folder, one, {**two, "size": size})
    assert not data.load_mask(0)[0][7, 12, 0]  # the corner of RECT
    listed = {"images dropped, others are of the same file": ["a.png (a.png)"]}
    assert data.summary.remarks == listed
    with pytest.raises(FileNotFoundError, match="others are of the same file"):
        read_via(folder, one, two)


def test_classes_and_images_add_up_over_several_files(folder):
    data = read_via(folder, via("a.png", [region(RECT, kind="fig")]))
    path = save(folder, {"0": via("b.jpg", [region(RECT, kind="date"), region(RECT, kind="fig")])})
    data.load_annotations(folder, path)
    data.prepare()
    assert data.class_names == ["BG", "fig", "date"]
    np.testing.assert_array_equal(data.load_mask(1)[1], [2, 1])
    with pytest.raises(ValueError, match=r"images must be loaded once, got .*b\.jpg again from"):
        data.load_annotations(folder, path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#filename,file_size", "is not json"),
        ("[]", "is not of VIA"),
        ('{"images": [], "annotations": []}', "is not of VIA"),
        ('{"project": {}, "config": {}, "file": {"1": {"fname": "a.png"}}}', "is not of VIA"),
    ],
)
def test_a_file_of_another_kind_is_refused(folder, text, reason):
    path = folder / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"other.json {reason}"):
        annotations.ViaDataset().load_annotations(folder, path)


def test_missing_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match="gone.json"):
        annotations.ViaDataset().load_annotations(folder, folder / "gone.json")


# --- labelme -------------------------------------------------------------------------------------


def shape(label, kind, points, **more):
    return {
        **{"label": label, "points": points, "group_id": None, "description": ""},
        **{"shape_type": kind, "flags": {}, "mask": None, **more},
    }


def labelme(folder, name, shapes, path="a.png", size=(HEIGHT, WIDTH)):
    content = {
        **{"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": path},
        **{"imageData": None, "imageHeight": size[0], "imageWidth": size[1]},
    }
    return save(folder, content, name)


def png(mask):
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def read_labelme(folder, images=None):
    data = annotations.LabelmeDataset()
    data.summary = data.load_annotations(images or folder, folder)
    data.prepare()
    return data


def test_shapes_of_labelme_cover_their_pixels(folder):
    patch = np.random.default_rng(0).random((9, 14)) < 0.5
    shapes = [
        shape("star", "polygon", STAR),
        shape("box", "rectangle", [[32.0, 38.0], [12.0, 7.0]]),  # drawn from the lower right
        shape("coin", "circle", [[44.0, 30.0], [44.0 + 10.5, 30.0 + 14.0]]),
        shape("blob", "mask", [[80.0, 55.0], [94.0, 64.0]], mask=png(patch)),
        shape("box", "oriented_rectangle", [[20, 10.3], [40, 30.3], [30, 40.3], [10, 20.3]]),
    ]
    labelme(folder, "a.json", shapes)
    data = read_labelme(folder)
    assert data.class_names == ["BG", "blob", "box", "coin", "star"]
    masks, class_ids = data.load_mask(0)
    np.testing.assert_array_equal(class_ids, [4, 2, 3, 1, 2])
    assert_draws(masks[:, :, 0], polygon_share(STAR))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[7:38, 12:32] = True
    np.testing.assert_array_equal(masks[:, :, 1], expected)
    assert_draws(masks[:, :, 2], subpixel(lambda y, x: (y - 30) ** 2 + (x - 44) ** 2 <= 17.5**2))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[55:60, 80:90] = patch[:5, :10]  # what is in the image
    np.testing.assert_array_equal(masks[:, :, 3], expected)
    assert_draws(
        masks[:, :, 4],
        subpixel(lambda y, x: (abs(x - y + 0.3) <= 10) & (abs(x + y - 50.3) <= 20)),
    )


def test_regions_of_a_group_are_one_object(folder):
    corners = [[[0, 0], [5, 5]], [[10, 10], [15, 20]], [[20, 0], [30, 5]], [[40, 0], [50, 5]]]
    labels, groups = ["fig", "fig", "nut", "fig"], [1, 1, 1, None]
    shapes = [
        shape(label, "rectangle", points, group_id=group)
        for label, points, group in zip(labels, corners, groups, strict=True)
    ]
    labelme(folder, "a.json", shapes)
    masks, class_ids = read_labelme(folder).load_mask(0)
    np.testing.assert_array_equal(class_ids, [1, 2, 1])
    assert masks.sum(axis=(0, 1)).tolist() == [25 + 50, 50, 50]


def test_an_image_is_found_beside_the_json_or_by_name(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("json")
    square = [shape("fig", "rectangle", [[0, 0], [5, 5]])]
    labelme(other, "1.json", square, path="..\\photos\\a.png")  # saved on Windows
    labelme(other, "2.json", [], path=os.path.relpath(folder / "b.jpg", other))
    data = read_labelme(other, folder)
    assert [info["id"] for info in data.image_info] == ["a.png", "b.jpg"]
    assert [data.load_image(i).shape for i in (0, 1)] == [(HEIGHT, WIDTH, 3)] * 2
    (other / "2.json").unlink()
    with pytest.raises(FileNotFoundError, match="a.png"):
        read_labelme(other, tmp_path_factory.mktemp("empty"))


def test_files_of_labelme_in_folders(folder, tmp_path_factory):
    other, square = tmp_path_factory.mktemp("json"), [shape("fig", "polygon", STAR)]
    for name in ("left", "right"):
        (folder / name).mkdir()
        (other / name).mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name / "a.png")
        labelme(other / name, "a.json", square)
    data = read_labelme(other, folder)
    assert [info["id"] for info in data.image_info] == ["left/a.png", "right/a.png"]


def test_files_and_images_of_labelme_that_cannot_be_used_are_listed(folder):
    labelme(folder, "a.json", [shape("fig", "polygon", STAR)])
    labelme(folder, "b.json", [shape("fig", "polygon", STAR)], "b.jpg", (HEIGHT * 2, WIDTH * 2))
    labelme(folder, "c.json", [shape("fig", "polygon", STAR)], "gone.png")
    labelme(folder, "copy_of_a.json", [shape("nut", "polygon", STAR)])
    (folder / "d.json").write_text("[" * 100_000)
    (folder / "e.json").write_text('{"shapes": 3, "imagePath": "a.png"}')
    (folder / "._a.json").write_bytes(b"\0\xff")  # what macOS leaves on other disks
    data = read_labelme(folder)
    assert data.class_names == ["BG", "fig"]
    assert data.summary.remarks == {
        "files dropped, not of labelme": ["d.json", "e.json"],
        f"images dropped, no such file in {folder}": ["gone.png of c.json"],
        "images dropped, of another size when annotated and now": [
            "b.json (180 x 120 and 90 x 60)"
        ],
        "images dropped, others are of the same file": ["copy_of_a.json (a.png)"],
    }


def test_sizes_of_labelme_as_text(folder):
    labelme(folder, "a.json", [shape("fig", "polygon", STAR)], size=(str(HEIGHT), float(WIDTH)))
    assert read_labelme(folder).summary.remarks == {}


def test_rectangles_of_four_corners_and_other_shapes_of_x_anylabeling(folder):
    corners = [[12, 7], [32, 7], [32, 38], [12, 38]]
    kinds = ("rectangle", "rotation", "quadrilateral")
    labelme(folder, "a.json", [shape(kind, kind, corners) for kind in kinds])
    masks, _ = read_labelme(folder).load_mask(0)
    assert masks[7:38, 12:32].all()
    assert masks.sum(axis=(0, 1)).tolist() == [20 * 31] * 3


@pytest.mark.parametrize("label", [None, "", True, [], {}, float("nan")])
def test_a_region_of_labelme_without_a_label_is_listed(folder, label):
    labelme(folder, "a.json", [shape(label, "polygon", STAR), shape(3, "polygon", STAR)])
    data = read_labelme(folder)
    assert data.class_names == ["BG", "3"]
    assert data.summary.remarks == {"regions dropped, no label": ["a.json, region 0"]}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (shape("fig", "polygon", [[1, 2], [3, 4]]), "of fewer than three points"),
        (shape("fig", "polygon", []), "malformed"),
        (shape("fig", "polygon", [1, 2, 3]), "malformed"),
        (shape("fig", "polygon", [[1, 2, 3]] * 3), "malformed"),
        (shape("fig", "polygon", [[1e9, 2], [3, 4], [5, 6]]), "far outside of the image"),
        (shape("fig", "polygon", [[1, 1], [5, 5], [9, 9]]), "without a pixel"),
        (shape("fig", "rectangle", [[1, 2]]), "malformed"),
        (shape("fig", "circle", [[1, 2], [3, 4], [5, 6]]), "malformed"),
        (shape("fig", "polygon", [[1, 2], [3], [5, 6]]), "malformed"),
        (shape("fig", "mask", [[1, 2], [3, 4]], mask="AAAA"), "malformed"),
        (shape("fig", "mask", [[1, 2], [3, 4]], mask=7), "malformed"),
        (shape("fig", "mask", [], mask=png(np.ones((2, 2)))), "malformed"),
        (shape("fig", "mask", [[1, 2]], mask=png(np.zeros((2, 2)))), "without a pixel"),
        (shape("fig", "mask", [[100, 2]], mask=png(np.ones((2, 2)))), "without a pixel"),
        (shape("fig", "mask", [[1, 2]], mask=png(np.ones((500, 500)))), "a mask that is larger"),
        (shape("fig", "sphere", [[1, 2], [3, 4]]), "of an unknown shape, 'sphere'"),
        (shape("fig", [1], STAR), "of an unknown shape, [1]"),
        ({"label": "fig"}, "malformed"),
        ({"points": STAR}, "malformed"),
        (None, "malformed"),
        ([], "malformed"),
    ],
)
def test_a_region_of_labelme_that_cannot_be_used_is_listed(folder, wrong, reason):
    labelme(folder, "a.json", [shape("fig", "polygon", STAR), wrong])
    data = read_labelme(folder)
    assert data.load_mask(0)[0].shape[2] == 1
    ((remark, items),) = data.summary.remarks.items()
    assert remark.startswith(f"regions dropped, {reason}")
    assert [item[:16] for item in items] == ["a.json, region 1"]


def test_lines_of_labelme_are_left_out(folder):
    kinds = {"point": [[1, 1]], "line": [[1, 1], [9, 9]], "linestrip": STAR, "polygon": STAR}
    labelme(folder, "a.json", [shape("fig", kind, points) for kind, points in kinds.items()])
    data = read_labelme(folder)
    assert data.load_mask(0)[0].shape[2] == 1
    (items,) = data.summary.remarks.values()
    assert items == [f"a.json, region {i}" for i in range(3)]


def test_a_folder_without_labelme_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="has no json files of labelme"):
        read_labelme(folder)
    save(folder, {"images": []}, "coco.json")
    with pytest.raises(ValueError, match=r"coco.json is not of labelme; check --format"):
        read_labelme(folder)


# --- Real data -----------------------------------------------------------------------------------


# pycocotools and numpy 2 disagree about __array__.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@needs_shared
@pytest.mark.parametrize("kind", ["via", "labelme"])
def test_polygons_of_photographs_agree_with_pycocotools(tmp_path, kind):
    fruits = SHARED / "data" / "fruits_nuts"
    content = json.loads((fruits / "instances.json").read_text())
    image = content["images"][0]
    found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    outlines = [np.reshape(a["segmentation"][0], (-1, 2)) for a in found]
    assert len(outlines) > 3
    if kind == "via":
        shapes = [
            {"all_points_x": x, "all_points_y": y} for x, y in (o.T.tolist() for o in outlines)
        ]
        regions = [region({"name": "polygon", **s}) for s in shapes]
        data, path = (
            annotations.ViaDataset(),
            save(tmp_path, {"0": via(image["file_name"], regions)}),
        )
    else:
        shapes = [shape("fruit", "polygon", o.tolist()) for o in outlines]
        data, path = (
            annotations.LabelmeDataset(),
            labelme(
                tmp_path, "0.json", shapes, image["file_name"], (image["height"], image["width"])
            ),
        )
    data.load_annotations(fruits / "images", path)
    data.prepare()
    masks, _ = data.load_mask(0)
    size = image["height"], image["width"]
    for i, annotation in enumerate(found):
        expected = coco_mask.decode(coco_mask.frPyObjects(annotation["segmentation"], *size))[
            ..., 0
        ]
        union = (masks[:, :, i] | (expected > 0)).sum()
        assert (masks[:, :, i] & (expected > 0)).sum() > 0.98 * union > 100


# --- Damaged files -------------------------------------------------------------------------------

STRANGE = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    2**70,
    float("nan"),
    "",
    "x",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
)


def mutate(value, rng):
    """A copy of a json value in which something is lost, strange or somewhere else."""
    choice = rng.random()
    if choice < 0.1 or not isinstance(value, dict | list) or not value:
        return STRANGE[rng.integers(len(STRANGE))]
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    key = list(items)[rng.integers(len(items))]
    if choice < 0.2:
        del items[key]
    elif choice < 0.3 and isinstance(value, list):
        items[len(value)] = items[key]
    else:
        items[key] = mutate(items[key], rng)
    return items if isinstance(value, dict) else list(items.values())


def fuzz(folder, rounds, seed):
    """Loads mutated files and draws what was loaded: how many were loaded, not refused in words."""
    rng = np.random.default_rng(seed)
    shapes = [POLYGON, RECT, CIRCLE, ELLIPSE, POINT]
    regions = [region(each, kind="fig") for each in shapes]
    square = [[1.0, 2.0], [30.0, 2.0], [30.0, 40.0]]
    labelme_regions = [
        *(shape("fig", kind, square) for kind in ("polygon", "rotation", "linestrip")),
        *(shape("nut", kind, square[::2], group_id=1) for kind in ("rectangle", "circle")),
        shape("fig", "mask", square[:2], mask=png(np.ones((9, 9)))),
    ]
    contents = {
        annotations.ViaDataset: {"a": via("a.png", regions), "b": via("b.jpg", regions[:2])},
        annotations.LabelmeDataset: {
            **{"shapes": labelme_regions, "imagePath": "a.png", "imageData": None},
            **{"imageHeight": HEIGHT, "imageWidth": WIDTH},
        },
    }
    loaded = 0
    for _ in range(rounds):
        for reader, content in contents.items():
            for _ in range(rng.integers(1, 4)):
                content = mutate(content, rng)
            text = bytearray(json.dumps(content).encode())
            if rng.random() < 0.1:
                text[rng.integers(len(text))] = rng.integers(256)
            path = folder / "a.json"
            path.write_bytes(text)
            data = reader()
            try:
                data.load_annotations(folder, path)
            except (OSError, ValueError):
                continue
            data.prepare()
            for image_id in data.image_ids:
                masks, class_ids = data.load_mask(image_id)
                assert masks.any(axis=(0, 1)).all()
                assert len(class_ids) == masks.shape[2]
            loaded += 1
    return loaded


def test_damaged_files_give_masks_or_an_error(folder):
    assert fuzz(folder, 150, seed=0) > 100


@pytest.mark.slow
def test_thousands_of_damaged_files_give_masks_or_an_error(folder):
    assert fuzz(folder, 4000, seed=1) > 3000


# --- Parts ---------------------------------------------------------------------------------------


def test_a_split_is_the_seed_s(folder):
    regions = [region(RECT, kind="fig"), region(CIRCLE, kind="date")]
    data = read_via(folder, via("a.png", regions))
    data.image_info = [{**data.image_info[0], "id": i} for i in range(12)]
    data.prepare()

    def ids(share, seed=0):
        return [[info["id"] for info in part.image_info] for part in data.split(share, seed)]

    rest, kept = ids(0.2, 3)
    assert (len(rest), len(kept)) == (10, 2)  # of 2.4
    assert sorted(rest + kept) == list(range(12))
    assert [rest, kept] == [sorted(rest), sorted(kept)]
    assert ids(0.2, 3) == [rest, kept]
    assert ids(0.2, 4) != [rest, kept]
    assert ids(0)[1] == []
    for part in data.split(0.2):
        assert part.class_names == data.class_names == ["BG", "date", "fig"]
        assert part.load_mask(0)[1].tolist() == [2, 1]
        assert part.num_images == len(part.image_ids) == len(part.image_info)
    assert data.num_images == 12


def test_the_old_import_still_works():
    from samples.annotations import LabelmeDataset, ViaDataset

    assert (LabelmeDataset, ViaDataset) == (annotations.LabelmeDataset, annotations.ViaDataset)
