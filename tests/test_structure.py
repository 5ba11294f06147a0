"""Modules import each other in the order of CONTRIBUTING.md, and an import does nothing else."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# The rows of the table of modules.
ORDER = re.findall(r"^\| `(\w+)/?` +\|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
# What is slow to import, or may be missing, is imported by these alone.
ONLY_IN = {
    "av": {"video"},
    "h5py": {"keras_h5"},
    "matplotlib": {"visualize"},
    "pycocotools": {"evaluation"},
    "safetensors": {"weight_files"},
}


def sources(name):
    path = ROOT / f"{name}.py"
    return [path] if path.is_file() else (ROOT / name).glob("*.py")


def imports(name):
    """The top-level names that a module or package imports, inside of functions too."""
    for path in sources(name):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.partition(".")[0]


NAMES = {path.stem for path in ROOT.glob("*.py")} - {"setup"}
NAMES |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
IMPORTS = {name: set(imports(name)) - {name} for name in NAMES}


def test_every_module_has_a_row():
    assert set(ORDER) == NAMES
    assert len(ORDER) == len(NAMES)


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imported & NAMES for name, imported in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the cycle


def test_modules_import_from_the_rows_above_them():
    for row, name in enumerate(ORDER):
        wrong = IMPORTS[name] & NAMES - set(ORDER[:row])
        assert not wrong, f"{name} imports {sorted(wrong)}, which must then stand above it"


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_stay_where_they_belong(package):
    assert {name for name in NAMES if package in IMPORTS[name]} <= ONLY_IN[package]


def test_an_import_prints_nothing_and_changes_no_setting():
    """Of each module in a process of its own, forked once torch, which takes long, is imported."""
    code = """
import os, sys, torch, numpy
threads, state = torch.get_num_threads(), torch.random.get_rng_state()
for module in ("model", "visualize", "coco", "demo"):
    if os.fork() == 0:
        break
    assert os.wait()[1] == 0, module
else:
    sys.exit()
__import__(module)
assert torch.get_num_threads() == threads
assert torch.equal(torch.random.get_rng_state(), state)
assert "matplotlib.pyplot" not in sys.modules or module == "visualize"
if module == "model":
    assert not {"matplotlib", "pycocotools", "h5py", "safetensors"} & set(sys.modules)
if module != "visualize":  # what would delay every command
    assert not {"matplotlib", "scipy.optimize", "scipy.ndimage", "av"} & set(sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
