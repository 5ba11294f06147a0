"""Installs the modules and builds the operators: C++, and CUDA where nvcc is there.

    pip install -e . --no-build-isolation

WITH_CUDA=0 leaves CUDA out and TORCH_CUDA_ARCH_LIST chooses its architectures. What cannot be built
is left out with a warning, and the plain torch kernels take over.
"""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

MODULES = sorted(path.stem for path in Path().glob("*.py") if path.name != "setup.py")
PACKAGES = sorted(path.parent.name for path in Path().glob("*/__init__.py"))
OPERATORS = [name for name in PACKAGES if any(Path(name, "csrc").glob("*.cpp"))]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def find_cuda() -> Path | None:
    """The CUDA toolkit; the nvcc on the PATH may be a wrapper script outside of it."""
    if os.environ.get("WITH_CUDA") == "0":
        return None
    if given := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(given)
    nvcc = shutil.which("nvcc")
    homes = [*([Path(nvcc).resolve().parents[1]] if nvcc else []), Path("/usr/local/cuda")]
    for home in homes:
        if (home / "bin" / "nvcc.profile").is_file():
            return home
    if nvcc:
        error = FileNotFoundError(f"no toolkit around {nvcc}: set CUDA_HOME")
        warn("the operators are not compiled for CUDA", error)
    return None


def architecture_flags(cuda: Path) -> list[str]:
    """Code for every architecture that this nvcc knows, and PTX of the last for later ones."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # torch turns it into flags
    command = [str(cuda / "bin" / "nvcc"), "--list-gpu-arch"]
    known = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    codes = [code for code in ARCHITECTURES if f"compute_{code}" in known]
    flags = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    return [*flags, f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}"]


def warn(what: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    remedy = "once that is solved, `pip install -e . --no-build-isolation` builds it"
    warnings.warn(f"{what} ({reason}); {remedy}", stacklevel=2)


def operators() -> dict[str, Any]:
    """The arguments of setup() that build the operators with the installed torch."""
    cuda = find_cuda()
    if cuda:
        os.environ["CUDA_HOME"] = str(cuda)  # read by the import below
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        warn("the operators are not compiled: torch cannot be imported", error)
        return {}
    nvcc = []
    if torch.version.cuda is None:
        cuda = None
    elif cuda:
        try:
            nvcc = ["-O3", "-fmad=false", "--threads=2", *architecture_flags(cuda)]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            warn("the operators are not compiled for CUDA: nvcc does not run", error)
            cuda = None

    cxx = ["/O2"] if os.name == "nt" else ["-O3", "-g0"]
    if sys.platform == "linux" and torch.backends.openmp.is_available():
        cxx.append("-fopenmp")
    # No fused multiply-add: TensorFlow's arithmetic, and the same bits on every device.
    exact = [] if os.name == "nt" else ["-ffp-contract=off"]
    # winograd is about speed; it passes vectors only to functions that are inlined.
    fast = ["-ffp-contract=fast", "-Wno-psabi"]

    def extension(package: str) -> Extension:
        folder, common = Path(package, "csrc"), Path("operators", "csrc")
        with_cuda = cuda and any(folder.glob("*.cu"))
        make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
        flags = fast if package == "winograd" else exact
        return make(
            f"{package}._C",
            sorted(str(path) for path in folder.glob("*.c*") if with_cuda or path.suffix == ".cpp"),
            depends=sorted(str(path) for path in (*folder.iterdir(), *common.iterdir())),
            define_macros=[("WITH_CUDA", None)] if with_cuda else [],
            extra_compile_args={"cxx": [*cxx, *flags], "nvcc": nvcc},
            # A library built for another torch then fails when it is loaded, not when it is called.
            extra_link_args=["-Wl,-z,now"] if sys.platform == "linux" else [],
            py_limited_api=True,  # one library for every Python: there is none in it
        )

    class BuildOperators(cpp_extension.BuildExtension):
        """Builds with CUDA, else without, else nothing: the install itself does not fail."""

        compiler: Any
        inplace: bool
        extensions: list[Extension]

        def run(self) -> None:
            compiler, inplace = self.compiler, self.inplace
            for target in ("CUDA", "CPU") if cuda else ("CPU",):
                if target == "CPU":
                    for ext in self.extensions:
                        ext.sources = [name for name in ext.sources if name.endswith(".cpp")]
                        ext.libraries = [name for name in ext.libraries if "cuda" not in name]
                        ext.define_macros = []
                self.compiler, self.inplace = compiler, inplace  # changed by a failed run
                try:
                    return super().run()
                except Exception as error:
                    warn(f"the operators are not compiled for {target}", error)
            self.extensions = []

    # Visual C++ has no vector types: there, winograd stays in plain torch.
    compiled = [package for package in OPERATORS if os.name != "nt" or package != "winograd"]
    return {
        "ext_modules": [extension(package) for package in compiled],
        "cmdclass": {"build_ext": BuildOperators.with_options(no_python_abi_suffix=True)},
    }


setup(
    packages=PACKAGES,
    package_data={"samples": ["*.pth", "*.json"], "report": ["*.html", "*.css", "*.js"]},
    include_package_data=False,
    py_modules=MODULES,
    **operators(),
)
