"""README.md and docs/: the code runs, the links lead somewhere, the options exist.

The blocks of a page run from top to bottom, in one namespace and one folder, as a reader types
them. The network is a tiny one, the data are a few generated images, and numbers of epochs, steps
and images are smaller than in the text; see SMALLER.
"""

import argparse
import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TinyNetwork
from PIL import Image
from test_video import write_clip

import coco
import config as configlib
import model as modellib
import utils
import visualize
import weights
from coco import CocoConfig
from config import Config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

# Blocks that do not run, by the word after their language: why.
NOT_RUN = {
    "matterport": "needs TensorFlow 1 and Matterport's library",
    "parquet": "needs results of a Ray cluster; test_ray_detect.py runs it",
    "exported": "needs what takes a minute to export; test_export.py does the same",
}
# Commands that are parsed and not run, by what they contain: why.
ONLY_PARSED = {
    "--dataset=/path/to/coco": "needs MS COCO",
    "test2017": "needs MS COCO",
    "--dataset DIR": "needs the photographs of BBBC038",
    "weights.py download": "needs the network",
    "rtsp://": "needs a camera",
    "weights.py export": "takes a minute",
    "samples/onnx_detect.py": "needs what weights.py export writes",
    "--model torchvision": "needs the network",
    "samples/shapes.py train": "takes an hour",
    "samples/ray_detect.py": "starts Ray, which takes half a minute",
    "--logs=job7": "needs MS COCO",
    "--augment flip": "takes minutes",
    "benchmarks/": "takes minutes",
}
# What the text says and what is run.
SMALLER = {
    r"(epochs[= ])(\d+)0\b": r"\g<1>\g<2>",
    r"--steps \d+": "--steps 2",
    r"(?m)(coco.py train --images photos .*--model coco)$": r"\1 --epochs 1 --steps 2",
    r"STEPS_PER_EPOCH = \d+": "STEPS_PER_EPOCH = 2",
    r'from_weights\("torchvision_v2"': 'from_weights("shapes"',
    r"ShapesDataset\(\d+": "ShapesDataset(4",
    r"range\(10\)": "range(2)",
}
# Words in capitals that are no options of Config.
NO_OPTIONS = {"CUDA_HOME", "WITH_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "PATH", "NAME", "MPS"}


# --- Reading the pages ---------------------------------------------------------------------------


def blocks(page):
    """(line of the first line, language, mark, text) of each fenced block."""
    fence, text = None, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```") and fence is None:
            language, _, mark = line[3:].partition(" ")
            fence, text = (number + 1, language, mark), []
        elif line.startswith("```"):
            yield (*fence, "\n".join(text))
            fence = None
        else:
            text.append(line)
    assert fence is None, f"{page.name}: the block of line {fence[0]} does not end"


def prose(page):
    """The lines outside of blocks, and an empty one in place of each block."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
            lines.append("")
        elif not inside:
            lines.append(line)
    return lines


def tables(page):
    """Runs of lines that begin with a bar."""
    table = []
    for line in [*prose(page), ""]:
        if line.startswith("|"):
            table.append(line)
        elif table:
            yield table
            table = []


def cells(row):
    return [cell.strip() for cell in re.sub(r"`[^`]*`", "", row).strip("|").split("|")]


def spans(page):
    """Inline code, without the columns that quote Matterport and the port."""
    lines, foreign = [], False
    for line in prose(page):
        if re.match(r"\| (Matterport|the port) \|", line):
            foreign = True
        elif not line.startswith("|"):
            foreign = False
        lines.append(re.sub(r"^\|.*?\| (?=[^|]+\|$)", "", line) if foreign else line)
    return re.findall(r"`([^`]+)`", " ".join(lines))


def commands(text):
    """(environment, words) of each command of a shell block, or of one in a line of prose."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        names = []
        while words and re.match(r"[A-Z_]+=", words[0]):
            names.append(words.pop(0).partition("=")[0])
        if words:
            yield names, words


# --- The folder in which a reader works ----------------------------------------------------------


def photo(path, rng, size=(96, 128)):
    """A noisy image with two bright discs; their masks [H, W, 2]."""
    y, x = np.mgrid[: size[0], : size[1]]
    masks = np.stack([np.hypot(y - 40, x - cx) < 18 for cx in (35, 90)], axis=2)
    image = rng.integers(0, 80, (*size, 3), dtype=np.uint8) + 150 * masks.any(axis=2)[..., None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path)
    return masks


def write(path, content):
    path.write_text(json.dumps(content))


def outline(cx, cy=40, radius=18):
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    return np.stack([cx + radius * np.cos(angle), cy + radius * np.sin(angle)], axis=1)


def via_region(cx, **attributes):
    x, y = outline(cx).T.tolist()
    shape = {"name": "polygon", "all_points_x": x, "all_points_y": y}
    return {"shape_attributes": shape, "region_attributes": attributes}


def via_file(paths, **attributes):
    regions = [via_region(cx, **attributes) for cx in (35, 90)]
    return {p.name: {"filename": p.name, "size": 1, "regions": regions} for p in paths}


def coco_file(paths):
    size = {"height": 96, "width": 128}
    images = [{"id": i, "file_name": path.name, **size} for i, path in enumerate(paths)]
    annotations = [
        {"id": 2 * i + k, "image_id": i, "category_id": 1, "iscrowd": 0}
        | {"segmentation": [outline(cx).ravel().tolist()]}
        for i in range(len(paths))
        for k, cx in enumerate((35, 90))
    ]
    categories = [{"id": 1, "name": "disc"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_keras(model, path):
    """The weights of a model with one block in each stage, as Matterport's library saves them."""
    names = dict(weights.KERAS_LAYERS)
    for stage in "2345":
        for branch, part in (("1", "downsample.{}"), ("2a", "{}1"), ("2b", "{}2"), ("2c", "{}3")):
            for layer, kind in (("res", "0" if branch == "1" else "conv"), ("bn", "bn")):
                kind = "1" if branch == "1" and layer == "bn" else kind
                names[f"{layer}{stage}a_branch{branch}"] = f"fpn.C{stage}.0.{part.format(kind)}"
    state = model.state_dict()
    kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean"}
    kinds["running_var"] = "moving_variance"
    with h5py.File(path, "w") as file:
        for layer, module in names.items():
            group, keys = file.create_group(layer), []
            is_norm = f"{module}.running_mean" in state
            for kind, norm in kinds.items():
                array = state.get(f"{module}.{kind}")
                if array is None:
                    continue
                order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
                key = f"{layer}/{norm if is_norm else ('kernel', 'bias')[kind == 'bias']}:0"
                group.create_dataset(key, data=array.numpy().transpose(order))
                keys.append(key.encode())
            group.attrs["weight_names"] = keys


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """What the pages take for granted: images, annotations and the published weights."""
    options = {name: value for name, value in vars(TinyNetwork).items() if name.isupper()}
    options |= {"STEPS_PER_EPOCH": 2, "VALIDATION_STEPS": 1, "NUM_WORKERS": 0}
    options |= {"PRE_NMS_LIMIT": 300, "POST_NMS_ROIS_TRAINING": 60, "TRAIN_ROIS_PER_IMAGE": 32}
    options |= {"POST_NMS_ROIS_INFERENCE": 40, "DETECTION_MAX_INSTANCES": 10}
    options |= {"IMAGENET_MODEL_PATH": str(tmp_path / "imagenet.pth")}
    for name, value in options.items():
        if name != "NAME":
            monkeypatch.setattr(Config, name, value)
    # Curves of losses would take half of the time; test_visualize.py draws them.
    monkeypatch.setattr(visualize, "plot_loss", lambda *arguments, **options: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASK_RCNN_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is slower on several

    rng = np.random.default_rng(0)
    for name in (
        "street.jpg",
        "holiday/beach.jpg",
        "cells.png",
        "new.jpg",
        "mine.jpg",
        "party.jpg",
        "city.tif",
        "swarm.jpg",
    ):
        photo(tmp_path / name, rng)
    write_clip(tmp_path / "clip.mp4", [utils.load_image(tmp_path / "new.jpg")] * 4)
    photos = [tmp_path / "photos" / f"{i}.png" for i in range(1, 6)]
    for path in photos:
        photo(path, rng)
        shapes = [{"label": "disc", "points": outline(cx).tolist()} for cx in (35, 90)]
        write(path.with_suffix(".json"), {"shapes": shapes, "imagePath": path.name})
    for name, chosen in (("photos", photos), ("train", photos[:3]), ("val", photos[3:])):
        write(tmp_path / f"{name}.json", coco_file(chosen))
    write(tmp_path / "via_project.json", via_file(photos, kind="disc"))
    for i in range(5):
        masks = photo(tmp_path / "cells" / "images" / f"{i}.png", rng)
        labels = tmp_path / "cells" / "labels" / f"{i}.png"
        labels.parent.mkdir(exist_ok=True)
        Image.fromarray((masks @ [1, 2]).astype(np.uint8)).save(labels)
    for part in ("train", "val"):
        balloons = [tmp_path / "balloon" / part / f"{i}.jpg" for i in range(3)]
        for path in balloons:
            photo(path, rng)
        write(balloons[0].with_name("via_region_data.json"), via_file(balloons))

    torch.manual_seed(0)
    model = modellib.MaskRCNN(CocoConfig())
    write_keras(model, tmp_path / "mask_rcnn_coco.h5")
    (tmp_path / "logs" / "mine20260101T120000").mkdir(parents=True)
    weights.save_weights(model, tmp_path / "logs" / "mine20260101T120000" / "best.pth")
    state = model.fpn.state_dict(prefix="fpn.")
    torch.save({k: v for k, v in state.items() if k.startswith("fpn.C")}, "imagenet.pth")
    yield tmp_path
    torch.set_num_threads(threads)


# --- Running the blocks --------------------------------------------------------------------------


class Parsed(BaseException):
    """A program's command line was understood."""


def call(program, arguments, monkeypatch):
    """Runs a program of ours in this process; returns its exit status."""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    try:
        return module.main() or 0
    except SystemExit as leave:
        return leave.code or 0


def parse(program, arguments):
    """Has a program parse its command line, and no more."""
    source = (ROOT / program).read_text()
    if "Parser" not in source:  # takes no arguments
        assert not arguments
        return
    original = argparse.ArgumentParser.parse_args

    def parse_only(self, *arguments, **options):
        original(self, *arguments, **options)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        try:
            status = call(program, arguments, patch)
        except Parsed:
            return
    assert status == 0, f"{program} does not understand {arguments}"  # 0: --help


def check_pip(words):
    assert words[0] == "install"
    known = (ROOT / "pyproject.toml").read_text() + (ROOT / "Makefile").read_text()
    for word in words[1:]:
        if word.startswith("."):
            assert all(f"\n{extra} = [" in known for extra in re.findall(r"\w+", word))
        elif not word.startswith("-"):
            assert re.match(r"\w+", word)[0] in known, word


def run_command(names, words, monkeypatch, only_parse=False):
    """Runs one command of a page, or checks what can be checked of it."""
    assert all(name in (ROOT / "setup.py").read_text() for name in names)
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "pip":
        check_pip(rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        place = rest.index("--")
        get_args_parser().parse_args([*rest[:place], "script"])
        parse(rest[place + 1], rest[place + 2 :])
    elif program.endswith("python") and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".py"))
    elif program == "python":
        parse(rest[0], rest[1:])
        text = " ".join(words)
        if not only_parse and not any(part in text for part in ONLY_PARSED):
            # logs/coco.../best.pth is that of the newest run.
            found = [max(Path().glob(w.replace("...", "*"))) if "..." in w else w for w in rest]
            assert call(rest[0], map(str, found[1:]), monkeypatch) == 0, text
    else:
        raise AssertionError(f"{program} is none of the programs that this test knows")


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_page_runs(name, workplace, monkeypatch, capsys):
    page, namespace = ROOT / name, {}
    for line, language, mark, text in blocks(page):
        where = f"{name}:{line}"
        for pattern, smaller in SMALLER.items():
            text = re.sub(pattern, smaller, text)
        assert mark in ("", *NOT_RUN), f"{where}: NOT_RUN must say why {mark!r} does not run"
        if mark:
            ast.parse(text)
        elif language == "python":
            # The empty lines make line numbers in tracebacks those of the page.
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)
        elif language == "sh":
            for names, words in commands(text):
                run_command(names, words, monkeypatch)
        else:
            raise AssertionError(f"{where}: blocks are python or sh, not {language!r}")


def test_what_is_left_out_or_made_smaller_is_there():
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", "")
    for part in [*ONLY_PARSED, *(f"```python {mark}\n" for mark in NOT_RUN)]:
        assert part in text
    for pattern in SMALLER:
        assert re.search(pattern, text), pattern


# --- The rest of the pages -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_prose_are_understood(name, monkeypatch):
    for span in spans(ROOT / name):
        if re.match(r"(\.venv/bin/)?python |make \w|pip install|torchrun .* -- ", span):
            for names, words in commands(span):
                run_command(names, words, monkeypatch, only_parse=True)


def anchors(page):
    headings = [line.lstrip("#").strip() for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_every_page_and_picture_is_linked():
    text = "\n".join(page.read_text() for page in PAGES)
    for name in NAMES[1:]:
        assert f"]({name}" in PAGES[0].read_text(), f"the README does not lead to {name}"
    for picture in (ROOT / "assets").glob("coins*.png"):
        assert picture.name in text


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_tables_are_whole(page):
    for table in tables(page):
        # A blank line within a table leaves rows without a head: GitHub shows them as text.
        assert len(table) > 2, table
        assert re.fullmatch(r"\|( *:?-+:? *\|)+", table[1]), table[:2]
        assert len({len(cells(row)) for row in table}) == 1, table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_fenced(page):
    assert not [line for line in prose(page) if line.startswith("    ") and line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    for span in spans(page):
        names = re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", span)
        if re.fullmatch(r"[A-Z]{3,}", span):
            names.append(span)
        for name in set(names) - NO_OPTIONS - configlib.REPLACED.keys():
            assert hasattr(Config, name) or hasattr(coco, name), f"{name} is no option of Config"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_prose_exist(page):
    modules = {path.stem for path in ROOT.glob("*.py")} - {"setup", "model"}
    modules |= {"nms", "roialign", "winograd"}
    programs = [*ROOT.glob("*.py"), *ROOT.glob("samples/*.py"), *ROOT.glob("benchmarks/*.py")]
    sources = "\n".join(path.read_text() for path in programs)
    for span in spans(page):
        for module, name in re.findall(r"(?<![\w/.])(\w+)\.(\w+)", span):
            if module in modules and name not in ("py", "json", "jsonl"):
                assert hasattr(importlib.import_module(module), name), span
        if option := re.match(r"--[a-z-]+", span):
            assert f'"{option[0]}"' in sources, span


def test_results_are_those_of_the_weights_that_ship():
    text = (ROOT / "README.md").read_text()
    for name in ("shapes", "nuclei"):
        card = json.loads((ROOT / "samples" / f"{name}.json").read_text())
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert f"mask AP {card['segm_AP']:.3f}, AP50 {card['segm_AP50']:.3f}" in row
        size = (ROOT / "samples" / f"{name}.pth").stat().st_size
        assert f"{size / 1e6:.0f} MB" in row


def test_training_in_matterports_words_names_ours():
    model = modellib.MaskRCNN(TinyNetwork(NUM_CLASSES=2))
    with pytest.raises((AttributeError, TypeError), match="train_model") as error:
        model.train(utils.Dataset(), utils.Dataset(), learning_rate=0.1, epochs=1, layers="heads")
    assert "\n" not in str(error.value)
