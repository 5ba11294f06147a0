"""Published weight files: where they are kept, and how they are downloaded."""

import difflib
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any, NamedTuple


class Source(NamedTuple):
    """A file on the network and what a complete copy of it looks like."""

    url: str
    size: int | None = None  # bytes
    checksum: str = ""  # algorithm:leading hex digits


SOURCES = {
    "coco": Source(
        "https://github.com/matterport/Mask_RCNN/releases/download/v2.0/mask_rcnn_coco.h5",
        size=257_557_808,
    ),
    "resnet50": Source(
        "https://download.pytorch.org/models/resnet50-0676ba61.pth", checksum="sha256:0676ba61"
    ),
    "resnet101": Source(
        "https://download.pytorch.org/models/resnet101-63fe2227.pth", checksum="sha256:63fe2227"
    ),
    "resnet50_keras": Source(
        "https://github.com/fchollet/deep-learning-models/releases/download/v0.2/"
        "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        checksum="md5:a268eb855778b3df3c7506639542a6af",
    ),
}
SHIPPED = ("shapes", "nuclei")
# A download must bring STALL_BYTES in each STALL_SECONDS; a single read may wait READ_SECONDS.
STALL_BYTES, STALL_SECONDS, READ_SECONDS = 64 << 10, 60.0, 30.0
# Bytes to take from a server that does not say how many there are.
MOST_BYTES = 1 << 30


def find_weights(name_or_path: str | Path, backbone: object = "resnet101") -> Path:
    """The file behind a name, downloaded if need be, or behind a path.

    Args:
        name_or_path: "shapes" or "nuclei" (which ship with the library), "coco"
            (mask_rcnn_coco.h5, or .pth), "imagenet" (torchvision's ResNet) or a path. Files to be
            downloaded are looked for in the working directory, beside this module and in the cache
            folder first.
        backbone: for "imagenet", "resnet50" or "resnet101".

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ImageNet weights exist for the backbone.
        ConnectionError: see download.
    """
    name, home = str(name_or_path), Path(__file__).resolve().parent
    if name == "imagenet":
        if backbone not in ("resnet50", "resnet101"):
            raise ValueError(
                f"'imagenet' needs BACKBONE 'resnet50' or 'resnet101', got {backbone!r}; "
                "give the path of a file that fits"
            )
        name = str(backbone)
    elif name in SHIPPED:
        return existing(home / "samples" / f"{name}.pth")
    elif name != "coco":
        return existing(name_or_path)
    file = Path(SOURCES[name].url).name
    for folder in (Path.cwd(), home, cache_folder()):
        for candidate in (folder / file, (folder / file).with_suffix(".pth")):
            if candidate.is_file():
                return candidate
    return download(name)


def existing(path: str | Path) -> Path:
    """The path of a file that is there; else a FileNotFoundError that says what is."""
    path = Path(path)
    if path.is_file():
        return path
    if (path / "saved_model.pb").is_file():
        raise FileNotFoundError(
            f"{path} is a SavedModel folder of TensorFlow, not a weight file; load it with Keras "
            "and write it as .h5: model.save('model.h5')"
        )
    if path.is_dir():
        suffixes = (".h5", ".pth", ".pt", ".safetensors")
        inside = sorted(item.name for item in path.iterdir() if item.suffix in suffixes)
        hint = f", such as {printable(inside[-1])}" if inside else ""
        raise FileNotFoundError(f"{path} is a folder, no weight file; give a file in it{hint}")
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, ["coco", "imagenet", *beside])
    hint = f", did you mean {' or '.join(map(printable, close))}?" if close else ""
    raise FileNotFoundError(f"no weight file {path}{hint} (a path, 'coco' or 'imagenet')")


def printable(text: str, limit: int = 200) -> str:
    """A text of a file as a terminal may get it: in one line, without control characters."""
    text = text if len(text) <= limit else text[:limit] + "..."
    return text if text.isprintable() else repr(text)[1:-1]


