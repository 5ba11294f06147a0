"""image_files against arrays that were written to files, with pillow, tifffile or byte by byte, and
against damaged files."""

import functools
import io
import logging
import os
import resource
import struct
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, PngImagePlugin

import image_files

RGB = np.random.default_rng(5).integers(0, 256, (12, 17, 3)).astype(np.uint8)
GRAY = np.arange(12 * 17, dtype=np.uint8).reshape(12, 17)
ORIENTATION = 0x0112
Image.init()
HAS_AVIF = "AVIF" in Image.SAVE  # pillow from 11.3 on
# What an upright picture becomes when the camera's pixels are read with each orientation.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: lambda x: np.rot90(x),
}


def encode(pixels, kind, **options):
    """The bytes of a file that holds pixels."""
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, kind, **options)
    return file.getvalue()


def encode_tiff(pixels, orientation=1, **options):
    file = io.BytesIO()
    tags = [(ORIENTATION, 3, 1, orientation, True)]
    tifffile.imwrite(file, pixels, extratags=tags, metadata=None, **options)
    return file.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_chunk(name, data):
    return struct.pack(">I4s", len(data), name) + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png, chunk, before=b"IDAT"):
    start = png.index(before) - 4
    return png[:start] + chunk + png[start:]


def png_of_16_bits(pixels):
    """A file of [H, W, 3 or 4] uint16, which pillow does not write; rows have filters in turn."""
    height, width, channels = pixels.shape
    rows = np.frombuffer(pixels.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    left = np.hstack([np.zeros((height, 2 * channels), np.uint8), rows[:, : -2 * channels]])
    filtered = [rows, rows - left, rows - above]
    lines = b"".join(bytes([y % 3]) + filtered[y % 3][y].tobytes() for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def scaled(pixels, bits=16):
    return np.rint(pixels.astype(np.float64) * 255 / (2**bits - 1)).astype(np.uint8)


def read(tmp_path, content, name="image.x", **options):
    """What load_image gives for a file, of which read_size says the same."""
    path = tmp_path / name
    path.write_bytes(content)
    image = image_files.load_image(path, **options)
    assert image_files.read_size(path) == image.shape[:2]
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    return image


# --- Files and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", True),
        ("A.JPG", True),
        ("a.jfif", True),
        ("a.avif", True),
        ("a.tif", True),
        ("folder/a.png", True),
        ("._a.jpg", False),
        (".png", False),
        ("a.txt", False),
        ("jpg", False),
    ],
)
def test_names_of_images(name, expected):
    assert image_files.is_image_file(name) is expected


def test_list_images_leaves_out_what_is_none(tmp_path):
    for name in ("b.jpg", "._b.jpg", "a.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.tif").symlink_to(tmp_path / "nowhere")
    Image.fromarray(RGB).save(tmp_path / "z.png")
    Image.fromarray(RGB).save(tmp_path / "b_detections.png", pnginfo=image_files.output_mark())
    other = PngImagePlugin.PngInfo()
    other.add_text("Software", "another program")
    Image.fromarray(RGB).save(tmp_path / "a_detections.png", pnginfo=other)
    found = [path.name for path in image_files.list_images(tmp_path)]
    assert found == ["a_detections.png", "b.jpg", "gone.tif", "z.png"]
    np.testing.assert_array_equal(image_files.load_image(tmp_path / "b_detections.png"), RGB)


# --- What cannot be read -------------------------------------------------------------------------


def in_time(function, *arguments):
    """What a function returns or raises, or a failure where it never does."""
    outcome = []

    def run():
        try:
            outcome.append(function(*arguments))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome, "it waits for ever"
    return outcome[0]


