"""MS COCO: where its files are, and how they come there (https://cocodataset.org)."""

import http.client
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import distributed
import weights

logger = logging.getLogger(__name__)

SUBSETS = {"2014": ("train", "val", "minival", "valminusminival"), "2017": ("train", "val")}
COCO_URL = "http://images.cocodataset.org"
MINIVAL_URL = "https://dl.dropboxusercontent.com/s"  # of the 2014 subsets, by Ross Girshick
MINIVAL_FILES = {
    "minival": "o43o90bna78omob/instances_minival2014.json.zip",
    "valminusminival": "s3tw5zcg7395368/instances_valminusminival2014.json.zip",
}


def layout(dataset_dir: str | Path, subset: str, year: int | str) -> tuple[Path, Path]:
    """Folder of images and file of annotations of a subset of MS COCO."""
    subsets = SUBSETS.get(str(year))
    if subsets is None or subset not in subsets:
        known = "; ".join(f"{', '.join(names)} of {y}" for y, names in SUBSETS.items())
        raise ValueError(f"subset and year must be one of {known}, got {subset} of {year}")
    images = subset if subset == "train" else "val"
    folder = Path(dataset_dir)
    return folder / f"{images}{year}", folder / "annotations" / f"instances_{subset}{year}.json"


def download(dataset_dir: str | Path, subset: str, year: int | str = "2017") -> None:
    """Fetches what is missing of a subset of MS COCO, 1 GB (val) to 18 GB (train).

    An interrupted download is resumed. Files and folders appear under their names only when they
    are whole.

    Raises:
        ConnectionError: the network or the server fails.
        ValueError: a damaged archive, or one that wants to write elsewhere.
        OSError: the disk is full.
    """
    images, annotations = layout(dataset_dir, subset, year)
    if not images.is_dir():
        _fetch_and_unpack(f"{COCO_URL}/zips/{images.name}.zip", images.name, images)
    if not annotations.is_file():
        url, member = f"{COCO_URL}/annotations/annotations_trainval{year}.zip", "annotations/"
        if subset in MINIVAL_FILES:
            url, member = f"{MINIVAL_URL}/{MINIVAL_FILES[subset]}", ""
        _fetch_and_unpack(url, member + annotations.name, annotations)


def _fetch_and_unpack(url: str, member: str, target: Path) -> None:
    """Makes a file or folder of a zip archive at url appear as target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: on the same disk, where there is room and a rename is one step.
    archive = target.parent / (Path(url).name + ".part")
    logger.info("downloading %s to %s", url, archive)
    try:
        weights.fetch(url, archive, progress=distributed.is_main())
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"cannot download {url} ({error}); try again, which resumes it, or unpack that file's"
            f" {member} as {target} by other means"
        ) from error
    folder = target.parent / f".{target.name}.unpacking"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as file:
            members = [m for m in file.infolist() if f"{m.filename}/".startswith(f"{member}/")]
            _check_members(members, member, folder, url)
            logger.info("unpacking %d files to %s", len(members), target)
            file.extractall(folder, members)  # compares checksums
        os.replace(folder / member, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise ValueError(f"{url} arrived damaged ({error}) and was deleted; try again") from error
    finally:
        shutil.rmtree(folder)
    archive.unlink()


def _check_members(members: Sequence[zipfile.ZipInfo], wanted: str, folder: Path, url: str) -> None:
    if not members:
        raise ValueError(f"{url} must hold {wanted}, which is not in it")
    for member in members:
        if not (folder / member.filename).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{url} must not be unpacked: it would write to {member.filename!r}")
    size, free = sum(m.file_size for m in members), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder.parent} needs {size:,} bytes for {wanted}, has {free:,}; make room")
