"""The frame around the commands: what they print and return when something goes wrong."""

import argparse
import contextlib
import logging
import re

import pytest
import torch
from torch.utils.data import DataLoader

import cli
import coco
import demo
import distributed
import weights
from samples import color_splash, custom, nuclei, ray_detect, shapes

COMMANDS = {"coco": coco, "demo": demo, "weights": weights}
COMMANDS |= {"color_splash": color_splash, "custom": custom, "nuclei": nuclei, "shapes": shapes}
COMMANDS["ray_detect"] = ray_detect


def outcome(function, arguments=(), **options):
    """Runs a command that does what the function does."""
    parser = cli.Parser(prog="cells.py", description="Counts cells.")
    parser.add_argument("--count", type=cli.whole(1), default=1)
    parser.set_defaults(run=lambda args: function())
    return cli.run(parser, list(arguments), **options)


def throw(error):
    def function():
        raise error

    return function


# --- Errors --------------------------------------------------------------------------------------


class OwnError(ValueError):
    """As those that derive from the expected ones."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--x must be 1, got 2"), "--x must be 1, got 2"),
        (OwnError("two"), "two"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (FileNotFoundError("no file x"), "no file x"),
        (ConnectionError("cannot download x"), "cannot download x"),
        (FloatingPointError("mrcnn_mask_loss is nan"), "mrcnn_mask_loss is nan"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory."),
        (ValueError("first\nsecond\nthird"), "first"),
        (ValueError(), "ValueError"),
        (ValueError("\n"), "ValueError"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_status_2(error, line, capsys):
    assert outcome(throw(error)) == 2
    captured = capsys.readouterr()
    assert captured.err == f"cells.py: {line}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    "kind", [TypeError, RuntimeError, KeyError, AttributeError, AssertionError]
)
def test_an_error_of_the_program_keeps_its_traceback(kind, capsys):
    with pytest.raises(kind, match="mistake") as caught:
        outcome(throw(kind("mistake")))
    assert caught.traceback[-1].name == "function"
    assert capsys.readouterr().err == ""


class Broken(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise KeyError("within")
        except KeyError as error:
            raise self.kind("image 7 cannot be used: KeyError: 'within'") from error


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_an_error_of_a_worker_is_reduced_to_its_message(capsys):
    assert outcome(lambda: list(DataLoader(Broken(OwnError), num_workers=1))) == 2
    assert capsys.readouterr().err == "cells.py: image 7 cannot be used: KeyError: 'within'\n"
    with pytest.raises(TypeError, match="Caught TypeError in DataLoader worker"):
        outcome(lambda: list(DataLoader(Broken(TypeError), num_workers=1)))


def test_the_status_is_what_the_function_returns():
    assert outcome(lambda: None) == 0
    assert outcome(lambda: 0) == 0
    assert outcome(lambda: 1) == 1


def test_wrong_arguments_are_one_line_that_names_the_help(capsys):
    with pytest.raises(SystemExit, match="2"):
        outcome(lambda: None, ["--count=0"])
    message = "cells.py: argument --count: must be a whole number from 1, got '0'"
    assert capsys.readouterr().err == f"{message}; see cells.py --help\n"
    with pytest.raises(SystemExit, match="2"):
        coco.main(["train", "--model=coco", "--epochs=x"])
    error = capsys.readouterr().err
    assert error.startswith("coco.py: argument --epochs: ")
    assert error.endswith("; see coco.py train --help\n")
    assert error.count("\n") == 1


def test_arguments_are_checked_before_anything_starts(capsys):
    def check(args):
        assert args.count == 3
        raise ValueError("three is too many")

    def function():
        raise AssertionError("started")

    assert outcome(function, ["--count=3"], check=check) == 2
    assert capsys.readouterr().err == "cells.py: three is too many\n"


# --- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "line"), [("", "interrupted"), ("x", "interrupted: x")])
def test_ctrl_c_is_status_130(text, line, capsys):
    error = KeyboardInterrupt(text) if text else KeyboardInterrupt()
    assert outcome(throw(error)) == 130
    assert capsys.readouterr().err == f"cells.py: {line}\n"


@pytest.mark.parametrize(
    ("message", "saved", "line"),
    [
        ("saved x.pth", True, "saved x.pth; go on with --resume"),
        ("", True, "the last checkpoint is in {}; go on with --resume"),
        ("", False, "before the first checkpoint"),
    ],
)
def test_after_ctrl_c_in_a_training_it_says_how_to_go_on(message, saved, line, tmp_path, capsys):
    if saved:
        (tmp_path / "mask_rcnn_a_0001.pth").touch()

    def function():
        with cli.resumable(argparse.Namespace(log_dir=tmp_path), "--resume"):
            raise KeyboardInterrupt(message)

    assert outcome(function) == 130
    assert capsys.readouterr().err == f"cells.py: interrupted: {line.format(tmp_path)}\n"


# --- Device and processes ------------------------------------------------------------------------


def devices(monkeypatch, arguments, is_main=True):
    """What the command sees of --device, and what distributed.join was given."""
    given, seen = [], []

    @contextlib.contextmanager
    def join(device):
        given.append(device)
        yield torch.device("cpu", 3)
        given.append("left")

    monkeypatch.setattr(distributed, "join", join)
    monkeypatch.setattr(distributed, "is_main", lambda: is_main)
    parser = cli.Parser(prog="cells.py")
    cli.add_device(parser)
    parser.set_defaults(run=lambda args: seen.append(args.device))
    assert cli.run(parser, arguments) == 0
    return given, seen


def test_a_command_with_a_device_joins_the_other_processes(monkeypatch):
    given, seen = devices(monkeypatch, ["--device=cpu"])
    assert given == ["cpu", "left"]
    assert seen == [torch.device("cpu", 3)]
    assert devices(monkeypatch, [])[0] == [None, "left"]


def test_a_command_without_a_device_joins_nobody(monkeypatch):
    monkeypatch.setattr(distributed, "join", throw(AssertionError("joined")))
    assert outcome(lambda: None) == 0


def test_the_main_process_alone_logs(monkeypatch):
    try:
        devices(monkeypatch, [], is_main=True)
        assert logging.root.manager.disable == logging.NOTSET
        devices(monkeypatch, [], is_main=False)
        assert not logging.getLogger("coco").isEnabledFor(logging.WARNING)
        assert logging.getLogger("coco").isEnabledFor(logging.ERROR)
    finally:
        logging.disable(logging.NOTSET)


# --- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (cli.whole(0), "0", 0),
        (cli.whole(1), "12", 12),
        (cli.positive, "1e-3", 0.001),
        (cli.share, "0", 0.0),
        (cli.share, "1", 1.0),
        (cli.boolean, "Yes", True),
        (cli.boolean, "0", False),
        (cli.device_name, "cpu", "cpu"),
    ],
)
def test_a_good_value_is_taken(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (cli.whole(0), ["-1", "1.0", "", "x", "²"]),
        (cli.whole(1), ["0"]),
        (cli.positive, ["0", "-1", "nan", "inf", "x"]),
        (cli.share, ["-0.1", "1.1", "nan", "x"]),
        (cli.boolean, ["maybe", ""]),
        (cli.device_name, ["toaster", "cuda:99", ""]),
    ],
)
def test_a_wrong_value_is_told(kind, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
            kind(text)


# --- All commands --------------------------------------------------------------------------------


def parsers(monkeypatch, module):
    """The parser of a command and those of its subcommands."""
    found = []
    monkeypatch.setattr(cli, "run", lambda parser, *rest: found.append(parser) or 7)
    assert module.main([]) == 7  # and what it returns is the exit status
    monkeypatch.undo()
    (parser,) = found
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_frame_and_a_help_for_each_option(monkeypatch, name):
    for parser in parsers(monkeypatch, COMMANDS[name]):
        assert isinstance(parser, cli.Parser)
        assert parser.prog.split()[0] == f"{name}.py"
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, action
        parser.format_help()  # a stray % would be an error


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_can_be_typed(monkeypatch, name):
    parser, *subparsers = parsers(monkeypatch, COMMANDS[name])
    text = "\n".join(f"{p.description}\n{p.epilog}" for p in (parser, *subparsers))
    lines = text.replace("\\\n", " ").splitlines()
    examples = [line.partition("#")[0].split() for line in lines if f"{name}.py" in line]
    assert len(examples) >= 2
    for example in examples:
        start = next(i for i, word in enumerate(example) if word.endswith(f"{name}.py"))
        assert example[0] in ("python", "torchrun")
        parser.parse_args(example[start + 1 :])


def test_what_a_terminal_would_obey_is_escaped_in_errors():
    error = ValueError("no file a\x1b[2J\ud800 \u00fc\u200d.png")
    assert cli.one_line(error) == "no file a\\x1b[2J\\ud800 \u00fc\u200d.png"


def test_names_have_commas_between_them():
    assert cli.names("cat, big dog") == ["cat", "big dog"]
    for text in ("", "cat,", "cat,cat"):
        with pytest.raises(argparse.ArgumentTypeError, match="names with commas"):
            cli.names(text)