@pytest.mark.parametrize("function", [image_files.load_image, image_files.read_size])
def test_only_regular_files_are_opened(tmp_path, function):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png does not exist; check the path"):
        function(tmp_path / "nothing.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"a\.png does not exist"):
        function(tmp_path / "file" / "a.png")
    with pytest.raises(ValueError, match="must be a regular file, but is a folder"):
        function(tmp_path)
    with pytest.raises(ValueError, match="cannot be used"):
        function("a\0b.png")
    os.mkfifo(tmp_path / "pipe.png")
    error = in_time(function, tmp_path / "pipe.png")
    assert isinstance(error, ValueError)
    assert "pipe.png must be a regular file, but is a pipe or device" in str(error)


@pytest.mark.parametrize("function", [image_files.load_image, image_files.read_size])
def test_no_image_is_named(tmp_path, function):
    for content in (b"", b"no image", b"II*\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"):
        (tmp_path / "text.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"text\.jpg cannot be used: \w") as raised:
            function(tmp_path / "text.jpg")
        assert "\n" not in str(raised.value)


def deep(pixels=RGB):
    return pixels.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "content",
    [
        encode(RGB, "PNG"),
        encode(RGB, "JPEG"),
        encode(RGB, "BMP"),
        encode(RGB, "GIF"),
        encode(RGB, "WEBP"),
        encode(RGB, "PPM"),
        encode(RGB, "TIFF"),
        encode(RGB, "TIFF", compression="tiff_lzw"),
        encode_tiff(deep(), photometric="rgb"),
        encode_tiff(deep().transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        encode_tiff(
            deep().transpose(2, 0, 1),
            photometric="rgb",
            planarconfig="separate",
            compression="deflate",
        ),
        png_of_16_bits(deep()),
    ],
    ids=lambda content: content[:4].hex(),
)
def test_a_cut_file_is_refused(tmp_path, content):
    read(tmp_path, content)
    # tifffile writes tags first, pillow last.
    path = tmp_path / "cut.x"
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ValueError, match=r"cut\.x cannot be used: \w"):
        image_files.load_image(path)


def tag_set_to(tiff, number, value):
    """Changes a number in the first directory of a little-endian TIFF."""
    (start,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", tiff, entry) == (number,):
            return tiff[: entry + 2] + struct.pack("<HII", 4, 1, value) + tiff[entry + 12 :]
    raise AssertionError(f"no tag {number}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode_tiff(RGB, photometric="rgb"), "its header says 510 pixels, there are 204"),
        (
            encode_tiff(deep().transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
            "it must have 9 strips or tiles, got 3",
        ),
    ],
)
def test_a_tiff_must_hold_all_its_rows(tmp_path, content, message):
    (tmp_path / "a.tif").write_bytes(tag_set_to(content, 257, 30))
    with pytest.raises(ValueError, match=message):
        image_files.load_image(tmp_path / "a.tif")


def test_pixels_must_be_as_many_as_the_header_says(tmp_path, monkeypatch):
    def grow(file):  # as pillow's decoders of icons do
        file._size, file.im = (20, 30), Image.new("RGB", (20, 30)).im

    (tmp_path / "a.bmp").write_bytes(encode(RGB, "BMP"))
    monkeypatch.setattr("PIL.BmpImagePlugin.BmpImageFile.load_end", grow)
    with pytest.raises(ValueError, match="header says 17 x 12 pixels, there are 20 x 30"):
        image_files.load_image(tmp_path / "a.bmp")


@pytest.mark.parametrize(
    "content",
    [
        encode(RGB, "PNG"),
        encode(RGB, "WEBP"),
        encode_tiff(deep().transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        encode_tiff(RGB / np.float32(255), photometric="rgb"),
    ],
)
def test_pixels_are_bounded(tmp_path, monkeypatch, content):
    path = tmp_path / "large.x"
    path.write_bytes(content)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 202)
    for function in (image_files.load_image, image_files.read_size):
        message = (
            r"large\.x cannot be used: it claims more than 202 pixels; .*image_files.MAX_PIXELS"
        )
        with pytest.raises(ValueError, match=message):
            function(path)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 204)
    assert image_files.load_image(path).shape == (12, 17, 3)


def test_pillows_own_limit_is_no_wall(tmp_path, monkeypatch):
    for limit in (3, 150):  # where pillow raises, and where it warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        np.testing.assert_array_equal(read(tmp_path, encode(RGB, "PNG")), RGB)
        assert limit == Image.MAX_IMAGE_PIXELS
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(ValueError, match="cannot be used"):
            image_files.load_image(tmp_path / "text.png")
        assert limit == Image.MAX_IMAGE_PIXELS


def test_large_images_are_copied_row_by_row(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 4)).astype(np.uint8)
    content = encode(pixels, "PNG")
    monkeypatch.setattr(image_files, "_LARGE", 1)
    monkeypatch.setattr(image_files, "_ROWS", 70 * 3)
    np.testing.assert_array_equal(read(tmp_path, content), pixels[:, :, :3])


@pytest.mark.slow
def test_half_a_gigapixel(tmp_path):
    stripe = np.random.default_rng(0).integers(0, 256, 25_000).astype(np.uint8)
    Image.fromarray(np.tile(stripe, (20_000, 1))).save(tmp_path / "large.png", compress_level=1)
    image = image_files.load_image(tmp_path / "large.png", 1)
    assert image.shape == (20_000, 25_000, 1)
    np.testing.assert_array_equal(image[[0, 12_345, -1], :, 0], np.tile(stripe, (3, 1)))


