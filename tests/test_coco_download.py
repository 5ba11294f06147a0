"""The download of MS COCO, from a server that does not behave."""

import http.server
import shutil
import threading

import pytest
from conftest import zipped

import coco
import coco_download


@pytest.fixture
def server(monkeypatch):
    """Serves `server.files`, by path; answers are cut after server.cut bytes while that is set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.path, self.headers.get("Range")))
            content = server.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: server.cut])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.cut = {}, [], None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(coco_download, "COCO_URL", url)
    monkeypatch.setattr(coco_download, "MINIVAL_URL", url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


IMAGES = "/zips/val2017.zip"
ANNOTATIONS = "/annotations/annotations_trainval2017.zip"


def whole_download():
    names = {f"val2017/{i}.jpg": bytes([i]) * 500 for i in range(3)}
    others = {"annotations/instances_train2017.json": b"{}", "annotations/captions.json": b"{}"}
    return {
        IMAGES: zipped(**{"val2017/": b""}, **names),
        ANNOTATIONS: zipped(**{"annotations/instances_val2017.json": b"[7]"}, **others),
    }


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = ["annotations/instances_val2017.json", *(f"val2017/{i}.jpg" for i in range(3))]


def test_download_fetches_what_is_missing(server, tmp_path):
    server.files = whole_download()
    coco_download.download(tmp_path / "coco", "val")
    assert tree(tmp_path / "coco") == WHOLE
    assert (tmp_path / "coco" / "val2017" / "2.jpg").read_bytes() == b"\2" * 500
    assert (tmp_path / "coco" / "annotations" / "instances_val2017.json").read_bytes() == b"[7]"
    coco_download.download(tmp_path / "coco", "val", 2017)
    assert server.requests == [(IMAGES, None), (ANNOTATIONS, None)]


def test_a_broken_download_is_resumed(server, tmp_path):
    server.files, server.cut = whole_download(), 700
    with pytest.raises(ConnectionError, match="cannot download .*val2017.zip .* which resumes it"):
        coco_download.download(tmp_path, "val")
    assert tree(tmp_path) == ["val2017.zip.part"]
    server.cut = None
    coco_download.download(tmp_path, "val")
    assert server.requests[1] == (IMAGES, "bytes=700-")
    assert tree(tmp_path) == WHOLE


def test_the_files_of_2014_have_their_own_places(server, tmp_path):
    server.files = {
        "/zips/val2014.zip": zipped(**{"val2014/1.jpg": b"1"}),
        f"/{coco_download.MINIVAL_FILES['minival']}": zipped(
            **{"instances_minival2014.json": b"{}"}
        ),
    }
    coco_download.download(tmp_path, "minival", "2014")
    assert tree(tmp_path) == ["annotations/instances_minival2014.json", "val2014/1.jpg"]


@pytest.mark.parametrize("name", ["val2017/../../evil.jpg", "val2017//../../../evil.jpg"])
def test_an_archive_that_writes_elsewhere_is_refused(server, tmp_path, name):
    server.files = {IMAGES: zipped(**{"val2017/1.jpg": b"1", name: b"evil"})}
    with pytest.raises(ValueError, match=r"must not be unpacked: it would write to .*evil.jpg"):
        coco_download.download(tmp_path / "a" / "b", "val")
    assert [path for path in tree(tmp_path) if not path.endswith(".part")] == []


def test_a_damaged_archive_is_deleted(server, tmp_path):
    server.files = whole_download()
    content = bytearray(server.files[IMAGES])
    content[content.index(b"\1" * 500) + 9] ^= 1
    server.files[IMAGES] = bytes(content)
    with pytest.raises(ValueError, match="val2017.zip arrived damaged .*CRC.* deleted; try again"):
        coco_download.download(tmp_path, "val")
    assert tree(tmp_path) == []
    server.files[IMAGES] = b"<html>no zip</html>"
    with pytest.raises(ValueError, match="arrived damaged"):
        coco_download.download(tmp_path, "val")
    assert tree(tmp_path) == []
    server.files[IMAGES] = zipped(**{"else/1.jpg": b"1"})
    with pytest.raises(ValueError, match="must hold val2017, which is not in it"):
        coco_download.download(tmp_path, "val")


def test_a_full_disk_is_noticed_before(server, tmp_path, monkeypatch):
    server.files = whole_download()
    usage = shutil.disk_usage(tmp_path)
    free = iter([100, 10_000, 100])  # too little for the archive; enough; too little for its files
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    with pytest.raises(OSError, match="has 100 bytes free, .* are to come"):
        coco_download.download(tmp_path, "val")
    with pytest.raises(OSError, match="needs 1,500 bytes for val2017, has 100; make room"):
        coco_download.download(tmp_path, "val")
    assert tree(tmp_path) == ["val2017.zip.part"]


def test_a_missing_file_is_one_line(server, tmp_path, capsys):
    arguments = ["inspect", f"--dataset={tmp_path}", "--download=true"]
    assert coco.main(arguments) == 2
    error = capsys.readouterr().err
    assert "train2017.zip (HTTP Error 404" in error
    assert error.count("\n") == 1
