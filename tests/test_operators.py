"""Loading compiled kernels: where there are none, where they do not fit, and which there are."""

import importlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from operators import compiled_devices

OPERATORS = sorted({path.parent.parent.name for path in ROOT.glob("*/csrc/*.cpp")})


def run_unbuilt(code, folder, library=None):
    """Runs code beside copies of the packages without their compiled libraries.

    Args:
        code: what to run, in a process of its own.
        folder: for the copies.
        library: bytes that take the place of every compiled library.

    Returns:
        What the code prints, and what it writes to stderr.
    """
    for package in ("operators", *OPERATORS):
        (folder / package).mkdir()
        for source in (ROOT / package).glob("*.py"):
            shutil.copy(source, folder / package)
        if library is not None:
            (folder / package / "_C.so").write_bytes(library)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip(), result.stderr.strip()


def test_a_library_that_does_not_load_is_named_with_the_remedy(tmp_path):
    code = f"import {', '.join(OPERATORS)}\n"
    code += "\n".join(f"assert {package}.is_compiled() == ()" for package in OPERATORS)
    output, warnings = run_unbuilt(code, tmp_path, library=b"built for another torch")
    assert output == ""
    for package, warning in zip(OPERATORS, warnings.splitlines(), strict=True):
        assert f"the compiled {package} does not fit this torch, plain torch takes over" in warning
        assert "`pip install -e . --no-build-isolation`" in warning


@pytest.mark.parametrize("package", OPERATORS)
def test_a_library_that_was_built_is_loaded(package):
    if not [*(ROOT / package).glob("_C*.so"), *(ROOT / package).glob("_C*.pyd")]:
        pytest.skip(f"{package} is not compiled")
    assert "cpu" in importlib.import_module(package).is_compiled()


def test_compiled_devices():
    library = torch.library.Library("test_operators", "DEF")
    library.define("double(Tensor x) -> Tensor")
    for dispatch_key, expected in (
        ("CompositeExplicitAutograd", ()),
        ("CUDA", ("cuda",)),
        ("CPU", ("cpu", "cuda")),
    ):
        library.impl("double", lambda x: 2 * x, dispatch_key)
        assert compiled_devices("test_operators::double") == expected
