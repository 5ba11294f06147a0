"""Detection on a Ray cluster: rows and files, going on, and the loss of a machine."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, kill_all
from PIL import Image
from test_docs import blocks

import utils
import weights
from model import MaskRCNN
from samples import ray_detect
from samples.scenes import scene

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow, of the extra ray, is not installed")
pa = pytest.importorskip("pyarrow")

SETTINGS = {"model": "shapes", "sha256": "0"}
# In batches the sums of convolutions have another order, so their last bits differ.
ONE = {"IMAGES_PER_GPU": 1}
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0"}


def draw(folder, count):
    """Scenes of shapes as PNG files, one of them in a folder of its own; their names."""
    names = [f"{i:03d}.png" for i in range(count - 1)] + [f"more/{count - 1:03d}.png"]
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(1_000_000 + i).image).save(path)
    return names


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return folder, draw(folder, 4)


@pytest.fixture
def detector(photos, tmp_path):
    """What a process of the cluster holds; its files go to tmp_path."""
    file = weights.read_state_dict(weights.find_weights("shapes"))
    names = file.config["CLASS_NAMES"]
    job = ray_detect.Job(file, ONE, names, range(len(names)), photos[0], tmp_path, SETTINGS)
    return ray_detect.Detector(job)


def read(output):
    """All rows, as any reader of Parquet finds them."""
    import pyarrow.dataset

    return pyarrow.dataset.dataset(output, format="parquet").to_table().to_pylist()


@pytest.fixture(autouse=True)
def one_thread():
    """Another number of threads sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(rows, folder):
    """The rows say what detect() says of each image."""
    model = MaskRCNN.from_weights("shapes")
    found = 0
    for row in rows:
        image = utils.load_image(folder / row["file_name"])
        (result,) = model.detect([image], masks="rle")
        assert (row["height"], row["width"], row["error"]) == (*image.shape[:2], None)
        detections = row["detections"]
        assert [d["segmentation"] for d in detections] == result["masks"]
        assert [d["category_id"] for d in detections] == result["class_ids"].tolist()
        names = [model.config.CLASS_NAMES[i] for i in result["class_ids"]]
        assert [d["category"] for d in detections] == names
        assert np.array_equal(np.float32([d["score"] for d in detections]), result["scores"])
        boxes = np.reshape([d["bbox"] for d in detections], (-1, 4))
        y1, x1, y2, x2 = result["rois"].T
        assert np.array_equal(boxes.T, [x1, y1, x2 - x1, y2 - y1])
        found += len(detections)
    assert found > len(rows)


# --- Rows ----------------------------------------------------------------------------------------


def test_a_shard_is_a_file_of_a_row_for_each_image(detector, photos, tmp_path):
    folder, names = photos
    detector.make(names)
    (path,) = tmp_path.iterdir()
    assert path == ray_detect.shard_path(tmp_path, names)
    rows = read(tmp_path)
    assert [row["file_name"] for row in rows] == names
    check(rows, folder)
    assert ray_detect.take_stock(tmp_path, SETTINGS) == (set(names), 0)
    # Whoever is given the shard again, as after the loss of a machine, leaves it as it is.
    before = path.stat()
    detector.make(names)
    assert path.stat() == before


def test_an_image_that_cannot_be_used_is_a_row_that_says_why(detector, photos, tmp_path):
    folder, names = photos
    (folder / "bad.png").write_text("no image")
    try:
        detector.make(["bad.png", names[0], "gone.png", names[1]])
    finally:
        (folder / "bad.png").unlink()
    bad, one, gone, two = read(tmp_path)
    assert "bad.png cannot be used" in bad["error"]
    assert "gone.png" in gone["error"]
    for row in (bad, gone):
        assert (row["height"], row["width"], row["detections"]) == (None, None, [])
    check([one, two], folder)


def test_a_batch_that_is_too_large_is_done_one_by_one(detector, photos, tmp_path, monkeypatch):
    folder, names = photos
    detect, sizes = MaskRCNN.detect, []

    def limited(self, images, **options):
        sizes.append(len(images))
        if len(images) > 1 or (images[0] == utils.load_image(folder / names[2])).all():
            raise MemoryError("no room")
        return detect(self, images, **options)

    monkeypatch.setattr(MaskRCNN, "detect", limited)
    detector.model.config.IMAGES_PER_GPU = 4
    detector.make(names)
    monkeypatch.undo()
    assert sizes == [4, 1, 1, 1, 1]
    *rows, failed = sorted(read(tmp_path), key=lambda row: row["error"] is not None)
    assert (failed["file_name"], failed["error"]) == (names[2], "no room")
    check(rows, folder)


