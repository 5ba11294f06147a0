"""Image files: which files are images, how large they are, and their pixels as uint8.

All image files are opened here, so that the size and the pixels of a file never contradict each
other. What is wrong with one is a ValueError of one line that names it.
"""

import contextlib
import functools
import logging
import math
import os
import stat
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

if TYPE_CHECKING:
    from tifffile import TiffFile

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How names of image files end.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif")
)
# Pixels that a file may have. Decoded, a pixel takes up to 8 bytes; a small file can claim any
# number of them.
MAX_PIXELS = 1_000_000_000

# EXIF's orientation, and what turns such pixels upright.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Marks pictures that the library makes, see output_mark.
_MARK = ("Software", "mask-rcnn")


# --- Files and folders ---------------------------------------------------------------------------


def is_image_file(path: str | Path) -> bool:
    """Whether a file's name says that it is an image; hidden files, as ._b.jpg, are none."""
    path = Path(path)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def list_images(folder: str | Path) -> list[Path]:
    """The image files directly in a folder by name, without pictures that the library made."""
    with os.scandir(folder) as entries:
        paths = [Path(e.path) for e in entries if is_image_file(e.name) and not e.is_dir()]
    return sorted(path for path in paths if not _is_own_output(path))


def output_mark() -> PngInfo:
    """The mark of pictures that the library makes: `picture.save(path, pnginfo=output_mark())`."""
    mark = PngInfo()
    mark.add_text(*_MARK)
    return mark


def _is_own_output(path: Path) -> bool:
    if path.suffix.lower() != ".png" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return ("tEXt" + "\0".join(_MARK)).encode() in file.read(256)
    except OSError:
        return False  # to be named when it is read


# --- Reading -------------------------------------------------------------------------------------


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image file, upright; its pixels are not decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image that can be read.
    """
    return _read(path, lambda source: source.upright_size())


def load_image(
    path: str | Path, channel_count: int = 3, bit_depth: int | str | None = None
) -> np.ndarray:
    """Reads an image file, upright as its EXIF orientation says; without a valid one, as it is.

    Of a file of several pages the first one is read, with a warning.

    Args:
        path: any file that pillow reads, or a TIFF that tifffile reads.
        channel_count: 3 turns grey, palette and CMYK into RGB and drops alpha; 1 makes grey.
        bit_depth: how values of more than 8 bits are scaled, see as_uint8_image.

    Returns:
        [H, W, channel_count] uint8, RGB for 3.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image that can be read, or has other channels or values.
    """
    check_bit_depth(bit_depth)

    def decode(source: _Source) -> np.ndarray:
        _warn_of_pages(path, source)
        pixels = source.upright_pixels(grey=channel_count == 1)
        depth = bit_depth or source.bit_depth
        if depth is None and pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
            _warn_of_range(path, pixels)
        return as_uint8_image(pixels, channel_count, depth)

    return _read(path, decode)


class _Source(Protocol):
    """An opened image file, of which the header is read."""

    # Where the file itself tells how many bits of 16 are used.
    bit_depth: int | None

    def upright_size(self) -> tuple[int, int]:
        """(height, width)."""
        ...

    def upright_pixels(self, grey: bool) -> np.ndarray:
        """[H, W] or [H, W, C] of the file's own values; colours are RGB, or grey if asked for."""
        ...

    def may_have_pages(self) -> bool:
        """Whether it is worth counting them."""
        ...

    def count_pages(self) -> int:
        """Pages, or frames; previews are none."""
        ...