def test_threads_leave_pillows_settings_alone(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path / "a.png").write_bytes(encode(RGB, "PNG"))
    threads = [
        threading.Thread(target=lambda: [image_files.read_size(tmp_path / "a.png")] * 200)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_reads_can_read(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(RGB, "PNG"))
    inside, done = threading.Event(), threading.Event()

    def hold():
        with image_files._pillow_settings():
            inside.set()
            done.wait(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    pid = os.fork()  # waits for the other thread to let go
    if pid == 0:
        os._exit(0 if in_time(image_files.read_size, tmp_path / "a.png") == (12, 17) else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# --- Orientation and other metadata --------------------------------------------------------------


def trailing_exif(orientation):
    png = with_chunk(encode(RGB, "PNG"), png_chunk(b"pHYs", bytes(9)), b"IEND")
    return with_chunk(png, png_chunk(b"eXIf", exif_of(orientation).tobytes()[6:]), b"IEND")


@functools.cache
def oriented(kind, orientation):
    exif = {"exif": exif_of(orientation)}
    planes = deep().transpose(2, 0, 1)
    if kind == "AVIF" and not HAS_AVIF:
        pytest.skip("this pillow has no AVIF")
    return {
        "PNG": lambda: encode(RGB, "PNG", **exif),
        "PNG, EXIF last": lambda: trailing_exif(orientation),
        "WebP": lambda: encode(RGB, "WEBP", lossless=True, **exif),
        "AVIF": lambda: encode(RGB // 64 * 64, "AVIF", quality=100, subsampling="4:4:4", **exif),
        "TIFF": lambda: encode(RGB, "TIFF", **exif),
        "LZW": lambda: encode(RGB, "TIFF", compression="tiff_lzw", tiffinfo={274: orientation}),
        "16 bits": lambda: encode_tiff(deep(), orientation, photometric="rgb"),
        "deflate": lambda: encode_tiff(
            deep(), orientation, photometric="rgb", compression="deflate"
        ),
        "planes": lambda: encode_tiff(
            planes, orientation, photometric="rgb", planarconfig="separate"
        ),
    }[kind]()


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    "kind",
    ["PNG", "PNG, EXIF last", "WebP", "AVIF", "TIFF", "LZW", "16 bits", "deflate", "planes"],
)
def test_images_are_turned_upright(tmp_path, kind, orientation):
    image = read(tmp_path, oriented(kind, orientation))
    expected = UPRIGHT[orientation](RGB)
    if kind == "AVIF":
        assert image.shape == expected.shape
        assert abs(image.astype(int) - expected // 64 * 64).mean() < 20
    else:
        np.testing.assert_array_equal(image, expected)


def test_a_jpeg_is_turned_upright(tmp_path):
    smooth = np.mgrid[0:96, 0:120].transpose(1, 2, 0)[:, :, [0, 1, 1]].astype(np.uint8)
    for orientation, turn in UPRIGHT.items():
        content = encode(smooth, "JPEG", quality=95, exif=exif_of(orientation))
        image = read(tmp_path, content)
        assert image.shape == turn(smooth).shape
        assert abs(image.astype(int) - turn(smooth)).max() < 8


def exif_bytes(kind, value):
    """EXIF with an orientation of any kind of value."""
    entry = struct.pack("<HHI", ORIENTATION, kind, len(value) if kind == 2 else 1)
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + value.ljust(4, b"\0") + b"\0\0\0\0"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("exif", "message"),
    [
        (b"Exif\0\0\0\x08\0\x02\0\x03", "its EXIF cannot be read"),
        (exif_bytes(2, b"6\0"), "must be 1 to 8, got '6'"),
        (exif_bytes(3, b"\x09\0"), "must be 1 to 8, got 9"),
        (exif_bytes(3, b"\0\0"), None),
    ],
)
def test_broken_exif_is_upright(tmp_path, caplog, kind, exif, message):
    content = encode(RGB, kind, exif=exif)
    for _ in range(3):
        assert read(tmp_path, content).shape == RGB.shape
    messages = [record.getMessage() for record in caplog.records]
    if message is None:
        assert messages == []
    else:
        (text,) = messages  # once for a file
        assert "image.x: taken as upright: " in text
        assert message in text


def test_broken_exif_of_a_tiff_is_upright(tmp_path):
    content = encode(RGB, "TIFF", tiffinfo={274: 9})
    np.testing.assert_array_equal(read(tmp_path, content), RGB)
    # EXIF's own directory, somewhere else.
    exif = PngImagePlugin.Image.Exif()
    content = encode(RGB, "TIFF", tiffinfo={34665: {36867: "2020:01:01 00:00:00"}}, exif=exif)
    content = tag_set_to(content, 34665, 10)
    np.testing.assert_array_equal(read(tmp_path, content), RGB)


LARGE = zlib.compress(bytes(2**21), 9)  # more than pillow accepts


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"iCCP", b"profile\0\0" + LARGE),
        png_chunk(b"zTXt", b"text\0\0" + LARGE),
        png_chunk(b"iTXt", b"text\0\x01\0\0\0" + LARGE),
        png_chunk(b"tIME", b"2020")[:-1] + b"?",
        png_chunk(b"pHYs", b"1"),
    ],
)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_metadata_of_a_png_never_blocks_its_pixels(tmp_path, caplog, chunk, before):
    content = with_chunk(encode(RGB, "PNG", exif=exif_of(6)), chunk, before)
    for _ in range(2):
        np.testing.assert_array_equal(read(tmp_path, content), UPRIGHT[6](RGB))
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records)
    # What belongs to the pixels is kept.
    palette = encode(picture_of("P"), "PNG", transparency=bytes([0, 128]))
    expected = read(tmp_path, palette, channel_count=4)
    assert expected[:, :, 3].min() == 0 < expected[:, :, 3].max()
    image = read(tmp_path, with_chunk(palette, chunk, before), channel_count=4)
    np.testing.assert_array_equal(image, expected)


