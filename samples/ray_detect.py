"""Detects objects in millions of images on the machines of a Ray cluster; see docs/scale.md.

python samples/ray_detect.py photos --output found                  # all images below a folder
python samples/ray_detect.py photos --list names.txt --output found # those of a list
python samples/ray_detect.py photos --output found --retry-errors   # once more what failed

Without a cluster it uses the cores and GPUs of this machine. The results are Parquet files of a row
for each image; one that cannot be used has a row that says why. What is written already is not done
again, so that a job which was stopped or killed is simply started anew.
"""

import argparse
import builtins
import hashlib
import itertools
import json
import logging
import math
import os
import re
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import coco
import families
import image_files
import utils
import weights
from annotations import read_json
from config import Config
from downloads import PUBLISHED, SHIPPED
from evaluation import build_coco_results
from model import MaskRCNN

ROOT = Path(__file__).resolve().parent.parent
FILE_NAME = re.compile(r"detections-[0-9a-f]{16}\.parquet")
KILLED = "the process that worked on this image was killed twice; does it need too much memory?"


# --- Which images --------------------------------------------------------------------------------


def find_names(folder: Path, file: Path | None) -> list[str]:
    """The images of the job, each once, as paths from the folder.

    Args:
        folder: is searched with all folders below it where no list is given.
        file: a name in each line, or a list in COCO's format (.json).

    Raises:
        FileNotFoundError: no such folder or list.
        ValueError: there are no names.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if file is None:
        names = [
            Path(os.path.relpath(parent, folder), name).as_posix()
            for parent, folders, files in os.walk(folder)
            for name in files
            if image_files.is_image_file(name)
        ]
        names.sort()
    elif file.suffix.lower() == ".json":
        content = read_json(file)
        try:
            names = [os.fspath(item["file_name"]) for item in content["images"]]
        except (TypeError, LookupError):
            raise ValueError(f"{file} must have a list images, each with a file_name") from None
    elif file.is_file():
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    else:
        raise FileNotFoundError(f"no list {file}")
    # Parquet has no words for bytes that are no text: such a name will have a row with an error.
    names = [name.encode("utf-8", "backslashreplace").decode() for name in names if name]
    if not names:
        raise ValueError(f"no images in {folder if file is None else file}")
    return list(dict.fromkeys(names))


def shards(names: Sequence[str], done: Iterable[str], size: int) -> Iterator[list[str]]:
    """What is to be done of each `size` names.

    The names are cut before those that are done are left out: so a job that is started anew makes
    the shards that the one before it may still be writing somewhere, and not others of the same
    images.
    """
    done = set(done)
    for start in range(0, len(names), size):
        rest = [name for name in names[start : start + size] if name not in done]
        if rest:
            yield rest


# --- Parquet -------------------------------------------------------------------------------------


def schema(settings: dict[str, Any] | None = None) -> Any:
    """The columns of the files; sizes and boxes are in pixels of the image."""
    import pyarrow as pa

    detection = {
        "bbox": pa.list_(pa.float32()),  # x, y, width, height
        "category_id": pa.int32(),
        "category": pa.string(),
        "score": pa.float32(),
        "segmentation": pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()}),
    }
    columns = {
        "file_name": pa.string(),
        "height": pa.int32(),  # null, as the width, where there is an error
        "width": pa.int32(),
        "error": pa.string(),  # else null
        "detections": pa.list_(pa.struct(detection)),
    }
    return pa.schema(columns, {"detector": json.dumps(settings)})


def shard_path(output: Path, names: Sequence[str]) -> Path:
    """Where the rows of these images belong, whoever makes them."""
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
    return output / f"detections-{digest}.parquet"


def write_table(path: Path, table: Any) -> None:
    """Writes a file, whole or not at all."""
    import pyarrow.parquet as pq

    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    utils.write_atomic(path, lambda file: file.write(buffer.getbuffer()))


class Done(NamedTuple):
    """What is in the output folder.

    Attributes:
        names: of the images that have a row.
        errors: how many of the rows tell an error.
    """

    names: set[str]
    errors: int


def take_stock(output: Path, settings: dict[str, Any], drop_errors: bool = False) -> Done:
    """Reads what is done, and sees to it that each image has one row.

    Args:
        settings: what the rows depend on besides the images.
        drop_errors: whether rows that tell an error are taken out.

    Raises:
        ValueError: the rows are those of another model or other options.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, errors = set[str](), 0
    for path in sorted(path for path in output.iterdir() if FILE_NAME.fullmatch(path.name)):
        try:
            table = pq.read_table(path, columns=["file_name", "error"], partitioning=None)
        except (pa.ArrowException, OSError) as error:
            # Not written by a job that was killed: those leave no such file. A disk, or a copy.
            logging.warning("removed %s, which is damaged: %s", path, cli.one_line(error))
            path.unlink()
            continue
        made = json.loads(table.schema.metadata[b"detector"])
        if made != settings:
            raise ValueError(
                f"{output} must be empty or hold detections with {settings}, got {made}; choose"
                " another --output"
            )
        rows = list(zip(*(table[name].to_pylist() for name in ("file_name", "error")), strict=True))
        keep = [
            name not in names and not (drop_errors and fault is not None) for name, fault in rows
        ]
        if not any(keep):
            path.unlink()
        elif not all(keep):
            write_table(path, pq.read_table(path, partitioning=None).filter(keep))
        for kept, (name, fault) in zip(keep, rows, strict=True):
            if kept:
                names.add(name)
                errors += fault is not None
    return Done(names, errors)