def _read(path: str | Path, use: Callable[[_Source], T]) -> T:
    """What `use` makes of an opened file; names the file where anything goes wrong."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"image file {path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"image file {path} cannot be used: {error}") from error
    if not stat.S_ISREG(mode):  # reading a pipe may wait for ever
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise ValueError(f"image file {path} must be a regular file, but is {kind}")
    try:
        try:
            with _open(path, path) as source:
                return use(source)
        except Exception as error:
            bare = _png_without_metadata(path)
            if bare is None:
                raise
            with _open(path, bare) as source:
                result = use(source)
            _warn_once(path, f"its metadata is left out, which cannot be read: {_line(error)}")
            return result
    except Exception as error:  # decoders raise whatever they stumble over
        raise ValueError(f"image file {path} cannot be used: {_line(error)}") from error


_counted: set[str] = set()


def _warn_of_pages(path: str | Path, source: _Source) -> None:
    """Logs, once, that there are further pages."""
    with contextlib.suppress(Exception):  # what is wrong with them is no reason to stop
        if source.may_have_pages() and str(path) not in _counted:
            _counted.add(str(path))
            count = source.count_pages()
            if count > 1:
                remedy = "save the one that you mean, or their maximum, as a file of its own"
                _warn_once(path, f"the first of its {count} pages is read; {remedy}")


def _line(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"it claims more than {MAX_PIXELS} pixels; cut it into tiles, or raise"
            " image_files.MAX_PIXELS if you trust it"
        )
    if isinstance(error, UnidentifiedImageError):
        version = Image.__version__
        return f"it is damaged, or of a format that pillow {version} does not read; convert it"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _open(path: str | Path, content: str | Path | BytesIO) -> Iterator[_Source]:
    """The source of a file, read from content: the file itself, or what stands for it."""
    try:
        with _pillow_settings():
            file = Image.open(content)
    except UnidentifiedImageError:
        if not _is_tiff(path):
            raise
    else:
        with file:
            if file.format != "TIFF" or not _is_misread(file):
                yield _PillowSource(path, content, file)
                return
    import tifffile  # not before it is needed: it takes as long as a photograph

    with tifffile.TiffFile(path) as tiff:
        yield _TiffSource(path, tiff)


_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A process that was forked while another thread held the lock would wait for ever.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


@contextlib.contextmanager
def _pillow_settings() -> Iterator[None]:
    """MAX_PIXELS in the place of pillow's limit, and no warnings, while a header is read.

    Both are settings of the whole process, which one thread at a time may change.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # pillow refuses what has twice as many
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


_warned: set[tuple[str, str]] = set()


def _warn_once(path: str | Path, message: str) -> None:
    key = (str(path), message)
    if key not in _warned:
        _warned.add(key)
        logger.warning("image file %s: %s", path, message)


def _valid_orientation(path: str | Path, value: object) -> int:
    """EXIF's orientation, 1 to 8; 1, upright, for what is no valid one."""
    if isinstance(value, int) and 1 <= value <= 8:
        return value
    if value != 0:  # which some cameras write for unknown
        _warn_once(path, f"taken as upright: EXIF's orientation must be 1 to 8, got {value!r:.40}")
    return 1


def _grey(pixels: np.ndarray) -> np.ndarray:
    """[H, W] of RGB [H, W, 3 or 4] uint16, with the weights that pillow has for 8 bits."""
    red, green, blue = (pixels[:, :, i].astype(np.uint32) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16).astype(np.uint16)


# --- Files that pillow reads ---------------------------------------------------------------------


