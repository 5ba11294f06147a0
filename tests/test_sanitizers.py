"""The C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer.

Their sources are compiled for the CPU in a copy of what they need, and their tests run there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_operators import OPERATORS

COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
FAULTS = """
extern "C" int read(const int* values, int place) { return values[place]; }
extern "C" int add(int a, int b) { return a + b; }
"""


def libraries():
    """What has to be loaded before Python: it is not built with the sanitizers itself."""
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):  # without the second, nothing can be thrown
        command = [COMPILER, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        paths += [found] if Path(found).is_file() else []
    return paths


pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which(COMPILER) is None or len(libraries()) < 2,
        reason="there is no g++ with AddressSanitizer",
    ),
]


def run_sanitized(folder, *arguments):
    """Runs Python in a folder whose libraries are built with the sanitizers.

    Returns:
        The exit status, and what it printed.
    """
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave much to the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("faults.read(values, 999)", None),
        ("faults.read(values, 1000)", "AddressSanitizer: heap-buffer-overflow"),
        ("faults.add(2**31 - 1, 1)", "signed integer overflow: 2147483647 + 1"),
    ],
)
def test_a_fault_ends_the_process_with_a_report(tmp_path, call, message):
    (tmp_path / "faults.cpp").write_text(FAULTS)
    command = [COMPILER, *FLAGS, "-shared", "-fPIC", "faults.cpp", "-o", "faults.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    code = "import ctypes; faults = ctypes.CDLL('./faults.so'); values = (ctypes.c_int * 1000)();"
    status, output = run_sanitized(tmp_path, "-c", f"{code} {call}")
    assert (status != 0) == (message is not None), output
    assert message is None or message in output


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the modules, operators and tests, compiled with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized") / "checkout"
    folder.mkdir()
    for path in (
        *ROOT.glob("*.py"),
        *map(ROOT.joinpath, ("pyproject.toml", "README.md", "LICENSE")),
    ):
        shutil.copy(path, folder)
    for name in ("operators", *OPERATORS, "tests"):
        ignored = shutil.ignore_patterns("_C*", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    flags = {"CFLAGS": " ".join(FLAGS), "LDFLAGS": FLAGS[0], "WITH_CUDA": "0"}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | flags,
        check=True,
        timeout=900,
    )
    return folder


def test_the_operators_pass_their_tests(checkout):
    for name in OPERATORS:
        (library,) = (checkout / name).glob("_C*.so")
        for part in (b"__asan_report", b"__ubsan_handle"):
            assert part in library.read_bytes(), f"{library} is built without the sanitizers"
    tests = [f"tests/test_{name}.py" for name in ("operators", *OPERATORS)]
    options = ["-q", "-rs", "-p", "no:cacheprovider"]
    status, output = run_sanitized(checkout, "-m", "pytest", *options, *tests)
    assert status == 0, output
    assert "is not compiled" not in output