def cache_folder() -> Path:
    """$MASK_RCNN_HOME, or mask_rcnn in the user's cache folder."""
    if home := os.environ.get("MASK_RCNN_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mask_rcnn"


def download(name: str, folder: str | Path | None = None, progress: bool = True) -> Path:
    """Downloads a published file once; an interrupted download is resumed.

    Args:
        name: "coco", "resnet50", "resnet101" (torchvision's) or "resnet50_keras".
        folder: where to keep it; None is cache_folder().
        progress: show a progress bar.

    Raises:
        ValueError: no such name, or the file is not what was published.
        ConnectionError: the network or the server fails.
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(SOURCES)}, got {name!r}")
    source = SOURCES[name]
    target = (Path(folder) if folder else cache_folder()).absolute() / Path(source.url).name
    if target.is_file():
        if fault := _fault(target, source):
            raise ValueError(f"{target} has {fault}; delete it to download it again")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        fetch(source.url, part, progress, source.size)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"cannot download {source.url} ({error}); try again, which resumes it, "
            f"or save that address by other means as {target}"
        ) from error
    if fault := _fault(part, source):
        part.unlink()
        raise ValueError(f"the download of {source.url} had {fault} and was deleted; try again")
    os.replace(part, target)
    return target


def fetch(url: str, part: Path, progress: bool, most: int | None = None) -> None:
    """Downloads into `part`, after what is already there.

    Args:
        most: bytes that are taken at most; None for as many as the server announces, and
            MOST_BYTES if it does not.

    Raises:
        OSError: the server fails, stalls or sends too much, or the disk has no room for the file.
    """
    from tqdm import tqdm

    start = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "mask-rcnn", **({"Range": f"bytes={start}-"} if start else {})}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=READ_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing comes after what is there: whole or wrong, the caller tells
            return
        raise
    answer = response.headers["Content-Range"] or f"bytes {start}-"
    if response.status != 206 or not answer.startswith(f"bytes {start}-"):
        if response.status == 206:  # a part that does not follow what is there
            response.close()
            part.unlink()
            raise ConnectionError(f"the server sent {answer!r}, asked for bytes from {start:,}")
        start = 0  # the server sends it from the beginning
    total = None if response.length is None else start + response.length
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=not progress)
    with response, bar:
        if total is not None:
            _check_size(part, total, total - start, most)
        with part.open("ab" if start else "wb") as file:
            complete = _receive(response, file, bar, total or most or MOST_BYTES)
            size = file.tell()
    if not complete:
        part.unlink()  # it is not the beginning of what was wanted
        raise ConnectionError(f"the server sent more than {size:,} bytes")
    if total is not None and size < total:  # http.client says nothing of it
        raise ConnectionError(f"the connection broke after {size:,} of {total:,} bytes")


def _check_size(part: Path, total: int, coming: int, most: int | None) -> None:
    if most is not None and total > most:
        part.unlink(missing_ok=True)
        raise ConnectionError(f"the server has {total:,} bytes, expected {most:,}")
    free = shutil.disk_usage(part.parent).free
    if coming > free:
        raise OSError(f"{part.parent} has {free:,} bytes free, {coming:,} are to come")


def _receive(response: http.client.HTTPResponse, file: IO[bytes], bar: Any, most: int) -> bool:
    """Appends a response to a file; whether that is all of it and not more than `most` bytes."""
    began, received = time.monotonic(), 0
    while chunk := response.read1(1 << 20):  # read() would wait for all of it
        if file.tell() + len(chunk) > most:
            return False
        file.write(chunk)
        bar.update(len(chunk))
        received += len(chunk)
        if time.monotonic() - began > STALL_SECONDS:
            if received < STALL_BYTES:
                raise ConnectionError(f"only {received:,} bytes came in {STALL_SECONDS:g} seconds")
            began, received = time.monotonic(), 0
    return True


def _fault(path: Path, source: Source) -> str | None:
    """What distinguishes the file from the published one."""
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        return f"{size:,} bytes instead of {source.size:,}"
    if source.checksum:
        algorithm, _, expected = source.checksum.partition(":")
        digest = hashlib.new(algorithm, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if not digest.hexdigest().startswith(expected):
            return f"the {algorithm} {digest.hexdigest()} instead of {expected}"
    return None