# --- In the processes of the cluster -------------------------------------------------------------


class Job(NamedTuple):
    """What all processes know.

    Attributes:
        file: of the weights.
        options: of its config, other than those of the file.
        class_names: by class id, the background's first.
        category_ids: by class id.
        folder: of the images.
        output: the folder of the Parquet files.
        settings: what the rows depend on besides the images; it is written into each file.
    """

    file: weights.WeightFile
    options: dict[str, Any]
    class_names: Sequence[str]
    category_ids: Sequence[int]
    folder: Path
    output: Path
    settings: dict[str, Any]


class Image(NamedTuple):
    """An image, or why there is none."""

    name: str
    pixels: np.ndarray | None
    error: str | None


class Journal:
    """Tells which images a process cannot survive, of a shard that others worked on before.

    The first attempt leaves an empty file until the shard is written. The next one notes each image
    before it begins with it; an image that two of them ended with is not tried again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f".{path.stem}.journal")
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else None
        self.is_careful = lines is not None
        ends = (name for name, mark in itertools.pairwise([*(lines or []), ""]) if not mark)
        self.deadly = {name for name, count in Counter(ends).items() if name and count > 1}
        self._write("" if lines is None else "\n")

    def begin(self, name: str) -> None:
        """Notes an image."""
        if self.is_careful:
            self._write(f"{name}\n")

    def close(self) -> None:
        """The shard is written."""
        self.path.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)


class Detector:
    """Holds the model in a process of the cluster, and makes the files of shards.

    Args:
        job: what to do.
        device: to compute on.
        threads: to read images with, and to compute with on a CPU.
    """

    def __init__(self, job: Job, device: str = "cpu", threads: int = 1) -> None:
        utils.keep_memory()
        torch.set_num_threads(threads)
        self.job, self.threads = job, threads
        self.model = MaskRCNN.from_weights(job.file, **job.options).to(device)
        for place in (job.folder, job.output):
            if not place.is_dir():
                raise FileNotFoundError(f"{place} must be there on all machines; mount it on each")

    def __call__(self, images: Any) -> Any:
        """Does the shard that is a block of Ray's data set; the images that are done."""
        import pyarrow as pa

        names = images["file_name"].to_pylist()
        self.make(names)
        return pa.table({"images": [len(names)]})

    def make(self, names: Sequence[str]) -> None:
        """Detects in the images of a shard and writes its file, if it is not there already."""
        import pyarrow as pa

        path = shard_path(self.job.output, names)
        if not path.exists():
            journal = Journal(path)
            rows = list(self.rows(names, journal))
            write_table(path, pa.Table.from_pylist(rows, schema(self.job.settings)))
            journal.close()

    def rows(self, names: Sequence[str], journal: Journal) -> Iterator[dict[str, Any]]:
        """The rows of images, in their order."""
        size = 1 if journal.is_careful else self.model.config.BATCH_SIZE
        images = self._images(names, journal)
        while batch := list(itertools.islice(images, size)):
            yield from self.look(batch)

    def _images(self, names: Sequence[str], journal: Journal) -> Iterator[Image]:
        """Reads images in their order, some of them ahead."""
        ahead = 0 if journal.is_careful else self.threads + self.model.config.BATCH_SIZE
        with ThreadPoolExecutor(self.threads) as pool:
            following: deque[Any] = deque()
            for name in names:
                if name in journal.deadly:
                    following.append(pool.submit(Image, name, None, KILLED))
                else:
                    journal.begin(name)
                    following.append(pool.submit(self.read, name))
                if len(following) > ahead:
                    yield following.popleft().result()
            while following:
                yield following.popleft().result()

    def read(self, name: str) -> Image:
        """Reads an image."""
        config = self.model.config
        try:
            pixels = image_files.load_image(
                self.job.folder / name, config.IMAGE_CHANNEL_COUNT, config.IMAGE_BIT_DEPTH
            )
        except (*cli.EXPECTED, MemoryError) as error:
            return Image(name, None, cli.one_line(error))
        return Image(name, pixels, None)

    def look(self, batch: Sequence[Image]) -> Iterator[dict[str, Any]]:
        """The rows of a batch; where it is too large, of its images one by one."""
        found = [image.pixels for image in batch if image.pixels is not None]
        try:
            results = iter(self.model.detect(found, masks="rle"))
        except (*cli.EXPECTED, MemoryError) as error:
            if len(batch) > 1:
                for image in batch:
                    yield from self.look([image])
                return
            batch = [batch[0]._replace(pixels=None, error=cli.one_line(error))]
        for name, pixels, fault in batch:
            if pixels is None:
                yield {"file_name": name, "error": fault, "detections": []}
                continue
            height, width = pixels.shape[:2]
            result = next(results)
            detections = build_coco_results(name, result, self.job.category_ids)
            for detection, class_id in zip(detections, result["class_ids"], strict=True):
                detection["category"] = self.job.class_names[class_id]
            row = {"file_name": name, "height": height, "width": width, "error": None}
            yield {**row, "detections": detections}


