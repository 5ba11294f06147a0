"""Names of images as annotation tools write them, and the files that they stand for."""

import os
import unicodedata

import pytest

from file_names import ImageFolder


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "my cell.png", "Übung.png", "sub/b.png", "d%20e.png", "../out.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", "a.png"),
        ("sub/b.png", "sub/b.png"),
        ("sub\\b.png", "sub/b.png"),
        ("d%20e.png", "d%20e.png"),
        ("../../media/upload/4/a.png", "a.png"),
        ("C:\\Users\\someone\\a.png", "a.png"),
        ("/data/local-files/?d=photos/a.png", "a.png"),
        ("http://images.org/val/a.png?size=full", "a.png"),
        ("A.PNG", "a.png"),
        ("my%20cell.png", "my cell.png"),
        ("x%2Fmy%20cell.png", "my cell.png"),
        (unicodedata.normalize("NFD", "Übung.png"), "Übung.png"),
        ("ÜBUNG.png", "Übung.png"),
        ("b.png", None),
        ("", None),
        (".", None),
        ("sub", None),
        ("a\0.png", None),
        ("\ud800.png", None),
        ("x" * 5000, None),
    ],
)
def test_what_a_name_stands_for(folder, name, expected):
    assert ImageFolder(folder).find(name) == (expected and folder / expected)


def test_two_files_or_two_names_that_match_are_not_guessed(folder):
    (folder / "case.png").touch()
    (folder / "CASE.png").touch()
    images = ImageFolder(folder)
    assert images.find("Case.png") is None
    assert images.hint("Case.png") == "CASE.png and case.png match"
    names = ["left/a.png", "right/a.png", "x/my cell.png", "a.png"]
    found = images.find_all(names)
    assert found == [None, None, folder / "my cell.png", folder / "a.png"]
    assert "other images of the file do, too" in images.hint("left/a.png")
    assert images.find_all(["a.png", "a.png"]) == [folder / "a.png"] * 2  # as they stand


def test_hints_for_what_is_missing(folder):
    images = ImageFolder(folder)
    assert images.hint("b.png") == "b.png lies in sub/"
    assert images.hint("a.jpg") == "a.png is there"
    assert images.hint("nothing.png") == ""
    assert ImageFolder(folder / "nowhere").hint("a.png") == ""


@pytest.mark.parametrize("start", ["{}", "{}/../photos", "."])
def test_what_lies_outside_of_the_folder(folder, monkeypatch, start):
    monkeypatch.chdir(folder)
    images = ImageFolder(start.format(folder))
    for name in ("a.png", "sub/b.png", "sub/../a.png", "a..png", str(folder / "a.png")):
        assert not images.is_outside(name)
    for name in ("../out.png", "..\\out.png", "sub/../../out.png", str(folder.parent / "out.png")):
        assert images.is_outside(name)
    assert images.find("../out.png").samefile(folder.parent / "out.png")


def test_a_pipe_is_no_image(folder):
    os.mkfifo(folder / "pipe.png")
    assert ImageFolder(folder).find("pipe.png") is None
