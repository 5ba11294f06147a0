"""The frame around every command: its arguments, its messages and its exit status.

def count(args):
    ...

def main(arguments=None):
    parser = cli.Parser(prog="cells.py", description="Counts cells.")
    parser.add_argument("images", nargs="+", help="photographs")
    cli.add_device(parser)
    parser.set_defaults(run=count)
    return cli.run(parser, arguments)

if __name__ == "__main__":
    sys.exit(main())
"""

import argparse
import contextlib
import logging
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch

import distributed

# What goes wrong without a fault in the program: files, values, training and memory.
EXPECTED = (OSError, ValueError, FloatingPointError, MemoryError, torch.OutOfMemoryError)


class Parser(argparse.ArgumentParser):
    """Shows longer texts as they are written, and answers wrong arguments with one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        program = self.prog.split()[0]  # that of a subcommand is "coco.py train"
        self.exit(2, f"{program}: {message}; see {self.prog} --help\n")


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    check: Callable[[argparse.Namespace], None] | None = None,
) -> int:
    """Runs a command.

    Under torchrun a command with an option --device joins the other processes, of which the main
    one alone logs.

    Args:
        parser: gives `run`, the function to call with the arguments; see its set_defaults.
        arguments: None for those of the command line.
        check: raises ValueError for arguments that do not go together.

    Returns:
        The exit status: what the function returns, or 0 for None; 2 after an error that its user
        can mend, of which one line is printed; 130 after Ctrl-C. Other errors are the program's
        own and are raised.
    """
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        if check is not None:
            check(args)
        with _joined(args):
            return args.run(args) or 0
    except KeyboardInterrupt as interrupt:
        print(f"{parser.prog}: interrupted: {interrupt}".rstrip(": "), file=sys.stderr)
        return 130
    except EXPECTED as error:
        print(f"{parser.prog}: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: BaseException) -> str:
    """The first line of an error's message, printable.

    An error of a worker process carries its traceback in the message: of it the last line.
    """
    text = str(error)
    if text.startswith("Caught "):
        # The lines of a traceback are indented; those of the errors are "ValueError: ...".
        text = next(reversed(re.findall(r"^[\w.]+: (.*)", text, re.MULTILINE)), text)
    return printable(next(iter(text.splitlines()), "")) or type(error).__name__


def printable(text: str) -> str:
    """A text of a file as a terminal may show it: control characters and surrogates escaped."""
    return "".join(
        ascii(character)[1:-1] if unicodedata.category(character) in ("Cc", "Cs") else character
        for character in text
    )


@contextlib.contextmanager
def resumable(model: Any, option: str) -> Iterator[None]:
    """Around training: after Ctrl-C the last message tells what is saved, and how to go on.

    Args:
        model: a MaskRCNN.
        option: of the command, which lets it go on.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        folder = model.log_dir
        saved = str(interrupt)
        if not saved and folder is not None and any(folder.glob("*.pth")):
            saved = f"the last checkpoint is in {folder}"
        message = f"{saved}; go on with {option}" if saved else "before the first checkpoint"
        raise KeyboardInterrupt(message) from None


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of optional packages: tells what to install where one is missing.

    Args:
        name: one of pyproject.toml's optional dependencies, such as "video".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f'pip install -e ".[{name}]"'
        raise ValueError(f"this needs the package {error.name}; install it with {remedy}") from None


@contextlib.contextmanager
def _joined(args: argparse.Namespace) -> Iterator[None]:
    """Makes the torch.device of this process of args.device, where there is such an option."""
    if not hasattr(args, "device"):
        yield
        return
    with distributed.join(args.device) as args.device:
        if not distributed.is_main():
            logging.disable(logging.WARNING)
        yield


# --- Options -------------------------------------------------------------------------------------


def add_device(parser: argparse._ActionsContainer) -> None:
    """Adds --device; in the function that run() calls, args.device is a torch.device."""
    text = "cpu, cuda, cuda:1, ...; default: cuda where there is one"
    parser.add_argument("--device", type=device_name, help=text)


def whole(least: int) -> Callable[[str], int]:
    """The type of options that are whole numbers from `least`."""

    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text!r}")
        return value

    return parse


def names(text: str) -> list[str]:
    """The type of options that are names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return found


def positive(text: str) -> float:
    """The type of options that are numbers above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def share(text: str) -> float:
    """The type of options that are numbers from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def bit_depth(text: str) -> int | str:
    """The type of options that say how files of more than 8 bits are scaled."""
    if text == "auto":
        return text
    if not (text.isdecimal() and 8 <= int(text) <= 16):
        raise argparse.ArgumentTypeError(f"must be 8 to 16 or auto, got {text!r}")
    return int(text)


def add_bit_depth(group: Any) -> None:
    """The option --bit-depth, as the IMAGE_BIT_DEPTH of Config."""
    text = "bits used of 16 in image files, 8 to 16, or auto: from the image's own values"
    group.add_argument(
        "--bit-depth", dest="IMAGE_BIT_DEPTH", type=bit_depth, metavar="N", help=text
    )


def tile(text: str) -> tuple[int, int]:
    """The type of options that are a size: HEIGHTxWIDTH, or one number for a square."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be pixels, as 1024 or 768x1024, got {text!r}")
    return int(sides[0]), int(sides[-1])


def overlap(text: str) -> float:
    """The type of options that are pixels, or a share below 1."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be pixels or a share below 1, got {text!r}")
    return value


def numbers(text: str) -> list[float]:
    """The type of options that are numbers above 0 with commas between them."""
    return [positive(part) for part in text.split(",")]


def flips(text: str) -> list[str]:
    """The type of options that say how images are mirrored."""
    found = names(text)
    if not {*found} <= {"horizontal", "vertical", "both"}:
        raise argparse.ArgumentTypeError(f"must be horizontal, vertical or both, got {text!r}")
    return found


def add_views(group: Any) -> None:
    """The options that say in what parts and versions an image is looked at, as of Config."""
    text = "look at large images in windows of this size: HEIGHTxWIDTH, or one number for a square"
    group.add_argument("--tile", dest="DETECTION_TILE", type=tile, metavar="HxW", help=text)
    text = "what windows share, at least the size of an object: pixels, or a share below 1"
    group.add_argument("--overlap", dest="DETECTION_OVERLAP", type=overlap, metavar="X", help=text)
    text = (
        "enlarge images for small objects (2) or shrink them for large ones (0.5); several: average"
    )
    group.add_argument("--scale", dest="DETECTION_SCALES", type=numbers, metavar="X,Y", help=text)
    text = "average with mirror images: horizontal, vertical, both, or several with commas"
    group.add_argument("--flip", dest="DETECTION_FLIPS", type=flips, metavar="A,B", help=text)


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of Config that a command line sets: those in capitals."""
    return {k: v for k, v in vars(args).items() if k.isupper() and v is not None}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def boolean(text: str) -> bool:
    """The type of options that are true or false."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return words[text.lower()]


def device_name(text: str) -> str:
    """The type of options that name a device of torch which is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, cuda:1, ..., got {text!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no CUDA device here for {text!r}")
    return text