def test_metadata_that_is_left_out_is_told(tmp_path, caplog):
    read(tmp_path, with_chunk(encode(RGB, "PNG"), png_chunk(b"iCCP", b"p\0\0" + LARGE)))
    (record,) = caplog.records
    assert "image.x: its metadata is left out, which cannot be read: " in record.getMessage()


def test_damaged_pixels_are_not_blamed_on_metadata(tmp_path, caplog):
    whole = encode(RGB, "PNG")
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.png cannot be used: .*truncated"):
        image_files.load_image(tmp_path / "half.png")
    assert caplog.records == []


def metadata_of(content):
    """(start, stop) of each piece of metadata in a JPEG, PNG or WebP file."""
    if content.startswith(b"\xff\xd8"):
        position = 2
        while content[position + 1] != 0xDA:
            (length,) = struct.unpack_from(">H", content, position + 2)
            if content[position + 1] in (0xE1, 0xE2, 0xED, 0xFE):
                yield position + 4, position + 2 + length
            position += 2 + length
    elif content.startswith(b"RIFF"):
        position = 12
        while position < len(content):
            name, length = struct.unpack_from("<4sI", content, position)
            if name in (b"EXIF", b"ICCP", b"XMP "):
                yield position + 8, position + 8 + length
            position += 8 + length + length % 2
    else:
        position = 8
        while position < len(content):
            length, name = struct.unpack_from(">I4s", content, position)
            if name[0] & 32:
                yield position + 8, position + 8 + length
            position += 12 + length


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_any_metadata_leaves_the_pixels_as_they_are(tmp_path, kind):
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    text.add_text("zipped", "b" * 300, zip=True)
    options = {"pnginfo": text} if kind == "PNG" else {}
    exif = exif_of(1)
    exif[0x010F] = "a camera"
    content = encode(RGB, kind, exif=exif, icc_profile=b"p" * 300, **options)
    plain = read(tmp_path, content)
    views = [turn(plain) for turn in UPRIGHT.values()]
    places = list(metadata_of(content))
    for seed in range(150):
        rng = np.random.default_rng(seed)
        changed = bytearray(content)
        start, stop = places[rng.integers(len(places))]
        for position in rng.integers(start, stop, 4):
            changed[position] = rng.integers(256)
        if kind == "PNG" and seed % 2:
            changed[stop : stop + 4] = zlib.crc32(changed[start - 4 : stop]).to_bytes(4, "big")
        image = read(tmp_path, bytes(changed))
        assert any(np.array_equal(image, view) for view in views), seed


def test_sizes_are_read_without_decoding(tmp_path, monkeypatch):
    def fail(file):
        raise AssertionError("decoded")

    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP"):
        (tmp_path / kind).write_bytes(encode(RGB, kind))
    for plugin in ("PngImagePlugin.PngImageFile", "TiffImagePlugin.TiffImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", fail)
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP"):
        assert image_files.read_size(tmp_path / kind) == (12, 17)


# --- Pixels --------------------------------------------------------------------------------------


def test_as_uint8_image_keeps_what_is_right():
    image = np.zeros((4, 5, 3), dtype=np.uint8)
    assert image_files.as_uint8_image(image) is image
    six = np.zeros((4, 5, 6), dtype=np.uint8)
    assert image_files.as_uint8_image(six, 6) is six


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([False, True]), [0, 255]),
        (np.array([0, 128, 129, 385, 386, 65535], np.uint16), [0, 0, 1, 1, 2, 255]),
        (np.array([0, 128, 129, 65535], ">u2"), [0, 0, 1, 255]),
        (np.array([0, 0.2, 0.001, 0.00197, 1], np.float32), [0, 51, 0, 1, 255]),
        (np.array([0, 0.5, 1], np.float16), [0, 128, 255]),
        (np.array([0, 7, 255], np.int64), [0, 7, 255]),
        (np.array([3, 200], np.int32), [3, 200]),
    ],
)
def test_as_uint8_image_converts_values(pixels, expected):
    image = image_files.as_uint8_image(pixels[None])
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.repeat(np.array(expected)[None, :, None], 3, axis=2))


def test_as_uint8_image_scales_uint16_with_rounding():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values.astype(np.float64) * 255 / 65535)
    np.testing.assert_array_equal(
        image_files.as_uint8_image(values[:, :, None], 1)[:, :, 0], expected
    )