class _PillowSource:
    def __init__(self, path: str | Path, content: str | Path | BytesIO, file: Image.Image) -> None:
        self.path, self.content, self.file = path, content, file
        # Samples of 12 bits are not scaled to the 16 that they get.
        packed = file.format == "TIFF" and _tag(file, _BITS_PER_SAMPLE, ()) == (12,)
        self.bit_depth = 12 if packed else None

    def upright_size(self) -> tuple[int, int]:
        width, height = self.file.size
        if self.file.format == "TIFF":  # the size in pillow may be upright already
            width, height = (_tag(self.file, number, 0) for number in (_WIDTH, _HEIGHT))
        return (width, height) if self._orientation >= 5 else (height, width)

    def upright_pixels(self, grey: bool) -> np.ndarray:
        file = self.file
        height, width = self.upright_size()
        # Pillow turns a TIFF while it loads.
        method = None if file.format == "TIFF" else _TURNS.get(self._orientation)
        tiles = _tiles(file)
        raw_mode = _raw_mode(tiles[0]) if tiles else ""
        if file.format == "TIFF":
            _check_coverage(
                sum((x2 - x1) * (y2 - y1) for _, (x1, y1, x2, y2), *_ in tiles), height * width
            )
            _leave_out_directories(file)
        file.load()

        def turn(picture: Image.Image) -> Image.Image:
            picture = picture if method is None else picture.transpose(method)
            if picture.size != (width, height):
                found = " x ".join(map(str, picture.size))
                raise ValueError(f"its header says {width} x {height} pixels, there are {found}")
            return picture

        if raw_mode in _COLOURS_OF_16_BITS:
            lower, upper = (turn(half) for half in self._halves(raw_mode))
            pixels = np.asarray(upper).astype(np.uint16) << 8
            pixels |= np.asarray(lower)
            return _grey(pixels) if grey else pixels
        picture = turn(file)
        if picture.mode in ("P", "PA", "LA"):
            picture = picture.convert("RGBA")
        elif picture.mode not in ("1", "L", "I", "I;16", "I;16B", "F", "RGB", "RGBA"):
            picture = picture.convert("RGB")
        if grey and picture.mode in ("RGB", "RGBA"):
            picture = picture.convert("L")
        pixels = _as_array(picture)
        if picture.mode == "I" and file.format in ("PNG", "PPM"):
            pixels = pixels.astype(np.uint16)  # 16 bits, which there is no other mode for
        return pixels

    def may_have_pages(self) -> bool:
        # The other pictures in a JPEG are previews, and the like.
        kind, animated = self.file.format, getattr(self.file, "is_animated", False)
        return kind in ("TIFF", "GIF", "PNG", "WEBP", "AVIF") and animated

    def count_pages(self) -> int:
        # In a file of its own, as going through the pages changes what is read.
        with _pillow_settings(), Image.open(self.content) as file:
            pages = range(getattr(file, "n_frames", 1))
            is_tiff = file.format == "TIFF"
            return sum(not (is_tiff and _is_preview(file, page)) for page in pages)

    @functools.cached_property
    def _orientation(self) -> int:
        file = self.file
        try:
            with _pillow_settings():
                # Metadata of a PNG may follow the pixels, which pillow decodes to get there.
                if file.format != "PNG" or "exif" in file.info or _has_trailer(self.path):
                    exif = file.getexif()
                else:
                    exif = Image.Image.getexif(file)
                if _ORIENTATION not in exif and file.format == "JPEG":
                    # Pillow tried before, for the resolution, and kept what went wrong to itself.
                    Image.Exif().load(file.info.get("exif", b""))
                value = exif.get(_ORIENTATION, 1)
        except Exception as error:
            _warn_once(self.path, f"taken as upright: its EXIF cannot be read: {_line(error)}")
            return 1
        return _valid_orientation(self.path, value)

    def _halves(self, raw_mode: str) -> tuple[Image.Image, Image.Image]:
        """Pictures of the lower and of the upper byte of samples of 16 bits.

        Pillow keeps the byte that is the upper one in the byte order which it reads in.
        """
        order = {"B": "big", "L": "little", "N": sys.byteorder}[raw_mode[-1]]
        halves = []
        for byte_order in ("L", "B") if order == "big" else ("B", "L"):
            with _pillow_settings():
                file: Any = Image.open(self.content)
            with file:
                file.tile = [_with_raw_mode(t, raw_mode[:-1] + byte_order) for t in file.tile]
                file.load()
                halves.append(file.copy())
        return halves[0], halves[1]


_COLOURS_OF_16_BITS = {f"{mode};16{order}" for mode in ("RGB", "RGBX", "RGBA") for order in "BLN"}


def _tiles(file: Image.Image) -> Sequence[Any]:
    """The parts of a file that pillow is about to decode."""
    return getattr(file, "tile", ())


def _raw_mode(tile: Any) -> str:
    """How the samples of a part of a file lie there, as pillow calls it."""
    arguments = tile[3]
    return arguments if isinstance(arguments, str) else str((*(arguments or ()), "")[0])


def _with_raw_mode(tile: Any, raw_mode: str) -> Any:
    arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
    if hasattr(tile, "_replace"):
        return tile._replace(args=arguments)
    return (*tile[:3], arguments)  # pillow before 11


# Pixels from which on copies matter.
_LARGE = 2**26
# Pixels of the rows that are copied together then.
_ROWS = 2**22


