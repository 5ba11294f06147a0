"""Images per second of samples/ray_detect.py with few and with more workers, in turn.

python benchmarks/ray_detect.py photos --model nuclei --images 96 --workers 1 2 --rounds 3

The rate is that of the files after the first two of each worker, so that neither the start of Ray
nor the first images of a process count.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from samples import ray_detect


def measure(args: argparse.Namespace, names: Path, workers: int) -> tuple[float, float, float]:
    """Seconds to the first file, images per second after it, and bytes per image."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ray_detect.__file__, args.photos, "--list", str(names)]
        command += ["--output", folder, "--model", args.model, "--shard", str(args.shard)]
        start = time.time()
        subprocess.run([*command, "--workers", str(workers)], check=True, capture_output=True)
        files = [path.stat() for path in Path(folder).glob("*.parquet")]
    ends = sorted(file.st_mtime for file in files)
    skipped = 2 * workers
    rate = args.shard * (len(ends) - skipped) / (ends[-1] - ends[skipped - 1])
    return ends[0] - start, rate, sum(file.st_size for file in files) / args.images


def compare(args: argparse.Namespace) -> None:
    """Prints the median and the range of each number of workers."""
    found = ray_detect.find_names(Path(args.photos), None)[: args.images]
    if len(found) < args.images or args.images < 4 * args.shard * max(args.workers):
        raise ValueError(
            f"--images must be among the {len(found)} of {args.photos}, and at least four files of"
            f" --shard {args.shard} for each worker, got {args.images}"
        )
    rates = defaultdict(list)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as names:
        names.write("\n".join(found))
        names.flush()
        for _ in range(args.rounds):
            for workers in args.workers:
                first, rate, size = measure(args, Path(names.name), workers)
                rates[workers].append(rate)
                print(f"{workers} workers: first file after {first:.0f} s, {rate:.2f} images/s")
    for workers, values in rates.items():
        middle, least, most = statistics.median(values), min(values), max(values)
        print(f"{workers} workers: {middle:.2f} ({least:.2f} .. {most:.2f}) images/s")
    print(f"{size:.0f} bytes per image")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(prog="ray_detect.py", description=__doc__)
    add = parser.add_argument
    add("photos", metavar="FOLDER", help="of images")
    add("--model", default="nuclei", metavar="NAME|FILE", help="default: nuclei")
    add("--images", type=cli.whole(1), default=96, metavar="N", help="default: 96")
    add("--shard", type=cli.whole(1), default=4, metavar="N", help="images of a file; default: 4")
    text = "how many, one after the other; default: 1 2"
    add("--workers", type=cli.whole(1), nargs="+", default=[1, 2], metavar="N", help=text)
    add("--rounds", type=cli.whole(1), default=3, metavar="N", help="default: 3")
    parser.set_defaults(run=compare)
    return cli.run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
