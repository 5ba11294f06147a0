"""Published files: where they are looked for, and downloads from a local server."""

import contextlib
import hashlib
import re
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import downloads
import weights
from config import RESNETS


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache folder and working directory, and a repository folder without weights."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MASK_RCNN_HOME", str(folder))
    (tmp_path / "work").mkdir()
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(downloads, "__file__", str(tmp_path / "repository" / "downloads.py"))
    monkeypatch.setattr(downloads.urllib.request, "urlopen", None)  # no network by accident
    return folder


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MASK_RCNN_HOME", str(tmp_path / "a"))
    assert downloads.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("MASK_RCNN_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert downloads.cache_folder() == tmp_path / "b" / "mask_rcnn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert downloads.cache_folder() == Path.home() / ".cache" / "mask_rcnn"


def test_coco_is_found_nearest_first(home, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "download", lambda name: Path("downloaded") / name)
    assert downloads.find_weights("coco") == Path("downloaded/coco")
    home.mkdir()
    for path in (
        home / "mask_rcnn_coco.pth",
        home / "mask_rcnn_coco.h5",
        tmp_path / "repository" / "mask_rcnn_coco.h5",
        tmp_path / "work" / "mask_rcnn_coco.pth",
    ):
        path.touch()
        assert downloads.find_weights("coco") == path


def test_imagenet_follows_the_backbone(home, monkeypatch):
    monkeypatch.setattr(downloads, "download", lambda name: Path("downloaded") / name)
    assert downloads.find_weights("imagenet", "resnet50") == Path("downloaded/resnet50")
    assert downloads.find_weights("imagenet", "resnet101") == Path("downloaded/resnet101")
    for name in RESNETS:
        assert downloads.find_weights("imagenet", name) == Path("downloaded") / name
    home.mkdir()
    (home / "resnet101-63fe2227.pth").touch()
    assert downloads.find_weights("imagenet") == home / "resnet101-63fe2227.pth"
    with pytest.raises(
        ValueError, match=r"'imagenet' needs a BACKBONE of resnet50, .* got \{'blocks'"
    ):
        downloads.find_weights("imagenet", {"blocks": (1, 1, 1, 1), "width": 4})


def test_missing_files_are_an_error_with_suggestions(home):
    Path("mask_rcnn_shapes_0010.pth").touch()
    assert downloads.find_weights("mask_rcnn_shapes_0010.pth") == Path("mask_rcnn_shapes_0010.pth")
    with pytest.raises(FileNotFoundError, match=r"mean mask_rcnn_shapes_0010\.pth"):
        downloads.find_weights("mask_rcnn_shapes_001.pth")
    with pytest.raises(FileNotFoundError, match="no weight file coko, did you mean coco"):
        downloads.find_weights("coko")
    with pytest.raises(FileNotFoundError, match="did you mean detectron2_r50 .*or one of coco, "):
        downloads.find_weights("detectron_r50")
    with pytest.raises(FileNotFoundError, match="no weight file nowhere/at/all"):
        downloads.find_weights("nowhere/at/all")


CONTENT = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT on this machine; `behaviour` changes how, `ranges` lists what was asked."""
    state = types.SimpleNamespace(behaviour="", ranges=[], content=CONTENT)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            state.ranges.append(asked)
            content = state.content
            start = int(asked.split("=")[1].rstrip("-")) if asked else 0
            if state.behaviour == "404":
                self.send_error(404)
                return
            if state.behaviour == "no ranges":
                start = 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if state.behaviour == "wrong part":
                self.send_header("Content-Range", f"bytes 7-{len(content) - 1}/{len(content)}")
            if state.behaviour not in ("no length", "endless"):
                length = 1 << 60 if state.behaviour == "huge" else len(content) - start
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                while state.behaviour == "endless":
                    self.wfile.write(bytes(1 << 16))
                while state.behaviour == "trickles":
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            stop = 60_000 if state.behaviour == "breaks" else len(content)
            with contextlib.suppress(ConnectionError):  # the client may have gone
                self.wfile.write(content[start:stop])

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/files/weights.pth"
    digest = hashlib.sha256(CONTENT).hexdigest()
    source = downloads.Source(state.url, len(CONTENT), f"sha256:{digest[:8]}")
    monkeypatch.setitem(downloads.SOURCES, "coco", source)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def test_download_and_the_second_call(server, tmp_path, capfd):
    folder = tmp_path / "new" / "folder"
    path = downloads.download("coco", folder)
    assert path == folder / "weights.pth"
    assert path.read_bytes() == CONTENT
    assert "100%" in capfd.readouterr().err
    assert downloads.download("coco", folder, progress=False) == path
    assert server.ranges == [None]
    assert [item.name for item in folder.iterdir()] == ["weights.pth"]
    assert capfd.readouterr() == ("", "")


def test_download_goes_to_the_cache_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MASK_RCNN_HOME", str(tmp_path))
    assert downloads.download("coco", progress=False) == tmp_path / "weights.pth"


@pytest.mark.parametrize(("behaviour", "length"), [("", 40_000), ("no ranges", 40_000)])
def test_download_resumes(server, tmp_path, behaviour, length):
    server.behaviour = behaviour
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:length])
    path = downloads.download("coco", tmp_path, progress=False)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={length}-"]
    assert list(tmp_path.iterdir()) == [path]


def test_download_takes_a_part_that_was_complete(server, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    path = downloads.download("coco", tmp_path, progress=False)
    assert path.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [path]


def test_broken_download_continues_next_time(server, tmp_path):
    server.behaviour = "breaks"
    with pytest.raises(ConnectionError, match=r"broke after 60,000 of 100,000 bytes.*resumes"):
        downloads.download("coco", tmp_path, progress=False)
    assert [item.name for item in tmp_path.iterdir()] == ["weights.pth.part"]
    server.behaviour = ""
    path = downloads.download("coco", tmp_path, progress=False)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=60000-"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], "99,999 bytes instead of 100,000"),
        (CONTENT[:-1] + b"x", "the sha256 [0-9a-f]{64} instead of [0-9a-f]{8} and was deleted"),
    ],
)
def test_corrupt_download_is_deleted(server, tmp_path, content, message):
    server.content = content
    with pytest.raises(ValueError, match=message):
        downloads.download("coco", tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    server.content = CONTENT
    assert downloads.download("coco", tmp_path, progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize("start", [0, 40_000])
def test_a_server_need_not_tell_the_length(server, tmp_path, start):
    server.behaviour = "no length"
    if start:
        (tmp_path / "weights.pth.part").write_bytes(CONTENT[:start])
    assert downloads.download("coco", tmp_path, progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("behaviour", "message", "left"),
    [
        ("endless", "sent more than [0-9,]+ bytes", 0),
        ("trickles", "only .* bytes came in 0.3 seconds", 100),
        ("huge", "the server has 1,152,921,504,606,846,976 bytes, expected 100,000", 0),
    ],
)
def test_servers_that_never_end(server, tmp_path, monkeypatch, behaviour, message, left):
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.3)
    server.behaviour = behaviour
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=message):
        downloads.download("coco", tmp_path, progress=False)
    assert time.monotonic() - started < 20
    assert sum(item.stat().st_size for item in tmp_path.iterdir()) <= left
    server.behaviour = ""
    monkeypatch.setattr(downloads, "STALL_SECONDS", 60.0)
    with contextlib.suppress(ValueError):  # what trickled in was wrong, and is deleted
        downloads.download("coco", tmp_path, progress=False)
    assert downloads.download("coco", tmp_path, progress=False).read_bytes() == CONTENT
    assert [item.name for item in tmp_path.iterdir()] == ["weights.pth"]


def test_a_disk_without_room_is_found_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        downloads.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=9)
    )
    with pytest.raises(ConnectionError, match="has 9 bytes free, 100,000 are to come"):
        downloads.download("coco", tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_does_not_follow_is_not_appended(server, tmp_path):
    server.behaviour = "wrong part"
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:40_000])
    with pytest.raises(ConnectionError, match=r"'bytes 7-99999/100000', asked .* from 40,000"):
        downloads.download("coco", tmp_path, progress=False)
    assert downloads.download("coco", tmp_path, progress=False).read_bytes() == CONTENT


def test_fetch_is_bounded_where_nothing_is_known(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MOST_BYTES", 3_000_000)
    server.behaviour = "endless"
    with pytest.raises(ConnectionError, match="more than [23],[0-9,]+ bytes"):
        downloads.fetch(server.url, tmp_path / "a.part", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_part_of_another_file_is_deleted(server, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT + b"too long")
    with pytest.raises(ValueError, match="100,008 bytes instead of 100,000"):
        downloads.download("coco", tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_wrong_file_at_the_target_is_kept_and_named(server, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(CONTENT[:5])
    with pytest.raises(ValueError, match=r"weights\.pth has 5 bytes instead of 100,000; delete it"):
        downloads.download("coco", tmp_path, progress=False)
    assert path.read_bytes() == CONTENT[:5]


def test_md5_checksums(server, tmp_path, monkeypatch):
    digest = hashlib.md5(CONTENT).hexdigest()
    for name, expected in (("good", digest), ("bad", digest[::-1])):
        monkeypatch.setitem(
            downloads.SOURCES, name, downloads.Source(server.url, checksum=f"md5:{expected}")
        )
    assert downloads.download("good", tmp_path, progress=False).read_bytes() == CONTENT
    with pytest.raises(ValueError, match=f"the md5 {digest} instead of"):
        downloads.download("bad", tmp_path / "other", progress=False)


def test_no_network_and_no_file_name_url_and_place(server, tmp_path, monkeypatch):
    server.behaviour = "404"
    target = re.escape(str(tmp_path / "weights.pth"))
    with pytest.raises(ConnectionError, match=f"{server.url} .*404.* as {target}$"):
        downloads.download("coco", tmp_path, progress=False)
    url = "http://127.0.0.1:9/weights.pth"  # nobody listens
    monkeypatch.setitem(downloads.SOURCES, "coco", downloads.Source(url))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=f"cannot download {url} .*refused.* as {target}$"):
        downloads.download("coco", ".", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_published_addresses():
    """Names, sizes and checksums as published; pytorch.org's names carry their sha256."""
    assert downloads.SOURCES["coco"].size == 257_557_808
    for name, prefix in (
        ("resnet50", "0676ba61"),
        ("resnet101", "63fe2227"),
        ("resnet152", "394f9c45"),
        ("resnext50_32x4d", "7cdf4587"),
        ("resnext101_32x8d", "8ba56ff5"),
    ):
        url, _, checksum = downloads.SOURCES[name]
        assert url == f"https://download.pytorch.org/models/{name}-{prefix}.pth"
        assert checksum == f"sha256:{prefix}"
    home = "https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation"
    for name, path in (
        ("r50", "mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl"),
        ("r101", "mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72.pkl"),
        ("x101", "mask_rcnn_X_101_32x8d_FPN_3x/139653917/model_final_2d9806.pkl"),
    ):
        url, _, checksum = downloads.SOURCES[f"detectron2_{name}"]
        assert (url, checksum) == (f"{home}/{path}", f"md5:{path[-10:-4]}")
    files = [Path(source.url).name for source in downloads.SOURCES.values()]
    assert len(set(files)) == len(files)
    with pytest.raises(ValueError, match=r"coco, torchvision, .*resnet50_keras, got 'vgg'"):
        downloads.download("vgg")


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152", "resnext50_32x4d"])
def test_addresses_are_those_of_torchvision(name):
    models = pytest.importorskip("torchvision").models
    published = models.get_model_weights(name).IMAGENET1K_V1
    assert downloads.SOURCES[name].url == published.url


@pytest.mark.parametrize(("name", "suffix"), [("torchvision", ""), ("torchvision_v2", "_v2")])
def test_mask_rcnn_addresses_are_those_of_torchvision(name, suffix):
    models = pytest.importorskip("torchvision").models
    published = models.get_model_weights(f"maskrcnn_resnet50_fpn{suffix}").COCO_V1
    url, _, checksum = downloads.SOURCES[name]
    assert url == published.url
    assert checksum == f"sha256:{url[-12:-4]}"


@pytest.mark.parametrize("name", downloads.PUBLISHED)
def test_each_published_model_has_a_name(home, monkeypatch, name):
    monkeypatch.setattr(downloads, "download", lambda name: Path("downloaded") / name)
    assert downloads.find_weights(name) == Path("downloaded") / name
    home.mkdir()
    file = home / Path(downloads.SOURCES[name].url).name
    file.with_suffix(".pth").touch()
    assert downloads.find_weights(name) == file.with_suffix(".pth")


def test_download_command(server, tmp_path, capsys):
    assert weights.main(["download", "coco", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'weights.pth'}\n"
