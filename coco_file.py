"""Annotation files in COCO's format, read piece by piece into arrays.

MS COCO's 1.1 million objects are 4 GB as the dicts, lists and floats that json makes of them.
"""

from __future__ import annotations

import ast
import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

import utils

# What may be said of an annotation, by its code. Those that begin with "dropped" are not used.
REMARKS = (
    "",
    "without a mask: their box is taken as one",
    "with parts of less than three points, which are left out",
    "dropped, neither mask nor box",
    "dropped, outline of less than three points",
    "dropped, malformed",
    "dropped, run lengths are damaged or do not add up to their size",
)
FINE, BOX_ONLY, SHORT_PARTS, NOTHING, TOO_SHORT, MALFORMED, DAMAGED = range(len(REMARKS))
_NO_BOX = [math.nan] * 4


class RunLengths(NamedTuple):
    """A mask in compressed run lengths, and the box (x1, y1, x2, y2) of its pixels."""

    size: tuple[int, int]
    counts: str
    bounds: tuple[int, int, int, int]


@dataclass
class Columns:
    """The annotations of a file in their order, as columns.

    Attributes:
        ids: -1 where the id is no number of 64 bits.
        other_ids: by position, what else is the id, or "position 5" for none.
        images: codes of the ids of images, see image_codes; -1 for what is no id.
        categories: the same for categories.
        crowds: 1 marks a crowd.
        boxes: x, y, width and height; NaN for none.
        areas: NaN for none.
        remarks: see REMARKS.
        numbers: x, y, x, y, ... of all outlines.
        part_lengths: numbers of each part of an outline.
        parts: parts of each annotation.
        run_lengths: by position.
    """

    image_codes: dict[int | str, int] = field(default_factory=dict)
    category_codes: dict[int | str, int] = field(default_factory=dict)
    ids: array[int] = field(default_factory=lambda: array("q"))
    other_ids: dict[int, Any] = field(default_factory=dict)
    images: array[int] = field(default_factory=lambda: array("i"))
    categories: array[int] = field(default_factory=lambda: array("i"))
    crowds: array[int] = field(default_factory=lambda: array("b"))
    boxes: array[float] = field(default_factory=lambda: array("d"))
    areas: array[float] = field(default_factory=lambda: array("d"))
    remarks: array[int] = field(default_factory=lambda: array("b"))
    numbers: array[float] = field(default_factory=lambda: array("d"))
    part_lengths: array[int] = field(default_factory=lambda: array("i"))
    parts: array[int] = field(default_factory=lambda: array("i"))
    run_lengths: dict[int, RunLengths] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.remarks)

    def name(self, position: int) -> Any:
        """How messages name an annotation: by its id."""
        return self.other_ids.get(position, self.ids[position])

    def add(self, item: dict[str, Any]) -> None:
        """Adds an annotation, whatever its values are."""
        position = len(self)
        get = item.get
        try:
            self.ids.append(item["id"])
        except (KeyError, TypeError, OverflowError):
            self.ids.append(-1)
            id_ = as_id(get("id"))
            self.other_ids[position] = f"position {position}" if id_ is None else id_
        self.images.append(_code(self.image_codes, get("image_id")))
        self.categories.append(_code(self.category_codes, get("category_id")))
        self.crowds.append(get("iscrowd") in (1, "1"))
        box = get("bbox")
        try:
            self.boxes.fromlist(box if len(box) == 4 else _NO_BOX)  # type: ignore[arg-type]
        except (TypeError, OverflowError):
            self.boxes.extend(_NO_BOX)
        try:
            self.areas.append(get("area", math.nan))
        except (TypeError, OverflowError):
            self.areas.append(math.nan)
        segmentation = get("segmentation")
        first, before = len(self.part_lengths), len(self.numbers)
        if isinstance(segmentation, dict):
            remark = self._add_run_lengths(position, segmentation)
        else:
            remark = self._add_outline(segmentation, position)
        if REMARKS[remark].startswith("dropped"):
            del self.part_lengths[first:], self.numbers[before:]
        self.parts.append(len(self.part_lengths) - first)
        self.remarks.append(remark)

    def _add_run_lengths(self, position: int, rle: dict[str, Any]) -> int:
        try:
            self.run_lengths[position] = read_run_lengths(rle)
        except (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError):
            return DAMAGED
        return FINE

    def _add_outline(self, parts: Any, position: int) -> int:
        """The outline, or that of the box where there is none."""
        numbers, lengths = self.numbers, self.part_lengths
        first, before = len(lengths), len(numbers)
        try:  # as nearly all are: lists of numbers
            for part in parts:
                length = len(part)
                if length < 6 or length & 1:
                    break
                numbers.fromlist(part)
                lengths.append(length)
            else:
                if len(lengths) > first:
                    return FINE
        except (TypeError, OverflowError):
            pass
        del lengths[first:], numbers[before:]
        try:
            found = as_parts(parts or [])
            usable = [part for part in found if len(part) >= 6 and len(part) % 2 == 0]
            for part in usable:
                numbers.fromlist(part)
                lengths.append(len(part))
        except (TypeError, OverflowError, RecursionError):
            return MALFORMED
        if usable:
            return SHORT_PARTS if len(usable) < len(found) else FINE
        if any(found):  # points that were meant to be an outline: the box would be a guess
            return TOO_SHORT
        x, y, width, height = self.boxes[4 * position :]
        if not (min(width, height) > 0 and math.isfinite(x + y + width + height)):
            return NOTHING
        numbers.fromlist([x, y, x + width, y, x + width, y + height, x, y + height])
        lengths.append(8)
        return BOX_ONLY