def test_as_uint8_image_drops_alpha():
    rgba = np.random.default_rng(0).integers(0, 256, (4, 5, 4)).astype(np.uint8)
    image = image_files.as_uint8_image(rgba)
    np.testing.assert_array_equal(image, rgba[:, :, :3])
    assert image.flags.c_contiguous
    assert image_files.as_uint8_image(rgba, 4) is rgba


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.full((2, 2, 3), 1.5), ValueError, r"0\.\.1, got 1\.5\.\.1\.5; .*uint8"),
        (np.full((2, 2, 3), -0.1), ValueError, r"got -0\.1"),
        (np.full((2, 2, 3), np.nan), ValueError, "got nan"),
        (np.full((2, 2, 3), np.inf), ValueError, r"\.\.inf"),
        (np.full((2, 2, 3), 256), ValueError, r"0\.\.255, got 256"),
        (np.full((2, 2, 3), -1), ValueError, "got -1"),
        (np.zeros((2, 2, 5), np.uint8), ValueError, r"3 channels .*\(2, 2, 5\); reorder"),
        (np.zeros((3, 20, 30), np.uint8), ValueError, r"got shape \(3, 20, 30\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), ValueError, "list of images"),
        (np.zeros((0, 2, 3), np.uint8), ValueError, "non-empty"),
        (np.zeros((2, 2, 3), object), TypeError, "got dtype object"),
        (np.zeros((2, 2, 3), complex), TypeError, "got dtype complex"),
        (torch.zeros(3, 2, 2), TypeError, r"got torch\.Tensor; use \.permute"),
        ([[1, 2]], TypeError, r"got builtins\.list; use np\.asarray"),
        (None, TypeError, r"got None; read files with utils\.load_image, which says why"),
        ("a.png", TypeError, r"got builtins\.str; use utils\.load_image\(path\)"),
        (Image.new("L", (3, 3)), TypeError, r"Image; use np\.asarray"),
        ({}, TypeError, r"got builtins\.dict; read files with"),
    ],
)
def test_as_uint8_image_refuses(image, error, message):
    with pytest.raises(error, match=message) as raised:
        image_files.as_uint8_image(image)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_as_uint8_image_wants_exact_other_channels(channels):
    with pytest.raises(ValueError, match=r"2 channels"):
        image_files.as_uint8_image(np.zeros((2, 2, channels), np.uint8), 2)


def picture_of(mode):
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        return Image.fromarray(RGB // 64 * 64).convert(mode)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)])
    if mode == "1":
        return Image.fromarray(GRAY > 100)
    scale = {"L": 1, "I;16": 257, "I": 1, "F": np.float32(1 / 255)}[mode]
    dtype = {"L": np.uint8, "I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    return Image.fromarray(GRAY.astype(dtype) * dtype(scale))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16", "I", "F"])
def test_load_image_of_every_mode(tmp_path, mode):
    picture = picture_of(mode)
    assert picture.mode == mode
    path = tmp_path / ("image.png" if mode not in ("CMYK", "F", "I") else "image.tiff")
    picture.save(path)
    image = image_files.load_image(path)
    if mode in ("L", "LA", "I;16", "I", "F"):
        expected = np.repeat(GRAY[:, :, None], 3, axis=2)
    elif mode == "1":
        expected = np.repeat((GRAY > 100)[:, :, None] * 255, 3, axis=2)
    else:
        expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(image, expected)
    assert image.dtype == np.uint8
    if mode == "L":
        np.testing.assert_array_equal(image_files.load_image(str(path), 1)[:, :, 0], GRAY)


def test_load_image_of_transparent_palette(tmp_path):
    picture = picture_of("P")
    picture.save(tmp_path / "image.png", transparency=bytes([0, 128, 255]))
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(image_files.load_image(tmp_path / "image.png"), expected)


def test_load_image_names_the_path(tmp_path):
    Image.fromarray(np.full((9, 9), 3.0, np.float32)).save(tmp_path / "range.tiff")
    with pytest.raises(ValueError, match=r"range\.tiff cannot be used: .* 0\.\.1, got 3\.\.3"):
        image_files.load_image(tmp_path / "range.tiff")
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    with pytest.raises(ValueError, match=r"whole\.png .* 6 channels"):
        image_files.load_image(tmp_path / "whole.png", 6)


# --- More than 8 bits ----------------------------------------------------------------------------

DEEP = np.random.default_rng(6).integers(0, 2**16, (12, 17, 4)).astype(np.uint16)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("part", [{}, {"rowsperstrip": 5}, {"tile": (16, 16)}])
def test_tiff_of_16_bits(tmp_path, channels, byte_order, compression, layout, part):
    pixels = DEEP[:, :, :channels]
    content = encode_tiff(
        pixels.transpose(2, 0, 1) if layout == "separate" else pixels,
        photometric="rgb",
        planarconfig=layout,
        byteorder=byte_order,
        compression=compression,
        **part,
    )
    np.testing.assert_array_equal(read(tmp_path, content), scaled(pixels[:, :, :3]))


@pytest.mark.parametrize("channels", [3, 4])
def test_png_of_16_bits(tmp_path, channels):
    pixels = DEEP[:, :, :channels]
    image = read(tmp_path, png_of_16_bits(pixels))
    np.testing.assert_array_equal(image, scaled(pixels[:, :, :3]))
    low = read(tmp_path, png_of_16_bits(pixels >> 4), bit_depth=12)
    np.testing.assert_array_equal(low, scaled(pixels[:, :, :3] >> 4, 12))


@pytest.mark.parametrize("kind", ["png", "planes", "8 bits"])
def test_grey_of_colours(tmp_path, kind):
    expected = np.asarray(Image.fromarray(RGB).convert("L")).astype(int)
    content = {
        "png": lambda: png_of_16_bits(deep()),
        "planes": lambda: encode_tiff(
            deep().transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
        ),
        "8 bits": lambda: encode(RGB, "PNG"),
    }[kind]()
    image = read(tmp_path, content, channel_count=1)
    assert image.shape == (12, 17, 1)
    assert abs(image[:, :, 0] - expected).max() <= (0 if kind == "8 bits" else 1)