def test_batches_and_single_images_give_the_same_rows(detector, photos, tmp_path):
    _, names = photos
    one = list(detector.rows(names, ray_detect.Journal(tmp_path / "one.parquet")))
    detector.model.config.IMAGES_PER_GPU = 3
    three = list(detector.rows(names, ray_detect.Journal(tmp_path / "two.parquet")))
    assert [row["file_name"] for row in three] == [row["file_name"] for row in one] == names
    for row, other in zip(one, three, strict=True):
        scores, others = ([d["score"] for d in r["detections"]] for r in (row, other))
        assert scores == pytest.approx(others, abs=1e-5)


# --- Which images --------------------------------------------------------------------------------


def test_all_images_below_a_folder_or_those_of_a_list(photos, tmp_path):
    folder, names = photos
    (folder / ".hidden.png").touch()
    (folder / "notes.txt").touch()
    assert ray_detect.find_names(folder, None) == names
    text, listed = tmp_path / "names.txt", tmp_path / "images.json"
    text.write_text(f"\n{names[3]}\n {names[1]} \ngone.png\n{names[3]}\n")
    assert ray_detect.find_names(folder, text) == [names[3], names[1], "gone.png"], "each once"
    listed.write_text(json.dumps({"images": [{"id": 7, "file_name": names[2]}]}))
    assert ray_detect.find_names(folder, listed) == [names[2]]
    for content in ('{"images": [{"id": 7}]}', '{"images": [{"file_name": 7}]}', "[]", "[1]"):
        listed.write_text(content)
        with pytest.raises(ValueError, match=r"images.json must have a list images, each with a"):
            ray_detect.find_names(folder, listed)
    text.write_text("\n")
    with pytest.raises(ValueError, match=r"no images in .*names.txt"):
        ray_detect.find_names(folder, text)
    with pytest.raises(ValueError, match="no images in "):
        ray_detect.find_names(tmp_path, None)
    with pytest.raises(FileNotFoundError, match=r"no list .*gone.txt"):
        ray_detect.find_names(folder, tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match="no folder "):
        ray_detect.find_names(tmp_path / "gone", None)


