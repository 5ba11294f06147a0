"""Several processes that train or evaluate together, as torchrun starts them; without it, one."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def average(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def from_main(value: Any) -> Any:
    """The value that the main process has, a plain Python object, in all processes."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """In the main process the values of all, by rank; in the others their own alone."""
    values = [value] * (world_size() if is_main() else 1)
    if world_size() > 1:
        dist.gather_object(value, values if is_main() else None)
    return values


@contextlib.contextmanager
def join(device: str | None = None) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did, and gives each one its device.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None for CUDA where there is one. Under torchrun any
            GPU means that of the process's number on its machine.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if chosen.type == "cuda":
        chosen = torch.device(
            "cuda", int(os.environ["LOCAL_RANK"]) if several else chosen.index or 0
        )
        torch.cuda.set_device(chosen)
    if several:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if several:
            dist.destroy_process_group()