@pytest.mark.parametrize("most", [4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_pnm_scales_as_the_file_says(tmp_path, caplog, most, channels):
    values = DEEP[:, :, :channels] & most
    header = f"P{5 if channels == 1 else 6} 17 12 {most}\n".encode()
    image = read(tmp_path, header + values.astype(">u2").tobytes())
    assert abs(image.astype(int) - np.rint(values * (255 / most))).max() <= 1
    assert caplog.records == []


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_grey_tiff_of_many_kinds(tmp_path, byte_order, compression):
    options = {"byteorder": byte_order, "compression": compression}
    grey = DEEP[:, :, 0]
    unit = RGB[:, :, 0] / np.float32(255)
    for pixels, expected in (
        (grey, scaled(grey)),
        (unit, RGB[:, :, 0]),
        (RGB[:, :, 0].astype(np.int16), RGB[:, :, 0]),
        (RGB[:, :, 0].astype(np.uint32), RGB[:, :, 0]),
        (RGB[:, :, 0], RGB[:, :, 0]),
    ):
        image = read(tmp_path, encode_tiff(pixels, photometric="minisblack", **options))
        np.testing.assert_array_equal(image, expected[:, :, None].repeat(3, axis=2))
    # 0 is white.
    for pixels, expected in (
        (grey, scaled(~grey)),
        (unit, np.rint((1 - unit) * 255.0)),
        (RGB[:, :, 0], ~RGB[:, :, 0]),
    ):
        image = read(tmp_path, encode_tiff(pixels, photometric="miniswhite", **options))
        np.testing.assert_array_equal(image[:, :, 1], expected)
    signed = encode_tiff(grey.astype(np.int16), photometric="miniswhite", **options)
    (tmp_path / "signed.tif").write_bytes(signed)
    with pytest.raises(ValueError, match=r"signed\.tif .* got MINISWHITE YX int16"):
        image_files.load_image(tmp_path / "signed.tif")


def test_other_colours_than_rgb_are_refused(tmp_path):
    (tmp_path / "lab.tif").write_bytes(encode_tiff(deep(), photometric="cielab"))
    with pytest.raises(ValueError, match=r"lab\.tif .* grey or RGB pixels, got CIELAB YXS uint16"):
        image_files.load_image(tmp_path / "lab.tif")


@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("count", "photometric"), [(2, "minisblack"), (5, "rgb"), (6, "rgb")])
def test_channels_of_a_tiff_are_all_or_none(tmp_path, layout, dtype, count, photometric):
    pixels = np.dstack([RGB, RGB])[:, :, :count]
    values = pixels.astype(dtype) * dtype(257 if dtype is np.uint16 else 1)
    planes = values.transpose(2, 0, 1) if layout == "separate" else values
    extra = [0] * (count - (3 if photometric == "rgb" else 1))
    content = encode_tiff(planes, planarconfig=layout, photometric=photometric, extrasamples=extra)
    np.testing.assert_array_equal(read(tmp_path, content, channel_count=count), pixels)
    with pytest.raises(ValueError, match=rf"3 channels .*\(12, 17, {count}\)"):
        image_files.load_image(tmp_path / "image.x")


def packed_12_bits(values):
    """A TIFF of [H, W] with an even W, two values in three bytes."""
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = data.size
    entries = b"".join(struct.pack("<HHII", number, 4, 1, tags[number]) for number in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", 8 + data.size) + data.astype(np.uint8).tobytes() + directory


def test_a_file_that_tells_its_12_bits(tmp_path, caplog):
    values = DEEP[:, :16, 0] >> 4
    image = read(tmp_path, packed_12_bits(values))
    np.testing.assert_array_equal(image[:, :, 0], scaled(values, 12))
    read(tmp_path, packed_12_bits(values >> 4))
    assert caplog.records == []


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, ">u2"])
def test_bit_depth(bits, dtype):
    values = np.arange(2**bits).astype(dtype).reshape(-1, 16)
    image = image_files.as_uint8_image(values, 1, bits)
    np.testing.assert_array_equal(image[:, :, 0], scaled(values, bits))
    if bits < 15:
        with pytest.raises(ValueError, match=rf"0\.\.{2**bits - 1}, got 0\.\.{2**bits};"):
            image_files.as_uint8_image(np.append(values, 2**bits)[None], 1, bits)


def test_bit_depth_is_for_more_than_8_bits():
    assert image_files.as_uint8_image(RGB, 3, 12) is RGB
    assert image_files.as_uint8_image(RGB, 3, "auto") is RGB
    unit = RGB / np.float32(255)
    np.testing.assert_array_equal(image_files.as_uint8_image(unit, 3, 12), RGB)
    flags = RGB > 100
    np.testing.assert_array_equal(image_files.as_uint8_image(flags, 3, "auto"), flags * 255)