def test_a_name_that_is_no_text_has_a_row(detector, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.png")).touch()
    (name,) = ray_detect.find_names(folder, None)
    assert name == "\\udcff.png"
    detector.make([name])
    (row,) = read([str(path) for path in tmp_path.glob("*.parquet")])
    assert row["file_name"] == name
    assert row["error"]


def test_what_is_left_is_cut_as_at_the_first_start():
    names = [str(i) for i in range(7)]
    assert list(ray_detect.shards(names, [], 3)) == [names[:3], names[3:6], names[6:]]
    assert list(ray_detect.shards(names, names[:3], 3)) == [names[3:6], names[6:]]
    assert list(ray_detect.shards(names, ["1", "6"], 3)) == [["0", "2"], names[3:6]]
    assert list(ray_detect.shards(names, names, 3)) == []


# --- Going on ------------------------------------------------------------------------------------


def write(output, rows, settings=SETTINGS):
    """A file of rows (name, error)."""
    table = pa.Table.from_pylist(
        [{"file_name": name, "error": error, "detections": []} for name, error in rows],
        ray_detect.schema(settings),
    )
    path = ray_detect.shard_path(output, [name for name, _ in rows])
    ray_detect.write_table(path, table)
    return path


def test_half_of_a_file_does_not_count(tmp_path, caplog):
    whole, cut = write(tmp_path, [("a", None)]), write(tmp_path, [("b", None)])
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    # What a process leaves that is killed while it writes.
    (tmp_path / f".{whole.name}.123.tmp").write_bytes(content[:100])
    (tmp_path / "other.parquet").write_bytes(b"of somebody else")
    assert ray_detect.take_stock(tmp_path, SETTINGS) == ({"a"}, 0)
    assert f"removed {cut}, which is damaged" in caplog.text
    assert not cut.exists()


def test_an_image_in_two_files_is_left_in_one(tmp_path):
    write(tmp_path, [("a", None), ("b", None)])
    write(tmp_path, [("b", None), ("c", "broken")])
    write(tmp_path, [("c", "broken")])
    assert ray_detect.take_stock(tmp_path, SETTINGS) == ({"a", "b", "c"}, 1)
    assert sorted(row["file_name"] for row in read(tmp_path)) == ["a", "b", "c"]


def test_errors_are_taken_out_to_be_done_again(tmp_path):
    mixed, failed = (
        write(tmp_path, [("a", None), ("b", "broken")]),
        write(tmp_path, [("c", "gone")]),
    )
    assert ray_detect.take_stock(tmp_path, SETTINGS, drop_errors=True) == ({"a"}, 0)
    assert not failed.exists()
    (row,) = read(tmp_path)
    assert row["file_name"] == "a"
    # The rest of the file keeps what it says of its maker.
    assert json.loads(pq.read_schema(mixed).metadata[b"detector"]) == SETTINGS


def test_other_settings_need_another_folder(tmp_path):
    write(tmp_path, [("a", None)])
    with pytest.raises(ValueError, match=r"must be empty or hold detections with .*nuclei.*shapes"):
        ray_detect.take_stock(tmp_path, {**SETTINGS, "model": "nuclei"})


class Killed(BaseException):
    """In place of a signal that ends the process."""


def test_an_image_that_kills_its_process_ends_as_an_error(detector, photos, tmp_path, monkeypatch):
    folder, names = photos
    load, deadly = ray_detect.image_files.load_image, {folder / names[1], folder / names[2]}

    def fatal(path, *rest):
        if path in deadly:
            raise Killed
        return load(path, *rest)

    monkeypatch.setattr(ray_detect.image_files, "load_image", fatal)
    attempts = 0
    while not list(tmp_path.glob("*.parquet")):
        attempts += 1
        try:
            detector.make(names)
        except Killed:
            assert attempts < 9
    monkeypatch.undo()
    assert attempts == 6, "one that reads ahead, two for each of the images, and the last"
    rows = {row["file_name"]: row for row in read(tmp_path)}
    assert [rows[name]["error"] for name in names] == [None, *[ray_detect.KILLED] * 2, None]
    check([rows[names[0]], rows[names[3]]], folder)
    assert not list(tmp_path.glob(".*"))


def test_the_loss_of_machines_is_not_the_fault_of_an_image(detector, photos, tmp_path, monkeypatch):
    folder, names = photos
    load = ray_detect.image_files.load_image
    for name in names[:3]:  # each attempt ends at another image

        def unlucky(path, *rest, last=folder / name):
            if path == last:
                raise Killed
            return load(path, *rest)

        monkeypatch.setattr(ray_detect.image_files, "load_image", unlucky)
        with pytest.raises(Killed):
            detector.make(names)
        monkeypatch.undo()
    detector.make(names)
    check(read(tmp_path), folder)


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "--output", "out"], "no folder .*gone"),
        (["{photos}", "--output", "out", "--model", "gone.pth"], "gone.pth"),
        (["{photos}", "--output", "out", "--list", "gone.txt"], "no list gone.txt"),
        (["{photos}", "--output", "{photos}/000.png"], "000.png"),
        (
            ["{photos}", "--output", "out", "--address", "127.0.0.1:1"],
            "--address .* refused",
        ),
    ],
)
def test_what_is_wrong_is_told_before_ray_starts(
    photos, tmp_path, monkeypatch, capsys, arguments, message
):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_detect, "run", lambda *arguments: pytest.fail("it starts"))
    arguments = [argument.format(photos=photos[0]) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", "shapes"]
    assert ray_detect.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"ray_detect.py: .*{message}.*\n", error)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("TypeError: one\n\nthe cause\n\nray::Worker\nray.UserCodeException: x\nTo do: so", None),
        (
            "  File x\nOSError: [Errno 28] full\n\nray::Worker\nray.UserCodeException: x",
            "[Errno 28] full",
        ),
        (
            "died because\n  raise\nFileNotFoundError: /photos must be there",
            "/photos must be there",
        ),
        ("died", None),
    ],
)
def test_an_error_in_a_process_of_the_cluster_is_one_line(text, line):
    assert ray_detect.expected(text) == line