def as_id(value: object) -> int | str | None:
    """An id as it is compared: 1.0 is 1; None for what is no id."""
    if isinstance(value, str) or type(value) is int:
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _code(codes: dict[int | str, int], value: Any) -> int:
    try:
        return codes[value]
    except KeyError:
        id_ = as_id(value)
        return -1 if id_ is None else codes.setdefault(id_, len(codes))
    except TypeError:  # a list or an object
        return -1


def as_parts(value: Any) -> list[list[float]]:
    """The parts of an outline, [x, y, x, y, ...] each, however the lists are nested.

    Points may be lists of their own, [[x, y], ...], as those of OpenCV's contours, [[[x, y]], ...].

    Raises:
        TypeError: something else than lists and numbers.
    """
    if not isinstance(value, list):
        raise TypeError(f"an outline must be a list, got {value!r}")
    if all(isinstance(item, int | float) for item in value):
        return [value]
    parts = [part for item in value for part in as_parts(item)]
    if all(len(part) == 2 for part in parts):
        return [[number for part in parts for number in part]]
    return parts


def read_run_lengths(rle: dict[str, Any]) -> RunLengths:
    """Run lengths, compressed or not, in one form.

    Raises:
        ArithmeticError, LookupError, SyntaxError, TypeError, ValueError: they are damaged.
    """
    height, width = (as_id(n) for n in rle["size"])
    if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
        raise ValueError(f"a size must be two whole numbers, got {rle['size']}")
    counts = rle["counts"]
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        counts = ast.literal_eval(counts)  # what str() made of bytes
    elif isinstance(counts, list):
        exact = np.array(counts, dtype=np.float64)
        if exact.ndim != 1 or not (abs(exact) < 2**53).all() or (exact % 1 != 0).any():
            raise ValueError("run lengths must be whole numbers")
        counts = exact.astype(np.int64)
    counts = utils.run_lengths({"size": (height, width), "counts": counts})
    starts, ends = utils.set_runs(counts)
    bounds = (0, 0, 0, 0)
    if len(starts):
        left, right = int(starts[0]) // height, -(-int(ends[-1]) // height)
        top, bottom = starts % height, (ends - 1) % height + 1
        whole = bool((starts // height < (ends - 1) // height).any())  # a run turns a corner
        low, high = (0, height) if whole else (int(top.min()), int(bottom.max()))
        bounds = (left, low, right, high)
    return RunLengths((height, width), utils.compress_run_lengths(counts), bounds)


# --- The file ------------------------------------------------------------------------------------


LISTS = ("images", "annotations", "categories")


class ImageEntry(NamedTuple):
    """An image as the file describes it."""

    id: int | str | None
    name: str | None
    height: int | str | None
    width: int | str | None


@dataclass
class Content:
    """What the rest needs of a file."""

    file: Path
    images: list[ImageEntry]
    annotations: Columns
    categories: list[dict[str, Any]]


def read_content(file: Path) -> Content:
    """Reads an annotation file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, or not in COCO's format.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no annotation file {file}")
    with file.open("rb") as binary:
        encoding = json.detect_encoding(binary.read(4))
    found: dict[str, Any] = {}
    wrong = ""
    with file.open(encoding=encoding, errors="surrogatepass", newline="") as text:
        reader = JsonReader(text)
        try:
            for name in reader.pairs():
                wrong = name
                if name == "images":
                    found[name] = list(map(_image_entry, reader.items()))
                elif name == "annotations":
                    found[name] = columns = Columns()
                    for item in reader.items():
                        columns.add(item)
                elif name == "categories":
                    found[name] = list(reader.items())
                else:
                    reader.value()
            wrong = next((name for name in LISTS if name not in found), "")
        except NotInFormat:
            wrong = wrong or LISTS[0]
        except (ValueError, RecursionError) as error:  # no JSON, or no text at all
            raise ValueError(f"{file} is not valid JSON: {error}") from error
    if wrong:
        raise ValueError(
            f"{file} must be in COCO's format, an object with the lists images, annotations and"
            f" categories of objects; {wrong} is not there or no such list"
        )
    return Content(file, found["images"], found["annotations"], found["categories"])


def _image_entry(item: dict[str, Any]) -> ImageEntry:
    name = item.get("file_name")
    if name is None:  # LVIS has addresses alone
        name = item.get("coco_url")
    name = name if isinstance(name, str) else None
    id_, height, width = (as_id(item.get(key)) for key in ("id", "height", "width"))
    return ImageEntry(id_, name, height, width)


class NotInFormat(Exception):
    """Valid JSON, but no object with lists of objects."""


class JsonReader:
    """Reads the object of a JSON file value by value, so that it need not fit into memory."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at = "", 0
        self._before = 0  # characters before the text
        self._scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]

    def pairs(self) -> Iterator[str]:
        """The keys of the object, after each of which its value is to be read."""
        if self._peek() != "{":
            self.value()  # may be no JSON at all
            raise NotInFormat
        self._at += 1
        if self._peek() == "}":
            self._at += 1
        else:
            yield from self._rest_of_pairs()
        if self._peek():
            self._fail("Extra data")

    def _rest_of_pairs(self) -> Iterator[str]:
        while True:
            if self._peek() != '"':
                self._fail("Expecting property name enclosed in double quotes")
            key = self.value()
            self._take(":")
            yield key
            if self._peek() == "}":
                self._at += 1
                return
            self._take(",")

    def items(self) -> Iterator[dict[str, Any]]:
        """The objects of the list that comes next."""
        if self._peek() != "[":
            self.value()
            raise NotInFormat
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            item = self.value()
            if not isinstance(item, dict):
                raise NotInFormat
            yield item
            if self._peek() == "]":
                self._at += 1
                return
            self._take(",")

    def value(self) -> Any:
        """The value that comes next."""
        self._peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except StopIteration as stop:
                if not self._is_cut(stop.value, "") or not self._more():
                    self._at = stop.value
                    self._fail("Expecting value")
            except json.JSONDecodeError as error:
                if not self._is_cut(error.pos, error.msg) or not self._more():
                    self._at = error.pos
                    self._fail(error.msg)
            else:
                # A number that ends where the text does may go on.
                if end < len(self._text) or not self._more():
                    self._at = end
                    return value

    def _is_cut(self, at: int, message: str) -> bool:
        """Whether an error may come from the end of the text that was read so far."""
        return at > len(self._text) - 20 or message.startswith("Unterminated string")

    def _peek(self) -> str:
        """The next character that is no white space; an empty text at the end."""
        while True:
            text, at = self._text, self._at
            while at < len(text) and text[at] in " \t\n\r":
                at += 1
            self._at = at
            if at < len(text):
                return text[at]
            if not self._more():
                return ""

    def _take(self, character: str) -> None:
        if self._peek() != character:
            self._fail(f"Expecting {character!r} delimiter")
        self._at += 1

    def _more(self) -> bool:
        rest = self._text[self._at :]
        chunk = self._file.read(max(1 << 20, len(rest)))
        self._before += self._at
        self._text, self._at = rest + chunk, 0
        return bool(chunk)

    def _fail(self, message: str) -> None:
        raise ValueError(f"{message} at character {self._before + self._at}")
