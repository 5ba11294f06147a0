"""What nms/, roialign/ and winograd/ share: finding and loading their compiled kernels."""

import logging
from pathlib import Path

import torch

__all__ = ["compiled_devices", "load_kernels"]

logger = logging.getLogger(__name__)


def load_kernels(file: str) -> None:
    """Loads the compiled kernels of an operator, if there are any.

    A library that does not load, such as one built for another torch, gives a warning: the plain
    torch kernels then do the work.

    Args:
        file: the `__file__` of the module that defines the operator; `_C.so` lies beside it.
    """
    package = Path(file).parent
    for library in [*package.glob("_C*.so"), *package.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            logger.warning(
                "the compiled %s does not fit this torch, plain torch takes over; rebuild it with "
                "`pip install -e . --no-build-isolation` (%s)",
                package.name,
                error,
            )


def compiled_devices(operator: str) -> tuple[str, ...]:
    """The devices, of "cpu" and "cuda", with a compiled kernel of an operator like "nms::nms"."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(device for device in ("cpu", "cuda") if has_kernel(operator, device.upper()))
