"""Runs the notebooks from start to end and saves them with their outputs.

python notebooks/run.py                  # all of them
python notebooks/run.py shapes.ipynb
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of the library

import cli
import utils

with cli.extra("notebooks"):
    import nbformat
    from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def execute(path: Path, timeout: int | None = None) -> Any:
    """The notebook of a file, run in its folder by a new kernel of this Python, with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,  # or each run would change each cell
        extra_arguments=["--log-level=40"],  # errors only: it warns of being local
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def merge_streams(outputs: Sequence[Any]) -> list[Any]:
    """Outputs as a notebook shows them: what one stream wrote in one piece, bars as they ended."""
    merged: list[Any] = []
    streams: dict[str, Any] = {}
    for output in outputs:
        if output.output_type != "stream":
            merged.append(output)
        elif output.name in streams:
            streams[output.name].text += output.text
        else:
            streams[output.name] = output
            merged.append(output)
    for output in streams.values():
        output.text = re.sub(r"[^\n]*\r(?!\n)(?=[^\n])", "", output.text)
    return merged


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(prog="run.py", description=__doc__)
    parser.add_argument("names", nargs="*", help="notebooks of this folder; default: all")
    parser.set_defaults(run=run)
    return cli.run(parser, arguments)


def run(args: argparse.Namespace) -> None:
    """Executes and saves."""
    paths = [FOLDER / name for name in args.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        save(execute(path), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def save(notebook: Any, path: Path) -> None:
    """Writes a notebook."""
    text = nbformat.writes(notebook) + "\n"
    utils.write_atomic(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(main())
