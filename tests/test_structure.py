"""The modules depend on each other in one direction, and importing them does nothing else."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Each module may import those of the levels before its own.
LEVELS = [
    {"config", "utils", "nms", "roialign", "winograd"},
    {"fused", "weights", "dataset", "visualize"},
    {"training"},
    {"model", "evaluation"},
    {"inspection"},
    {"coco"},
    {"demo"},
]
ONLY_IN = {"matplotlib": {"visualize"}, "pycocotools": {"evaluation"}, "h5py": {"weights"}}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def sources(name):
    path = ROOT / f"{name}.py"
    return [path] if path.is_file() else sorted((ROOT / name).glob("*.py"))


def test_every_module_has_a_level():
    known = set().union(*LEVELS)
    assert {path.stem for path in ROOT.glob("*.py")} - {"setup"} <= known


def test_imports_go_down_only():
    for level, names in enumerate(LEVELS):
        above = set().union(*LEVELS[level:])
        for name in names:
            for path in sources(name):
                assert not (set(imports(path)) & (above - {name})), path.name


def test_heavy_packages_stay_where_they_belong():
    for name in set().union(*LEVELS):
        for path in sources(name):
            for package, users in ONLY_IN.items():
                if package in set(imports(path)):
                    assert name in users, f"{path.name} imports {package}"
    assert "h5py" not in set(imports(ROOT / "weights.py", top_level_only=True))


@pytest.mark.parametrize("module", ["model", "visualize", "coco"])
def test_an_import_prints_nothing_and_changes_no_setting(module):
    code = f"""
import sys, torch, numpy
threads, state = torch.get_num_threads(), torch.random.get_rng_state()
import {module}
assert torch.get_num_threads() == threads
assert torch.equal(torch.random.get_rng_state(), state)
assert "matplotlib.pyplot" not in sys.modules or {module!r} == "visualize"
if {module!r} == "model":
    assert not {{"matplotlib", "pycocotools", "h5py"}} & set(sys.modules)
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