def _as_array(picture: Image.Image) -> np.ndarray:
    width, height = picture.size
    if width * height < _LARGE or len(picture.getbands()) == 1:
        return np.array(picture)
    # Pillow makes two more copies of the pixels on the way; here, of some rows.
    pixels = np.empty((height, width, len(picture.getbands())), np.uint8)
    step = max(1, _ROWS // width)
    for y in range(0, height, step):
        rows = picture.crop((0, y, width, min(y + step, height)))
        pixels[y : y + step] = np.asarray(rows)
    return pixels


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _has_trailer(path: str | Path) -> bool:
    """Whether metadata follows the pixels of a PNG."""
    after_pixels = False
    with open(path, "rb") as file:
        file.seek(len(_PNG_SIGNATURE))
        while len(header := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", header)
            if after_pixels and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            after_pixels |= name == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


def _png_without_metadata(path: str | Path) -> BytesIO | None:
    """A PNG's chunks without which it looks otherwise; None if the file is no PNG."""
    with open(path, "rb") as file:
        if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
            return None
        data = _PNG_SIGNATURE + file.read()
    kept = [_PNG_SIGNATURE]
    start = len(_PNG_SIGNATURE)
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        chunk = data[start : start + 12 + length]
        needed = name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
        if needed or (name == b"eXIf" and zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]):
            kept.append(chunk)
        start += len(chunk)
    return BytesIO(b"".join(kept))


# --- TIFF ----------------------------------------------------------------------------------------

# Tags, and those that hold the directories of EXIF and GPS.
_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS_PER_SAMPLE = 254, 256, 257, 258
_PHOTOMETRIC, _PLANAR, _EXTRA_SAMPLES = 262, 284, 338
_DIRECTORIES = (34665, 34853)

# What pillow swaps the bytes of, after libtiff has done so.
_SWAPPED = ("I;16BS", "I;32BS", "F;32BF")


def _is_tiff(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _tag(file: Image.Image, number: int, default: Any) -> Any:
    return file.tag_v2.get(number, default)  # type: ignore[attr-defined]


def _is_misread(file: Image.Image) -> bool:
    """Whether pillow gives other pixels than those of this TIFF."""
    bits, photometric = _tag(file, _BITS_PER_SAMPLE, (1,)), _tag(file, _PHOTOMETRIC, 1)
    # Channels that are no alpha are left out.
    unknown = _tag(file, _EXTRA_SAMPLES, ()).count(0)
    if (photometric == 1 and unknown) or (photometric == 2 and len(bits) > 4):
        return True
    # Above 8 bits, a plane is taken for colours, white for black, or bytes are swapped twice.
    planar = len(bits) > 1 and _tag(file, _PLANAR, 1) == 2
    swapped = any(t[0] == "libtiff" and _raw_mode(t) in _SWAPPED for t in _tiles(file))
    return max(bits) > 8 and (planar or swapped or photometric == 0)


def _is_preview(file: Image.Image, page: int) -> bool:
    """Whether a page of a TIFF is a smaller copy, or a mask, of another."""
    file.seek(page)
    return bool(_tag(file, _SUBFILE_TYPE, 0) & 0b101)


def _check_coverage(found: int, expected: int) -> None:
    if found < expected:  # the rest would be black
        raise ValueError(f"its header says {expected} pixels, there are {found}")


def _leave_out_directories(file: Image.Image) -> None:
    """Keeps pillow from reading the EXIF of a TIFF along with its pixels, for which it may fail."""
    with contextlib.suppress(Exception):
        exif = file.getexif()
        for number in _DIRECTORIES:
            exif.pop(number, None)


_AXES = ("YX", "YXS", "SYX")  # S: samples, that is channels


class _TiffSource:
    """A TIFF, read with tifffile."""

    def __init__(self, path: str | Path, tiff: "TiffFile") -> None:
        self.path, self.tiff, self.page = path, tiff, tiff.pages.first
        sides = self.page.imagelength, self.page.imagewidth
        if not all(isinstance(side, int) for side in sides):  # a tuple times a number is a long one
            raise ValueError(f"a TIFF must have one height and one width, got {sides}"[:200])
        if math.prod(sides) > MAX_PIXELS or self.page.size > 4 * MAX_PIXELS:
            raise Image.DecompressionBombError
        self.bit_depth = self.page.bitspersample if 8 < self.page.bitspersample < 16 else None

    def upright_size(self) -> tuple[int, int]:
        height, width = self.page.imagelength, self.page.imagewidth
        return (width, height) if self._orientation >= 5 else (height, width)

    def upright_pixels(self, grey: bool) -> np.ndarray:
        page = self.page
        photometric, dtype = int(page.photometric), np.dtype(page.dtype)
        invertible = dtype.kind == "f" or (dtype.kind == "u" and dtype.itemsize <= 2)
        if photometric > 2 or page.axes not in _AXES or (photometric == 0 and not invertible):
            name = getattr(page.photometric, "name", photometric)
            raise ValueError(
                f"a TIFF must have grey or RGB pixels, got {name} {page.axes} {dtype}; convert it"
            )
        stored = sum(1 for count in page.databytecounts if count)
        if stored < math.prod(page.chunked):  # the rest would be black
            raise ValueError(
                f"it must have {math.prod(page.chunked)} strips or tiles, got {stored}"
            )
        pixels = page.asarray()
        if page.axes == "SYX":
            pixels = pixels.transpose(1, 2, 0)
        if photometric == 0:  # white is 0
            pixels = (1 if dtype.kind == "f" else 2**page.bitspersample - 1) - pixels
        orientation = self._orientation
        if orientation >= 5:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if orientation in (3, 4, 7, 8) else 1]
        pixels = pixels[:, :: -1 if orientation in (2, 3, 6, 7) else 1]
        return _grey(pixels) if grey and photometric == 2 else pixels

    def may_have_pages(self) -> bool:
        return len(self.tiff.pages) > 1

    def count_pages(self) -> int:
        pages: Any = self.tiff.pages
        return sum(not page.is_reduced for page in pages)

    @functools.cached_property
    def _orientation(self) -> int:
        tag = self.page.tags.get(_ORIENTATION)
        return 1 if tag is None else _valid_orientation(self.path, int(tag.value))


# --- Values --------------------------------------------------------------------------------------


def check_bit_depth(bit_depth: int | str | None) -> None:
    """Raises ValueError unless this is a bit depth, see as_uint8_image."""
    is_depth = isinstance(bit_depth, int | np.integer) and 8 <= bit_depth <= 16
    if not (bit_depth in (None, "auto") or is_depth):
        raise ValueError(f"a bit depth must be 8 to 16, 'auto' or None, got {bit_depth!r}")


def _warn_of_range(path: str | Path, pixels: np.ndarray) -> None:
    """Logs, once, that an image is nearly black as its bit depth is not 16."""
    colours = pixels[:, :, :3] if pixels.ndim == 3 else pixels
    peak = int(colours.max())
    if 0 < peak < 2**16 // 8:
        bits = max(8, peak.bit_length())
        _warn_once(
            path,
            f"nearly black, as its 16 bits hold values up to {peak} alone; set IMAGE_BIT_DEPTH"
            f" (--bit-depth, bit_depth=) to {bits} or to auto",
        )


def as_uint8_image(
    image: np.ndarray, channel_count: int = 3, bit_depth: int | str | None = None
) -> np.ndarray:
    """Brings an image array to uint8 with channel_count channels, or says what is wrong with it.

    Args:
        image: [H, W] or [H, W, C]. uint8 stays as it is; bool becomes 0 and 255; uint16 is scaled
            by 255 / 65535; float is expected in 0..1 and scaled by 255; other integers are
            expected in 0..255.
        channel_count: for 3, one channel is repeated and a fourth (alpha) is dropped; otherwise
            C must be channel_count.
        bit_depth: for other values of more than 8 bits. A number n of bits, 8 to 16: integers are
            expected in 0..2**n - 1, which is scaled to 0..255. "auto": the 0.1st and the 99.9th
            percentile of the image's own values become 0 and 255, values beyond them likewise.

    Returns:
        [H, W, channel_count] uint8, contiguous; the argument itself where nothing has to change.

    Raises:
        TypeError: not a numpy array of numbers.
        ValueError: other shape, channels or values.
    """
    check_bit_depth(bit_depth)
    if not isinstance(image, np.ndarray):
        raise TypeError(_no_array(image))
    shape = image.shape
    if image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(
            f"an image must be a non-empty array [H, W] or [H, W, C], got shape {shape}; "
            "pass a batch as a list of images"
        )
    if image.ndim == 2:
        image = image[:, :, None]
    repeated = channel_count == 3 and image.shape[2] == 1
    if channel_count == 3 and image.shape[2] == 4:
        image = image[:, :, :3]
    elif image.shape[2] != channel_count and not repeated:
        raise ValueError(
            f"an image must have {channel_count} channels in its last axis, got shape {shape}; "
            "reorder the axes or set IMAGE_CHANNEL_COUNT"
        )
    kind = image.dtype.kind
    if kind == "b":
        image = image.astype(np.uint8) * np.uint8(255)
    elif kind not in "iuf":
        raise TypeError(f"an image must hold numbers, got dtype {image.dtype}; use np.uint8")
    elif image.dtype != np.uint8:
        image = _stretched(image) if bit_depth == "auto" else _scaled(image, bit_depth)
    if repeated:
        image = image.repeat(3, axis=2)
    return np.ascontiguousarray(image)


def _no_array(image: object) -> str:
    """What is wrong with an image that is no numpy array, and what to do."""
    kind = f"{type(image).__module__}.{type(image).__qualname__}"
    if image is None:
        kind, remedy = "None", "read files with utils.load_image, which says why it cannot"
    elif isinstance(image, str | os.PathLike):
        remedy = "use utils.load_image(path)"
    elif isinstance(image, Tensor):
        remedy = "use .permute(1, 2, 0).cpu().numpy()"
    elif isinstance(image, list | tuple | Image.Image) or hasattr(image, "__array__"):
        remedy = "use np.asarray"
    else:
        remedy = "read files with utils.load_image"
    return f"an image must be a numpy array [H, W, C], got {kind}; {remedy}"


def _scaled(image: np.ndarray, bit_depth: Any) -> np.ndarray:
    """Values in 0..1 (float) or 0..2**bit_depth - 1 as 0..255."""
    if image.dtype.kind == "f":
        limit = 1
    elif bit_depth is not None:
        limit = 2**bit_depth - 1
    else:
        limit = 2**16 - 1 if image.dtype.kind == "u" and image.dtype.itemsize == 2 else 255
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= limit):  # so that NaN fails
        raise ValueError(
            f"an image of {image.dtype} must have values in 0..{limit}, got {low:g}..{high:g};"
            " set IMAGE_BIT_DEPTH (bit_depth=) to its bits or to 'auto', or convert values in"
            " 0..255 with image.astype(np.uint8)"
        )
    if image.dtype.kind == "f":
        return np.rint(image * np.float64(255)).astype(np.uint8)
    # limit is odd: there are no ties to round.
    table = (np.arange(limit + 1, dtype=np.uint32) * 510 + limit) // (2 * limit)
    return _by_rows(image, table.astype(np.uint8).__getitem__)


def _stretched(image: np.ndarray) -> np.ndarray:
    """The 0.1st and the 99.9th percentile as 0 and 255."""
    least, most = float(image.min()), float(image.max())
    if not (np.isfinite(least) and np.isfinite(most)):
        raise ValueError(f"an image must have finite values, got {least:g}..{most:g}; replace them")
    step = 1 + math.isqrt(image.size // 2**22)  # some millions of values are enough
    low, high = np.percentile(image[::step, ::step], (0.1, 99.9))
    if low == high:  # some bright spots, or nothing
        low, high = least, max(most, least + 1)
    scale = 255 / (high - low)
    return _by_rows(
        image, lambda rows: np.rint(((rows - low) * scale).clip(0, 255)).astype(np.uint8)
    )


def _by_rows(image: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A function of some rows at a time, whose copies would not fit for large images."""
    result = np.empty(image.shape, np.uint8)
    step = max(1, 2**20 // (image.shape[1] * image.shape[2]))
    for start in range(0, len(image), step):
        result[start : start + step] = function(image[start : start + step])
    return result
