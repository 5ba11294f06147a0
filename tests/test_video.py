"""Videos, compared with what PyAV reads of them, and objects that keep their number."""

import contextlib
import functools
import http.server
import json
import resource
import shutil
import struct
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from test_model import TinyConfig

import demo
import utils
import video
import weights
from model import MaskRCNN
from samples.scenes import scene

av = pytest.importorskip("av", reason="PyAV is not there", exc_type=ImportError)

SIZE = (96, 128)
COUNT = 20


def pictures(count=COUNT, size=SIZE):
    """A grey gradient over which a bright square moves."""
    y, x = np.mgrid[: size[0], : size[1]]
    for i in range(count):
        image = np.stack([y + 20, x // 2 + 40, 120 - x // 2], axis=2).astype(np.uint8)
        image[30:60, 3 * i : 3 * i + 30] = (200, 190, 20)
        yield image


def write_clip(
    path, images=None, rate=25, times=None, codec="libx264", sound=None, pix_fmt="yuv420p", gop=12
):
    """Encodes images, which video.py has no part in; times are milliseconds."""
    images = list(pictures()) if images is None else images
    height, width = images[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = gop  # frames until one that needs no other
        stream.options = {"crf": "10"} if codec == "libx264" else {"b": "4000000"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream(sound, rate=48000, layout="mono") if sound else None
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image)
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
            if track is not None:
                tone = 8000 * np.sin(np.arange(i * 1920, (i + 1) * 1920) / 20)
                sample = av.AudioFrame.from_ndarray(tone.astype(np.int16)[None], "s16", "mono")
                sample.sample_rate, sample.pts = 48000, i * 1920
                container.mux(track.encode(sample))
        container.mux(stream.encode(None))
        if track is not None:
            container.mux(track.encode(None))
    return path


def read(path):
    """Frames [T, H, W, 3] as they are stored, their times in seconds, rate and size by PyAV."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = float(stream.average_rate), (stream.height, stream.width)
        for packet in container.demux(stream):
            with contextlib.suppress(av.InvalidDataError):  # as the last one of a file that is cut
                frames += [
                    (frame.to_ndarray(format="rgb24"), frame.time) for frame in packet.decode()
                ]
    images, times = zip(*frames, strict=True)
    return np.stack(images), np.array(times), *facts


def copy(source, target):
    return video.redraw(source, target, lambda frame: frame.image)


# --- Copies --------------------------------------------------------------------------------------

UNEVEN = np.cumsum([79, *np.random.default_rng(0).integers(20, 90, COUNT - 1)]).tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"rate": 25}),
        ("a.mp4", {"rate": Fraction(30000, 1001), "sound": "aac"}),
        ("a.mp4", {"times": UNEVEN}),
        ("a.mkv", {"times": UNEVEN, "sound": "aac"}),
        ("a.avi", {"codec": "mpeg4", "sound": "pcm_s16le"}),
        ("a.ts", {"sound": "aac"}),
        ("a.webm", {"codec": "libvpx", "rate": 12}),
    ],
    ids=["mp4", "29.97", "uneven mp4", "uneven mkv", "avi", "ts", "webm"],
)
def test_a_copy_has_the_frames_times_and_size_of_the_video(tmp_path, name, options):
    source, target = write_clip(tmp_path / name, **options), tmp_path / "copy.mp4"
    assert copy(source, target) == (COUNT, None)
    images, times, rate, size = read(source)
    copied, copied_times, copied_rate, copied_size = read(target)
    assert copied_size == size == SIZE
    np.testing.assert_allclose(copied_times, times - times[0], atol=1e-6)
    if "times" not in options:
        expected = pytest.approx(float(options.get("rate", 25)), rel=1e-3)
        assert copied_rate == expected
        assert rate == expected
    # Encoded once more.
    assert np.abs(copied.astype(int) - images).mean() < 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_sound_is_copied_and_stays_in_time(tmp_path, suffix):
    def packets(path):
        with av.open(str(path)) as container:
            track = container.streams.audio[0]
            start = next(container.decode(video=0)).time
            container.seek(0)
            found = [p for p in container.demux(track) if p.size]
            return track.codec_context.name, [
                (bytes(p), float(p.pts * p.time_base) - start) for p in found
            ]

    source, target = write_clip(tmp_path / f"a.{suffix}", sound="aac"), tmp_path / "copy.mp4"
    assert copy(source, target) == (COUNT, None)
    (name, original), (copied_name, copied) = packets(source), packets(target)
    assert name == copied_name == "aac"
    assert abs(len(copied) - len(original)) <= 1
    times = np.array([time for _, time in original]), np.array([time for _, time in copied])
    assert np.abs(times[1][-5:] - times[0][-5:]).max() < 0.03
    if suffix != "ts":  # where packets have headers that MP4 does without
        assert {data for data, _ in copied} <= {data for data, _ in original}


def test_sound_that_mp4_cannot_hold_is_left_out(tmp_path):
    source = write_clip(tmp_path / "a.avi", codec="mpeg4", sound="adpcm_ms")
    assert copy(source, tmp_path / "copy.mp4") == (COUNT, None)
    with av.open(str(tmp_path / "copy.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize("size", [(97, 128), (96, 127), (97, 127)])
def test_odd_sizes_stay_as_they_are(tmp_path, size):
    source = write_clip(tmp_path / "odd.mkv", list(pictures(5, size)), pix_fmt="yuv444p")
    copy(source, tmp_path / "copy.mp4")
    images, _, _, copied_size = read(tmp_path / "copy.mp4")
    assert copied_size == size
    assert np.abs(images.astype(int) - read(source)[0]).mean() < 3


ONE = 1 << 16


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, ONE, -ONE, 0), lambda image: np.rot90(image, -1)),
        ((-ONE, 0, 0, -ONE), lambda image: np.rot90(image, 2)),
        ((0, -ONE, ONE, 0), lambda image: np.rot90(image, 1)),
        ((-ONE, 0, 0, ONE), lambda image: image[:, ::-1]),
    ],
    ids=["90", "180", "270", "mirror"],
)
def test_videos_of_phones_are_turned_upright(tmp_path, matrix, turn):
    source = write_clip(tmp_path / "a.mp4", list(pictures(4)))
    data = bytearray(source.read_bytes())
    a, b, c, d = matrix
    place = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    source.write_bytes(data)
    stored, *_ = read(source)
    with video.Video(source) as clip:
        for frame, image in zip(clip, stored, strict=True):
            np.testing.assert_array_equal(frame.image, turn(image))
    copy(source, tmp_path / "copy.mp4")
    copied, *_ = read(tmp_path / "copy.mp4")
    assert np.abs(copied[0].astype(int) - turn(stored[0])).mean() < 3


@pytest.mark.parametrize("matrix", [1, 5, None], ids=["BT.709", "BT.601", "unknown"])
def test_colours_are_those_of_the_video(tmp_path, matrix):
    colors = np.array([[220, 30, 40], [30, 200, 50], [20, 40, 230], [128, 128, 128]], np.uint8)
    image = colors.reshape(2, 2, 3).repeat(48, axis=0).repeat(64, axis=1)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        frame = av.VideoFrame.from_ndarray(image)
        if matrix is not None:
            stream.codec_context.colorspace = matrix
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    with video.Video(tmp_path / "a.mp4") as clip:
        found = next(iter(clip)).image
    for pixels in (found, read(tmp_path / "copy.mp4")[0][0]):
        centers = pixels[24::48, 32::64].reshape(4, 3).astype(int)
        assert np.abs(centers - colors).max() <= 4


def test_pixels_that_are_not_square_stay_so(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for image in pictures(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    copy(tmp_path / "a.mkv", tmp_path / "copy.mp4")
    with av.open(str(tmp_path / "copy.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


def test_times_that_jump_back_go_on(tmp_path):
    source = write_clip(tmp_path / "a.ts")
    source.write_bytes(2 * source.read_bytes())  # as recordings are joined
    count, _ = copy(source, tmp_path / "copy.mp4")
    times = read(tmp_path / "copy.mp4")[1]
    assert count == len(times) == 2 * COUNT
    np.testing.assert_allclose(np.diff(times), 1 / 25, atol=1e-4)


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not there")
def test_ffprobe_finds_nothing_wrong(tmp_path):
    copy(write_clip(tmp_path / "a.mp4", sound="aac"), tmp_path / "copy.mp4")
    entries = "stream=width,height,avg_frame_rate,nb_read_frames"
    options = ["-count_frames", "-select_streams", "v", "-show_entries", entries, "-of", "json"]
    run = subprocess.run(
        ["ffprobe", "-v", "error", *options, str(tmp_path / "copy.mp4")],
        capture_output=True,
        text=True,
        check=True,
    )
    (facts,) = json.loads(run.stdout)["streams"]
    assert (facts["height"], facts["width"]) == SIZE
    assert (facts["avg_frame_rate"], facts["nb_read_frames"]) == ("25/1", str(COUNT))
    assert run.stderr == ""


# --- Broken videos -------------------------------------------------------------------------------


def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def indexed_first(path):
    """Moves the index of an MP4 in front of the pictures, so that its beginning can be read."""
    target = path.with_name("indexed.mp4")
    with (
        av.open(str(path)) as source,
        av.open(str(target), "w", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return target


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "webm"])
def test_of_a_truncated_file_the_frames_that_could_be_read(tmp_path, kind):
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(kind, "libx264")
    source = write_clip(tmp_path / f"a.{kind}", codec=codec, gop=1)
    source = cut(indexed_first(source) if kind == "mp4" else source)
    images, *_ = read(source)
    assert 2 < len(images) < COUNT
    count, problem = copy(source, tmp_path / "copy.mp4")
    assert count == len(images) == len(read(tmp_path / "copy.mp4")[0])
    assert problem.startswith("it breaks off after 0.")
    assert problem.endswith(" of 0.8 s")


def test_damage_in_the_middle_costs_what_is_damaged(tmp_path):
    source = write_clip(tmp_path / "a.mkv", codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(source)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = source.read_bytes()
    source.write_bytes(data.replace(packets[7], bytes(len(packets[7]))))
    count, problem = copy(source, tmp_path / "copy.mp4")
    assert problem == "packets are damaged: 1"
    assert count == COUNT - 1 == len(read(tmp_path / "copy.mp4")[0])


def headless(tmp_path):
    return cut(write_clip(tmp_path / "headless.mp4"))


def garbage(tmp_path):
    path = tmp_path / "garbage.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


def empty(tmp_path):
    (tmp_path / "empty.mp4").touch()
    return tmp_path / "empty.mp4"


def frameless(tmp_path):
    path = tmp_path / "frameless.y4m"
    path.write_text("YUV4MPEG2 W128 H96 F25:1 C420jpeg\n")
    return path


def soundtrack(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=48000, layout="mono")
        sample = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), "s16", "mono")
        sample.sample_rate = 48000
        container.mux(track.encode(sample))
        container.mux(track.encode(None))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (headless, "cannot be read as a video: Invalid data"),
        (garbage, "cannot be read as a video: Invalid data"),
        (empty, "cannot be read as a video: "),
        (frameless, "has no frame that can be read"),
        (soundtrack, "holds no pictures"),
    ],
    ids=["without index", "garbage", "empty", "no frames", "sound alone"],
)
def test_what_holds_no_frames_is_an_error_of_one_line(tmp_path, make, message):
    source = make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        copy(source, tmp_path / "copy.mp4")
    assert source.name in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_ctrl_c_leaves_what_was_done(tmp_path):
    def draw(frame):
        if frame.index == 7:
            raise KeyboardInterrupt
        return 255 - frame.image

    source, target = write_clip(tmp_path / "a.mp4", sound="aac"), tmp_path / "copy.mp4"
    with pytest.raises(KeyboardInterrupt, match=r"copy.mp4 holds the first 7 frames"):
        video.redraw(source, target, draw)
    images, times, *_ = read(target)
    np.testing.assert_allclose(times, np.arange(7) / 25, atol=1e-6)
    assert np.abs(images.astype(int) - (255 - read(source)[0][:7].astype(int))).mean() < 3


@pytest.mark.parametrize("index", [0, 5])
def test_an_error_leaves_nothing(tmp_path, index):
    def draw(frame):
        if frame.index == index:
            raise OSError("disk full")
        return frame.image

    source = write_clip(tmp_path / "a.mp4")
    with pytest.raises(OSError, match="disk full"):
        video.redraw(source, tmp_path / "copy.mp4", draw)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_what_cannot_be_encoded_is_an_error_of_one_line(tmp_path):
    source = write_clip(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="the copy cannot be written: ") as error:
        video.redraw(source, tmp_path / "copy.mp4", lambda frame: np.zeros((1, 40000, 3), np.uint8))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk_is_an_error_of_one_line(tmp_path):
    source = write_clip(tmp_path / "a.mp4")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises((OSError, ValueError)) as error:
            copy(source, tmp_path / "copy.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


# --- Names and streams ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected", "name"),
    [
        ("clips/a.MP4", True, "a"),
        ("b.jpg", False, "b"),
        ("folder", False, "folder"),
        ("rtsp://user:word@camera:554/live/main", True, "main"),
        ("http://camera", True, "camera"),
        ("http://camera/a.mjpg?x=/y", True, "a"),
        ("/dev/null", True, "null"),  # a device of the kind that cameras are
    ],
)
def test_what_is_a_video(source, expected, name):
    assert video.is_video(source) == expected
    assert video.output_name(source) == name


def test_a_stream_is_read_from_its_url(tmp_path):
    write_clip(tmp_path / "a.ts")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert copy(f"{url}/a.ts", tmp_path / "copy.mp4") == (COUNT, None)
            with pytest.raises(ValueError, match="b.ts cannot be read as a video: .*404"):
                copy(f"{url}/b.ts", None)
        finally:
            server.shutdown()
    np.testing.assert_allclose(read(tmp_path / "copy.mp4")[1], np.arange(COUNT) / 25, atol=1e-4)


def test_a_stream_that_falls_silent_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "TIMEOUT", 1.0)
    data = write_clip(tmp_path / "a.ts", gop=1).read_bytes()
    enough = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data[: len(data) * 3 // 4])
            enough.wait(20)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.ts"
        try:
            count, problem = copy(url, tmp_path / "copy.mp4")
        finally:
            enough.set()
            server.shutdown()
    assert 10 <= count == len(read(tmp_path / "copy.mp4")[0]) < COUNT
    assert problem == f"it breaks off after {count / 25:.1f} s: nothing came for 1 s"


def test_without_pyav_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    assert demo.main([str(tmp_path / "a.mp4")]) == 2
    error = capsys.readouterr().err
    assert (
        error == 'demo.py: this needs the package av; install it with pip install -e ".[video]"\n'
    )


# --- Objects over time ---------------------------------------------------------------------------


def disc(y, x, radius=10, size=(100, 200)):
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.hypot(rows - y, columns - x) < radius


def frame_of(*objects):
    """A result of detect() with these (class id, mask [H, W])."""
    boxes = [utils.extract_bboxes(mask[:, :, None])[0] for _, mask in objects]
    return {
        "class_ids": np.array([class_id for class_id, _ in objects], np.int32),
        "rois": np.array(boxes, np.int32).reshape(-1, 4),
        "scores": np.full(len(objects), 0.9, np.float32),
        "masks": [utils.rle_encode(mask) for _, mask in objects],
    }


def test_objects_keep_their_numbers_whatever_their_order():
    tracker, rng = video.Tracker(), np.random.default_rng(0)
    first = None
    for t in range(20):
        # Two pass each other closely, one comes from the other side, one stands still.
        masks = [disc(30, 20 + 4 * t), disc(48, 100 - 3 * t), disc(75, 180 - 5 * t), disc(15, 150)]
        order = rng.permutation(4)
        numbers = tracker.update(frame_of(*((1, masks[i]) for i in order)))
        by_object = dict(zip(order.tolist(), numbers, strict=True))
        first = first or by_object
        assert by_object == first
    assert tracker.count == 4
    assert sorted(first.values()) == [1, 2, 3, 4]


def test_the_one_behind_keeps_its_number():
    tracker = video.Tracker()
    for t in range(30):
        front, behind = disc(50, 40 + 4 * t, 14), disc(56, 160 - 4 * t, 14)
        assert tracker.update(frame_of((1, front), (1, behind & ~front))) == [1, 2]


def test_classes_must_agree():
    tracker = video.Tracker()
    assert tracker.update(frame_of((1, disc(50, 50)))) == [1]
    assert tracker.update(frame_of((2, disc(50, 50)))) == [2]
    assert tracker.update(frame_of((2, disc(50, 50)), (1, disc(50, 50)))) == [2, 1]


def test_an_object_may_be_missed_some_times_while_it_moves():
    for missed in (1, 2, 3, 4):
        tracker = video.Tracker(patience=3)
        for t in range(5):
            assert tracker.update(frame_of((1, disc(50, 30 + 8 * t)))) == [1]
        for _ in range(missed):
            assert tracker.update(frame_of()) == []
        mask = disc(50, 30 + 8 * (5 + missed - 0))
        assert tracker.update(frame_of((1, mask))) == ([1] if missed <= 3 else [2])


def test_pairs_are_those_of_the_largest_sum():
    # The middle one overlaps the left one of before most, which the left one needs.
    tracker = video.Tracker(least_iou=0.1)
    tracker.update(frame_of((1, disc(50, 50)), (1, disc(50, 66))))
    moved = frame_of((1, disc(50, 56)), (1, disc(50, 43)))
    assert tracker.update(moved) == [2, 1]


def test_mask_iou_is_that_of_arrays():
    rng = np.random.default_rng(0)
    for _ in range(50):
        masks = [disc(*rng.integers(10, 60, 2), rng.integers(5, 25)) for _ in range(2)]
        expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        parts = [utils.rle_decode_part(utils.rle_encode(mask)) for mask in masks]
        (box1, part1), (box2, part2) = ((np.array(box), part) for box, part in parts)
        assert video._mask_iou(box1, part1, box2, part2) == pytest.approx(expected)


# --- demo.py -------------------------------------------------------------------------------------


# The grey of each object in the frames below, and where its centre is, by frame.
GREYS = (90, 140, 190)
PLACES = [
    lambda t: (60, 40 + 8 * t),
    lambda t: (84, 210 - 8 * t),
    lambda t: (150, 40 + 4 * t),
]
RADIUS = 22
ROOM = (192, 256)


def moving_discs(count=COUNT):
    """Discs of three greys, of which the first two cross; those of later numbers are in front."""
    for t in range(count):
        image = np.full((*ROOM, 3), 30, np.uint8)
        for grey, place in zip(GREYS, PLACES, strict=True):
            image[disc(*place(t), RADIUS, ROOM)] = grey
        yield image


@pytest.fixture
def known_detections(monkeypatch):
    """Lets detect() find what is visible of the discs, in changing order, and miss one at times."""
    calls = []

    def detect(model, images, verbose=0, *, masks):
        assert masks == "rle"
        t = len(calls)
        calls.append(images[0])
        found, front = [], np.zeros(ROOM, dtype=bool)
        for place in reversed(PLACES):
            mask = disc(*place(t), RADIUS, ROOM)
            found.append((1, mask & ~front))
            front |= mask
        if t % 6 == 4:
            found.pop(t % 3)
        return [frame_of(*(found[(i + t) % len(found)] for i in range(len(found))))]

    monkeypatch.setattr(MaskRCNN, "detect", detect)
    return calls


def run(model_path, tmp_path, *arguments):
    common = ("--model", str(model_path), "--output", str(tmp_path / "out"))
    return demo.main([*map(str, arguments), *common])


def test_colours_stay_with_objects_that_move_and_cross(
    model_path, tmp_path, capsys, known_detections
):
    source = write_clip(tmp_path / "discs.mp4", list(moving_discs()))
    assert run(model_path, tmp_path, source) == 0
    assert "discs.mp4: 20 frames, 3 objects, " in capsys.readouterr().out
    images, _, rate, size = read(tmp_path / "out" / "discs_detections.mp4")
    assert (len(images), rate, size) == (COUNT, 25, ROOM)
    colors = [[], [], []]
    for t, image in enumerate(images):
        for i, (grey, place) in enumerate(zip(GREYS, PLACES, strict=True)):
            visible = disc(*place(t), RADIUS - 3, ROOM)
            for front in PLACES[i + 1 :]:
                y, x = front(t)
                visible &= ~disc(y, x, RADIUS + 3, ROOM)
                visible[y - RADIUS - 20 : y - RADIUS] = False  # its label
            if visible.sum() > 300:
                colors[i].append(2 * np.median(image[visible], axis=0) - grey)
    for seen in colors:
        # Where it was missed, the disc is grey: no colour was blended in.
        missed = np.ptp(seen, axis=1) < 60
        assert missed.sum() <= 3
        kept = np.array(seen)[~missed]
        assert len(kept) >= 10
        assert np.abs(kept - kept.mean(axis=0)).max() < 40
    means = [np.mean(seen, axis=0) for seen in colors]
    assert min(np.abs(a - b).max() for a, b in zip(means, means[1:] + means[:1], strict=True)) > 80


def test_every_nth_frame_is_looked_at_and_shown_in_between(model_path, tmp_path, known_detections):
    still = [next(moving_discs(1))] * 10
    source = write_clip(tmp_path / "still.mp4", still)
    assert run(model_path, tmp_path, source, "--every", "4", "--json") == 0
    assert len(known_detections) == 3
    lines = (tmp_path / "out" / "still.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in lines] == [0, 4, 8]
    assert [json.loads(line)["time"] for line in lines] == pytest.approx([0, 0.16, 0.32])
    images, *_ = read(tmp_path / "out" / "still_detections.mp4")
    assert len(images) == 10
    y, x = PLACES[0](0)
    colors = images[:, y, x].astype(int)
    assert (np.ptp(colors, axis=1) > 60).all()  # all are coloured, though 3 were looked at
    assert np.ptp(colors, axis=0).max() < 15


@pytest.mark.parametrize("options", [[], ["--polygons"]], ids=["run lengths", "polygons"])
def test_results_are_a_line_for_each_frame(model_path, tmp_path, known_detections, options):
    source = write_clip(tmp_path / "discs.mkv", list(moving_discs(6)))
    assert run(model_path, tmp_path, source, "--json", "--no-pictures", *options) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["discs.jsonl"]
    lines = [json.loads(t) for t in (tmp_path / "out" / "discs.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(6))
    numbers = {}
    for t, line in enumerate(lines):
        assert len(line["detections"]) == (2 if t == 4 else 3)
        for found in line["detections"]:
            assert found["image_id"] == t
            assert found["category_id"] == 1
            x, y, width, height = found["bbox"]
            center = y + height / 2, x + width / 2
            nearest = min(range(3), key=lambda i: np.hypot(*np.subtract(PLACES[i](t), center)))
            assert np.hypot(*np.subtract(PLACES[nearest](t), center)) < 3
            assert numbers.setdefault(nearest, found["track_id"]) == found["track_id"]
            if options:
                assert isinstance(found["segmentation"], list)
            else:
                mask = utils.rle_decode(found["segmentation"])
                expected = disc(*PLACES[nearest](t), RADIUS, ROOM)
                assert (mask & expected).sum() > 0.9 * (mask | expected).sum()
    assert sorted(numbers.values()) == [1, 2, 3]


def test_what_cannot_be_read_is_named_and_the_rest_is_done(
    model_path, tmp_path, capsys, known_detections
):
    Image.fromarray(next(moving_discs(1))).save(tmp_path / "discs.png")
    whole = write_clip(tmp_path / "discs.mp4", list(moving_discs(5)))
    short = cut(write_clip(tmp_path / "short.mkv"))
    broken = garbage(tmp_path)
    assert run(model_path, tmp_path, broken, short, whole, tmp_path / "discs.png") == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("demo.py: ")]
    count = len(read(short)[0])
    assert "skipped" in lines[0]
    assert "garbage.mp4 cannot be read as a video" in lines[0]
    assert f"short.mkv: it breaks off after 0.{count * 4:02}"[:-1] in lines[1]
    assert lines[1].endswith(f"; {count} frames could be read")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"discs_detections.png", "discs-2_detections.mp4", "short_detections.mp4"}
    assert "discs.mp4: 5 frames, 3 objects" in captured.out


def test_models_that_see_grey(tmp_path, known_detections):
    path = tmp_path / "grey.pth"
    weights.save_weights(MaskRCNN(TinyConfig(IMAGE_CHANNEL_COUNT=1, MEAN_PIXEL=(100.0,))), path)
    source = write_clip(tmp_path / "discs.mp4", list(moving_discs(2)))
    assert run(path, tmp_path, source) == 0
    assert {image.shape for image in known_detections} == {(*ROOM, 1)}
    assert read(tmp_path / "out" / "discs_detections.mp4")[3] == ROOM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.mp4"], "no video nowhere.mp4"),
        (["a.mp4", "--coco", "found.json"], "--show are not for videos"),
        (["a.mp4", "--stages"], "--show are not for videos"),
        (["a.png", "--every", "2"], "--every is for videos"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(tmp_path, capsys, arguments, message):
    assert run("shapes", tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_network_that_ships_follows_shapes(tmp_path, capsys):
    """Through a window that moves over a scene, in which the objects move the other way."""
    image, masks, class_ids = scene(1)
    frames = [np.ascontiguousarray(image[:, 6 * t : 6 * t + 160]) for t in range(5)]
    source = write_clip(tmp_path / "pan.mp4", frames)
    assert run("shapes", tmp_path, source, "--json") == 0
    lines = (tmp_path / "out" / "pan.jsonl").read_text().splitlines()
    owners = {}
    followed = 0
    for t, line in enumerate(lines):
        for found in json.loads(line)["detections"]:
            mask = utils.rle_decode(found["segmentation"])[:, :, None]
            window = masks[:, 6 * t : 6 * t + 160]
            overlap = (mask & window).sum(axis=(0, 1)) / (mask | window).sum(axis=(0, 1))
            if overlap.max() > 0.6 and class_ids[overlap.argmax()] == found["category_id"]:
                followed += 1
                owner = int(overlap.argmax())
                assert owners.setdefault(found["track_id"], owner) == owner
    assert followed > 5 * 5
    # An object has one number, but where the network lost it.
    assert len(owners) <= 1.2 * len(set(owners.values()))
