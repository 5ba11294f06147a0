"""The colour splash as a person runs it."""

import numpy as np
import pytest
from PIL import Image
from test_video import cut, read, write_clip

import utils
from model import MaskRCNN
from samples import color_splash

MASK = np.zeros((96, 128), bool)
MASK[20:60, 30:90] = True


def colorful(seed=0):
    return (
        np.random.default_rng(seed)
        .integers(0, 256, (12, 16, 3), np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)
    )


@pytest.fixture
def known_detections(monkeypatch):
    """A square, and a circle in all that the square is not."""

    def detect(model, images):
        masks = np.stack([MASK, ~MASK], axis=2)
        return [{"masks": masks, "class_ids": np.array([2, 1], np.int32)} for _ in images]

    monkeypatch.setattr(MaskRCNN, "detect", detect)


def test_colours_are_left_in_the_masks_alone():
    image, masks = colorful(), np.zeros((96, 128, 2), bool)
    masks[:50, :, 0] = masks[:, :20, 1] = True
    splash = color_splash.color_splash(image, masks)
    inside = masks.any(axis=2)
    np.testing.assert_array_equal(splash[inside], image[inside])
    np.testing.assert_array_equal(splash[~inside], splash[~inside][:, :1].repeat(3, axis=1))
    luma = image[~inside] @ (0.299, 0.587, 0.114)  # ITU-R BT.601
    assert np.abs(splash[~inside][:, 0] - luma).max() < 1
    none = color_splash.color_splash(image, masks[:, :, :0])
    assert np.ptp(none, axis=2).max() == 0


def test_without_arguments_the_coffee_is_in_colour(tmp_path, capsys):
    assert color_splash.main(["--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert capsys.readouterr().out == f"{path}\n"
    picture = utils.load_image(path)
    assert picture.shape == (400, 600, 3)
    assert np.ptp(picture[140:160, 260:320].astype(int), axis=2).min() > 60  # the coffee
    assert np.ptp(picture[300:, 500:].astype(int), axis=2).max() == 0  # the table


def test_images_and_videos_by_class(tmp_path, known_detections):
    Image.fromarray(colorful()).save(tmp_path / "a.png")
    write_clip(tmp_path / "b.mp4", [colorful(i) for i in range(4)])
    sources = [str(tmp_path / "a.png"), str(tmp_path / "b.mp4")]
    options = ["--model", "shapes", "--classes", "square", "--output", str(tmp_path / "out")]
    assert color_splash.main([*sources, *options]) == 0
    picture = utils.load_image(tmp_path / "out" / "a_splash.png")
    np.testing.assert_array_equal(picture[MASK], colorful()[MASK])
    assert np.ptp(picture[~MASK], axis=1).max() == 0
    frames, *_ = read(tmp_path / "out" / "b_splash.mp4")
    assert len(frames) == 4
    for frame in frames.astype(int):
        spread = np.ptp(frame, axis=2)
        assert np.median(spread[24:56, 34:86]) > 60
        assert np.median(spread[~MASK]) < 6


def test_what_is_not_read_whole_is_told(tmp_path, known_detections, capsys):
    source = cut(write_clip(tmp_path / "a.mkv", gop=1))
    options = ["--model", "shapes", "--output", str(tmp_path / "out")]
    assert color_splash.main([str(source), *options]) == 1
    assert "a.mkv: it breaks off after 0." in capsys.readouterr().err


def test_a_damaged_image_is_skipped_and_names_do_not_clash(tmp_path, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((64, 80, 3), 90, np.uint8)).save(tmp_path / folder / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    sources = [str(tmp_path / name) for name in ("one/a.png", "broken.png", "two/a.png")]
    out = tmp_path / "out"
    assert color_splash.main([*sources, "--model", "shapes", "--output", str(out)]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["a-2_splash.png", "a_splash.png"]
    assert "skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--classes", "cat"], "must be among circle, square, triangle; got cat"),
        (["nowhere.png"], "nowhere.png"),
        (["nowhere.mp4"], "nowhere.mp4"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, arguments, message):
    options = ["--model", "shapes", "--output", str(tmp_path)]
    assert color_splash.main([*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("color_splash.py: ")
    assert error.count("\n") == 1
