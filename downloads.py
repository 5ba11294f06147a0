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

from config import RESNETS


class Source(NamedTuple):
    """A file on the network and what a complete copy of it looks like."""

    url: str
    size: int | None = None  # bytes
    checksum: str = ""  # algorithm:leading hex digits


def _torchvision(file: str) -> Source:
    """A file of torchvision, which is named after its checksum."""
    checksum = file.removesuffix(".pth").rpartition("-")[2]
    return Source(f"https://download.pytorch.org/models/{file}", checksum=f"sha256:{checksum}")


def _detectron2(file: str) -> Source:
    """A file of detectron2's model zoo, named after the beginning of its MD5, as the zoo says."""
    checksum = file.removesuffix(".pkl").rpartition("_")[2]
    url = f"https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation/{file}"
    return Source(url, checksum=f"md5:{checksum}")


SOURCES = {
    "coco": Source(
        "https://github.com/matterport/Mask_RCNN/releases/download/v2.0/mask_rcnn_coco.h5",
        size=257_557_808,
    ),
    "torchvision": _torchvision("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"),
    "torchvision_v2": _torchvision("maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"),
    "detectron2_r50": _detectron2("mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl"),
    "detectron2_r101": _detectron2("mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72.pkl"),
    "detectron2_x101": _detectron2("mask_rcnn_X_101_32x8d_FPN_3x/139653917/model_final_2d9806.pkl"),
    "resnet50": _torchvision("resnet50-0676ba61.pth"),
    "resnet101": _torchvision("resnet101-63fe2227.pth"),
    "resnet152": _torchvision("resnet152-394f9c45.pth"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d-7cdf4587.pth"),
    "resnext101_32x8d": _torchvision("resnext101_32x8d-8ba56ff5.pth"),
    "resnet50_keras": Source(
        "https://github.com/fchollet/deep-learning-models/releases/download/v0.2/"
        "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        checksum="md5:a268eb855778b3df3c7506639542a6af",
    ),
}
# Names of whole models: those to be downloaded, and those that ship with the library. "imagenet"
# stands for the ResNet of the model.
PUBLISHED = (
    *("coco", "torchvision", "torchvision_v2"),
    *("detectron2_r50", "detectron2_r101", "detectron2_x101"),
)
SHIPPED = ("shapes", "nuclei")
# A download must bring STALL_BYTES in each STALL_SECONDS; a single read may wait READ_SECONDS.
STALL_BYTES, STALL_SECONDS, READ_SECONDS = 64 << 10, 60.0, 30.0
# Bytes to take from a server that does not say how many there are.
MOST_BYTES = 1 << 30


def find_weights(name_or_path: str | Path, backbone: object = "resnet101") -> Path:
    """The file behind a name, downloaded if need be, or behind a path.

    Args:
        name_or_path: one of SHIPPED (which ship with the library) or PUBLISHED, "imagenet"
            (torchvision's ResNet), or a path. Files to be downloaded, and what became of them as
            .pth, are looked for in the working directory, beside this module and in the cache
            folder first.
        backbone: for "imagenet", one of config.RESNETS.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ImageNet weights exist for the backbone.
        ConnectionError: see download.
    """
    name, home = str(name_or_path), Path(__file__).resolve().parent
    if name == "imagenet":
        if not isinstance(backbone, str) or backbone not in RESNETS:
            raise ValueError(
                f"'imagenet' needs a BACKBONE of {', '.join(RESNETS)}, got {backbone!r:.200}; "
                "give the path of a file that fits"
            )
        name = str(backbone)
    elif name in SHIPPED:
        return existing(home / "samples" / f"{name}.pth")
    elif name not in PUBLISHED:
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
        suffixes = (".h5", ".pth", ".pt", ".pkl", ".safetensors")
        inside = sorted(item.name for item in path.iterdir() if item.suffix in suffixes)
        hint = f", such as {printable(inside[-1])}" if inside else ""
        raise FileNotFoundError(f"{path} is a folder, no weight file; give a file in it{hint}")
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    names = [*PUBLISHED, *SHIPPED, "imagenet"]
    close = difflib.get_close_matches(path.name, [*names, *beside])
    hint = f", did you mean {' or '.join(map(printable, close))}?" if close else ""
    raise FileNotFoundError(f"no weight file {path}{hint} (a path, or one of {', '.join(names)})")


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
        name: one of SOURCES: those of PUBLISHED, torchvision's ResNets, or "resnet50_keras".
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