def test_what_is_done_needs_no_ray(photos, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    folder, names = photos
    jobs = []

    def run(args, todo, job, progress):
        jobs.append(todo)
        for shard in todo:
            ray_detect.Detector(job).make(shard)

    monkeypatch.setattr(ray_detect, "run", run)
    arguments = [str(folder), "--output", str(tmp_path / "found"), "--model", "shapes"]
    arguments += ["--batch", "1", "--shard", "3"]
    assert ray_detect.main(arguments) == 0
    done = ray_detect.shard_path(tmp_path / "found", names[3:])
    half = done.with_name(f".{done.name}.123.tmp")
    other = done.with_name(".detections-0123456789abcdef.parquet.123.tmp")  # who may be at work
    half.touch()
    other.touch()
    assert ray_detect.main(arguments) == 0
    assert (half.exists(), other.exists()) == (False, True)
    assert jobs == [[names[:3], names[3:]]], "the second time there is nothing to do"
    check(read(tmp_path / "found"), folder)
    assert f"{tmp_path / 'found'}: 4 images, 0 of them with an error" in capsys.readouterr().out
    # What the documentation makes of them.
    (code,) = (text for *_, mark, text in blocks(ROOT / "docs" / "scale.md") if mark == "parquet")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(code, namespace)
    assert {result["image_id"] for result in namespace["results"]} == set(names)
    assert namespace["results"][0].keys() > {"bbox", "category_id", "score", "segmentation"}
    # Another network, or other options of this one.
    assert ray_detect.main([*arguments, "--model", "nuclei"]) == 2
    assert ray_detect.main([*arguments, "--min-confidence", "0.1"]) == 2
    assert "choose another --output" in capsys.readouterr().err


def test_errors_are_tried_again_if_asked(photos, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    folder, names = photos
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join([*names, "late.png"]))

    def run(args, todo, job, progress):
        for shard in todo:
            ray_detect.Detector(job).make(shard)

    monkeypatch.setattr(ray_detect, "run", run)
    output = tmp_path / "found"
    arguments = [str(folder), "--list", str(listed), "--output", str(output), "--batch", "1"]
    arguments += ["--model", "shapes"]
    assert ray_detect.main(arguments) == 1, "there is an error"
    os.link(folder / names[0], folder / "late.png")
    try:
        assert ray_detect.main(arguments) == 1, "which stays"
        assert ray_detect.main([*arguments, "--retry-errors"]) == 0
        rows = read(output)
        assert sorted(row["file_name"] for row in rows) == sorted([*names, "late.png"])
        check(rows, folder)
    finally:
        (folder / "late.png").unlink()


# --- The cluster ---------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path):
    """Two machines of Ray, of one core each, in processes of this one."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed")
    options = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    yield cluster
    cluster.shutdown()


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")  # ray's own
def test_each_image_is_there_once_though_a_machine_was_lost(cluster, tmp_path):
    folder, output = tmp_path / "photos", tmp_path / "found"
    names = draw(folder, 48)
    (folder / "bad.png").write_text("no image")
    command = [sys.executable, ROOT / "samples" / "ray_detect.py", folder, "--output", output]
    command += ["--model", "shapes", "--batch", "1", "--shard", "4", "--address", cluster.address]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, cwd=tmp_path)
    try:
        lost = cluster.worker_nodes.copy().pop()
        raylet = lost.all_processes["raylet"][0].process.pid
        # Once both machines have written files, and both are in the middle of the next ones.
        deadline = time.monotonic() + 300
        while len(list(output.glob("*.parquet"))) < 3 or len(list(output.glob(".*.journal"))) < 2:
            assert job.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.005)
        workers = kill_all(raylet)
        half_done = len(list(output.glob(".*.journal")))
        done = len(list(output.glob("*.parquet")))
        status = job.wait(300)
    finally:
        job.kill()
    assert workers
    assert half_done
    assert done < 12
    text = (tmp_path / "log").read_text()
    assert status == 1, text
    assert "49 images, 1 of them with an error" in text
    rows = sorted(read(output), key=lambda row: row["file_name"])
    assert [row["file_name"] for row in rows] == sorted([*names, "bad.png"])
    (bad,) = (row for row in rows if row["error"])
    assert bad["file_name"] == "bad.png"
    rows.remove(bad)
    check(rows, folder)
    assert not list(output.glob(".*"))