# --- The job -------------------------------------------------------------------------------------


def detect(args: argparse.Namespace) -> int:
    """Does what the command line asks; returns 1 if there are rows that tell an error."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray's reports to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it has errors in all actor pools
    with cli.extra("ray"):
        import pyarrow  # noqa: F401
        import ray.data  # noqa: F401
    folder, output = Path(args.folder).resolve(), Path(args.output).resolve()
    names = find_names(folder, args.list)
    path = weights.find_weights(args.model)
    file = weights.read_state_dict(path)
    if not weights.is_whole(file):
        raise ValueError(f"--model must be that of a whole network, got {path}")
    options = cli.config_options(args)
    if args.min_confidence is not None:
        options["DETECTION_MIN_CONFIDENCE"] = args.min_confidence
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = {"model": Path(args.model).name, "sha256": digest, **weights.plain(options)}
    if args.batch is not None:
        options["IMAGES_PER_GPU"] = args.batch

    output.mkdir(parents=True, exist_ok=True)
    done = take_stock(output, settings, args.retry_errors).names
    todo = list(shards(names, done, args.shard))
    if todo:
        class_names = families.class_names(
            Config(**Config.unset(weights.read_options(file)) | options)
        )
        known = class_names == coco.CLASS_NAMES
        category_ids = coco.CATEGORY_IDS if known else range(len(class_names))
        job = Job(file, options, class_names, category_ids, folder, output, settings)
        with tqdm(total=len(names), unit="image") as bar:
            bar.update(len(names) - sum(map(len, todo)))
            try:
                run(args, todo, job, bar.update)
            except KeyboardInterrupt:
                count = len(take_stock(output, settings).names.intersection(names))
                message = f"{count} of {len(names)} images are done; the same command goes on"
                raise KeyboardInterrupt(message) from None

    done, errors = take_stock(output, settings)
    missing = set(names) - done
    if missing:
        raise OSError(f"{output} lacks {len(missing)} images, {min(missing)} among them; run again")
    for path in output.glob(".detections-*"):  # what killed processes left of shards that are done
        if path.with_name(f"{path.name.split('.')[1]}.parquet").exists():
            path.unlink(missing_ok=True)
    print(f"{output}: {len(done)} images, {errors} of them with an error")
    return int(errors > 0)


def run(
    args: argparse.Namespace,
    todo: Sequence[Sequence[str]],
    job: Job,
    progress: Callable[[int], Any],
) -> None:
    """Has Ray's processes do the shards, and tells of the images that are done."""
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    ray.init(
        args.address,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        # Where the library is not installed, it is found at the same place as here.
        runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}{os.pathsep}${{PYTHONPATH}}"}},
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised as well
    DataContext.get_current().enable_progress_bars = False
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = args.gpus
        if gpus is None:
            gpus = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
        cpus = args.cpus or (4 if gpus else 1)
        room = int(
            sum(
                min(
                    machine.get("CPU", 0) // cpus,
                    machine.get("GPU", 0) // gpus if gpus else math.inf,
                )
                for machine in machines
            )
        )
        if not room:
            logging.warning("waiting for a machine with %d cores and %g GPUs", cpus, gpus)
        if args.workers:
            pool = ActorPoolStrategy(size=args.workers, max_tasks_in_flight_per_actor=2)
        else:
            pool = ActorPoolStrategy(
                min_size=1, initial_size=max(1, room), max_tasks_in_flight_per_actor=2
            )
        blocks = [pa.table({"file_name": names}) for names in todo]
        results = ray.data.from_arrow(blocks).map_batches(
            Detector,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(job, "cuda" if gpus else "cpu", cpus),
            compute=pool,
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            progress(int(batch["images"].sum()))
    except ray.exceptions.RayError as error:
        if message := expected(str(error)):
            raise ValueError(message) from None
        raise
    finally:
        ray.shutdown()


def expected(text: str) -> str | None:
    """The message of an error that its user can mend, in what Ray tells of a process; else None."""
    # The traceback of the process comes first, and after it Ray's own errors, ray.exceptions....
    causes = re.findall(r"^(\w+): (.*)", text, re.MULTILINE)
    name, message = causes[-1] if causes else ("", "")
    kind = getattr(builtins, name, None)
    return message if isinstance(kind, type) and issubclass(kind, cli.EXPECTED) else None


def check(args: argparse.Namespace) -> None:
    """Raises ConnectionError for a cluster that is not there, for which Ray waits for minutes."""
    host, _, port = (args.address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(
                f"--address must be that of a cluster, got {args.address}: {error}"
            ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(prog="ray_detect.py", description=__doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="of the images, at the same place on all machines")
    text = "a name in each line, or COCO's format (.json), from FOLDER; default: all below it"
    add("--list", type=Path, metavar="FILE", help=text)
    add("--output", required=True, metavar="DIR", help="of the Parquet files, also on all machines")
    text = f"{', '.join([*SHIPPED, *PUBLISHED])}, or a file; default: coco"
    add("--model", default="coco", metavar="NAME|FILE", help=text)
    text = "least score of a detection, 0 to 1; default: as the file says"
    add("--min-confidence", type=cli.share, metavar="X", help=text)
    cli.add_bit_depth(parser)
    cli.add_views(parser)
    text = "do the images again whose row tells an error"
    add("--retry-errors", action="store_true", help=text)
    text = "images of a task and of a file; default: 200"
    add("--shard", type=cli.whole(1), default=200, metavar="N", help=text)
    add("--batch", type=cli.whole(1), metavar="N", help="images at once in the network")
    text = "host:port of a cluster, or local; default: RAY_ADDRESS, or that of this machine"
    add("--address", help=text)
    text = "processes that detect; default: as many as there is room for"
    add("--workers", type=cli.whole(1), metavar="N", help=text)
    text = "cores of each of them; default: 1, with a GPU 4"
    add("--cpus", type=cli.whole(1), metavar="N", help=text)
    text = "GPU of each of them, 0 to 1; default: 1 where there are any"
    add("--gpus", type=cli.share, metavar="X", help=text)
    parser.set_defaults(run=detect)
    return cli.run(parser, arguments, check)


if __name__ == "__main__":
    sys.exit(main())
