"""The notebooks run from start to end, and what they ship with is what they give."""

import re
import sys

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
sys.path.insert(0, str(ROOT / "notebooks"))
import run  # noqa: E402 - after the packages that it needs

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What tells where a notebook was run: folders, and objects' places in memory.
OF_A_MACHINE = r"(?<![\w.])/(tmp|home|root|usr|var|work|Users|opt)/|at 0x[0-9a-f]{6}"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What the outputs of a cell are, apart from what they say."""
    return [
        (output.output_type, output.get("name") or sorted(output.get("data", ())))
        for output in cell.outputs
    ]


def texts(cell):
    for output in cell.outputs:
        yield output.get("text", "")
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield value


def test_there_are_five():
    names = ["inspect_data", "inspect_model", "inspect_weights", "own_data", "shapes"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_start_to_end(path, monkeypatch):
    monkeypatch.setenv("STEPS", "2")
    monkeypatch.delenv("FOLDER", raising=False)
    executed = run.execute(path, timeout=300)
    shipped = nbformat.read(path, as_version=4)
    assert [cell.source for cell in executed.cells] == [cell.source for cell in shipped.cells]
    found, expected = code_cells(executed), code_cells(shipped)
    assert [kinds(cell) for cell in found] == [kinds(cell) for cell in expected]
    assert all(cell.execution_count for cell in found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_shipped_as_it_ran(path):
    assert path.stat().st_size < 500_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [cell.source for cell in cells if any(k == "error" for k, _ in kinds(cell))]
    pictures = [k for cell in cells for k, data in kinds(cell) if "image/jpeg" in data]
    assert len(pictures) >= 3
    for text in map("".join, (t for cell in cells for t in texts(cell))):
        assert not re.search(OF_A_MACHINE, text), text
        assert "Warning" not in text, text
    # What a cell ends with is shown, and a figure would be shown twice.
    assert not [cell.source for cell in cells if "execute_result" in dict(kinds(cell))]


def test_streams_are_saved_as_they_are_shown():
    def stream(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    table = nbformat.v4.new_output("display_data", data={"text/html": "<table></table>"})
    outputs = [
        stream("stderr", "\repoch:  0%"),
        stream("stdout", "a\r\n"),
        table,
        stream("stderr", "\repoch: 50%"),
        stream("stderr", "\repoch: 100%\n\rnext: 0%"),
    ]
    err, out, last = run.merge_streams(outputs)
    assert (err.name, err.text) == ("stderr", "epoch: 100%\nnext: 0%")
    assert (out.name, out.text) == ("stdout", "a\r\n")
    assert last is table