@pytest.mark.parametrize("bit_depth", [7, 17, 0, 12.0, True, "12", "max", [12]])
def test_bit_depth_is_checked(tmp_path, bit_depth):
    for function in (image_files.load_image, image_files.as_uint8_image):
        with pytest.raises(ValueError, match="a bit depth must be 8 to 16, 'auto' or None, got"):
            function(RGB, 3, bit_depth)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_auto_spreads_the_percentiles(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(3000, 100, (300, 400)).astype(dtype)
    values[7, 9], values[8, 9] = 60_000, 0  # a hot and a dead pixel
    low, high = np.percentile(values, (0.1, 99.9))
    expected = ((values.astype(np.float64) - low) / (high - low) * 255).clip(0, 255)
    image = image_files.as_uint8_image(values, 1, "auto")[:, :, 0]
    assert abs(image - expected).max() <= 0.501
    assert 100 < image.mean() < 155


def test_auto_of_colours_keeps_the_colours():
    values = np.stack([np.arange(100, 200), np.full(100, 150)], axis=1).astype(np.uint16)
    image = image_files.as_uint8_image(values[None], 2, "auto")
    assert image[0, 50, 0] == image[0, 50, 1]


def test_auto_of_little_to_see():
    flat = np.full((9, 9), 700, np.uint16)
    assert image_files.as_uint8_image(flat, 1, "auto").max() == 0
    spots = np.zeros((200, 200), np.uint16)
    spots[3, 4] = 500
    image = image_files.as_uint8_image(spots, 1, "auto")
    assert image.sum() == image[3, 4] == 255
    with pytest.raises(ValueError, match=r"finite values, got nan"):
        image_files.as_uint8_image(np.full((9, 9), np.nan), 1, "auto")


def test_auto_of_a_large_image_looks_at_a_part():
    values = np.tile(np.arange(3000, dtype=np.uint16), (3000, 1))
    image = image_files.as_uint8_image(values, 1, "auto")
    expected = ((values[0] - 2.999) / (2996.001 - 2.999) * 255).clip(0, 255)
    assert abs(image[0, :, 0] - expected).max() <= 1


@pytest.mark.parametrize("kind", ["grey", "colour", "alpha", "planes"])
def test_a_nearly_black_image_is_told_once(tmp_path, caplog, kind):
    dark = DEEP[:, :, :3] >> 4
    dark[0, 0] = 3800
    content = {
        "grey": lambda pixels: encode(pixels[:, :, 0], "TIFF"),
        "colour": png_of_16_bits,
        "alpha": lambda pixels: png_of_16_bits(np.dstack([pixels, np.full((12, 17), 65535)])),
        "planes": lambda pixels: encode_tiff(
            pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
        ),
    }[kind]
    peak = dark[:, :, 0].max() if kind == "grey" else dark.max()
    for _ in range(2):
        read(tmp_path, content(dark), kind)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"up to {peak} alone; set IMAGE_BIT_DEPTH (--bit-depth, bit_depth=) to 12 or" in (
        record.getMessage()
    )
    caplog.clear()
    read(tmp_path, content(dark), "told", bit_depth=12)
    read(tmp_path, content(dark), "stretched", bit_depth="auto")
    read(tmp_path, content(dark * 2 + 1000), "bright enough")
    read(tmp_path, content(dark * 0), "black")
    assert caplog.records == []


# --- Pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (encode_tiff(deep(RGB)[None, :, :, 0].repeat(4, 0), photometric="minisblack"), 4),
        (
            encode_tiff(
                np.stack([deep(RGB).transpose(2, 0, 1)] * 2),
                photometric="rgb",
                planarconfig="separate",
            ),
            2,
        ),
        (encode(RGB, "GIF", save_all=True, append_images=[Image.fromarray(~RGB)]), 2),
        (encode(RGB, "PNG", save_all=True, append_images=[Image.fromarray(~RGB)]), 2),
        (encode(RGB, "WEBP", save_all=True, append_images=[Image.fromarray(~RGB)]), 2),
    ],
    ids=["TIFF", "planes", "GIF", "PNG", "WebP"],
)
def test_further_pages_are_told_once(tmp_path, caplog, content, count):
    first = read(tmp_path, content)
    again = read(tmp_path, content)
    np.testing.assert_array_equal(first, again)
    (record,) = caplog.records
    assert f"image.x: the first of its {count} pages is read; save the one" in record.getMessage()


def test_previews_are_no_pages(tmp_path, caplog):
    small = Image.fromarray(RGB[::2, ::2])
    read(tmp_path, encode(RGB, "MPO", save_all=True, append_images=[small]))
    for options in ({"photometric": "rgb"}, {"photometric": "rgb", "planarconfig": "separate"}):
        separate = "planarconfig" in options
        path = tmp_path / f"{len(options)}.tif"
        with tifffile.TiffWriter(path) as writer:
            for step, kind in ((1, 0), (2, 1), (4, 1)):
                pixels = deep()[::step, ::step]
                pixels = pixels.transpose(2, 0, 1) if separate else pixels
                writer.write(pixels, subfiletype=kind, metadata=None, **options)
        image = image_files.load_image(path)
        np.testing.assert_array_equal(image, RGB)
    read(tmp_path, encode(RGB, "GIF"))
    assert caplog.records == []


# --- Any bytes -----------------------------------------------------------------------------------


@functools.cache
def specimens():
    """A small file of each kind that decoders treat in their own way."""
    base = Image.fromarray(RGB).resize((48, 36), Image.Resampling.BICUBIC)
    other = base.rotate(180)
    pixels = np.asarray(base)
    planes = deep(pixels).transpose(2, 0, 1)
    exif = exif_of(6)
    exif[0x010F] = "a camera"
    with_metadata = {"exif": exif, "icc_profile": b"p" * 300}
    files = {
        "a.jpg": encode(base, "JPEG", **with_metadata),
        "progressive.jpg": encode(base, "JPEG", progressive=True, subsampling=0),
        "a.png": encode(base, "PNG", **with_metadata),
        "palette.png": encode(base.quantize(17), "PNG", transparency=3),
        "deep.png": png_of_16_bits(deep(pixels)),
        "frames.png": encode(base, "PNG", save_all=True, append_images=[other]),
        "a.bmp": encode(base, "BMP"),
        "palette.bmp": encode(base.quantize(9), "BMP"),
        "frames.gif": encode(base, "GIF", save_all=True, append_images=[other]),
        "a.webp": encode(base, "WEBP", **with_metadata),
        "lossless.webp": encode(base, "WEBP", lossless=True),
        "a.ppm": encode(base, "PPM"),
        "a.tif": encode(base, "TIFF", tiffinfo={34665: {36867: "2020:01:01 00:00:00"}, 274: 6}),
        "lzw.tif": encode(base, "TIFF", compression="tiff_lzw", exif=exif),
        "deep.tif": encode_tiff(deep(pixels), photometric="rgb", bigtiff=True, byteorder=">"),
        "planes.tif": encode_tiff(planes, photometric="rgb", planarconfig="separate"),
        "tiles.tif": encode_tiff(
            planes, photometric="rgb", planarconfig="separate", tile=(16, 16), compression="deflate"
        ),
        "float.tif": encode_tiff(pixels / np.float32(255), photometric="rgb"),
        "stack.tif": encode_tiff(planes, photometric="minisblack"),
        "white.tif": encode_tiff(planes[0], photometric="miniswhite", byteorder=">"),
    }
    if HAS_AVIF:
        files["a.avif"] = encode(base, "AVIF", exif=exif)
    return files


NUMBERS = (0, 1, 65_535, 30_000, 100_000, 2**31 - 1, 2**32 - 1)


def damaged(content, rng):
    """Some bytes changed, put in or taken out, most often near the beginning."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        size = len(content)
        if not size:
            break
        position = int(rng.integers(min(size, rng.choice([64, 300, size]))))
        kind = rng.integers(6)
        if kind < 2:
            content[position] = rng.integers(256)
        elif kind == 2:
            content[position] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            number = int(rng.choice(NUMBERS))
            content[position : position + 4] = number.to_bytes(4, rng.choice(["big", "little"]))
        elif kind == 4:
            del content[position : position + int(rng.integers(1, 9))]
        else:
            del content[int(rng.integers(size // 2, size)) :]
    return bytes(content)


def read_damaged_files(folder, rounds):
    """Reads damaged specimens; returns how many were read, and how many were refused."""
    counts = [0, 0]
    for seed in range(rounds):
        for name, whole in specimens().items():
            path = folder / name
            path.write_bytes(damaged(whole, np.random.default_rng([seed, len(whole)])))
            found, messages = [], []
            for function in (image_files.read_size, image_files.load_image):
                try:
                    found.append(function(path))
                except (ValueError, OSError) as error:
                    messages.append(str(error))
            assert all(name in text and "\n" not in text for text in messages), messages
            if len(found) == 2:
                assert found[0] == found[1].shape[:2], (name, seed)
            counts[len(found) < 2] += 1
    return counts


def peak_memory():
    """The most that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.fixture
def quiet(monkeypatch, capfd):
    """Damaged files make libraries talk; few pixels, that no file takes much memory."""
    monkeypatch.setattr(image_files, "MAX_PIXELS", 2_000_000)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_a_tiff_of_several_widths_takes_no_memory(tmp_path):
    content = bytearray(encode_tiff(np.zeros((8, 8, 3), np.float32), photometric="rgb"))
    for tag, count, value in ((256, 17, 8), (257, 1, 5_000_000)):
        at = content.index(struct.pack("<HHI", tag, 4, 1))
        content[at : at + 12] = struct.pack("<HHII", tag, 4, count, value)
    (tmp_path / "a.tif").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.tif cannot be used: a TIFF must have one height"):
            image_files.read_size(tmp_path / "a.tif")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("quiet")
def test_damaged_files(tmp_path):
    before = peak_memory()
    read_count, refused = read_damaged_files(tmp_path, 25)
    assert min(read_count, refused) > 50  # neither all whole nor all beyond repair
    assert peak_memory() - before < 150


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_many_damaged_files(tmp_path):
    before = peak_memory()
    read_count, refused = read_damaged_files(tmp_path, 2000)
    assert min(read_count, refused) > 4000
    assert peak_memory() - before < 300
