"""Damages weight files at random and reads them: python tests/fuzz_weights.py SEED COUNT FOLDER

Prints a line for each file that ends in another way than a ValueError, an OSError or weights that
can be described, or that takes seconds or much memory. In a process of its own, since HDF5 may end
it: the line "seed N" that was printed last then tells by which file.
"""

import io
import pickle
import resource
import sys
import time
import traceback
import zipfile
from pathlib import Path

import family_weights as fw
import h5py
import numpy as np
import safetensors.torch
import torch

import weights

SECONDS, MEGABYTES = 5.0, 300
NUMBERS = (0, 1, 2**16, 2**31 - 1, 2**32, 2**48, 2**63, 2**64 - 1)


def samples():
    """{suffix: bytes} of small files of each format, most of whose bytes are not arrays."""
    shapes = {"conv1/kernel:0": (3, 3, 3, 4), "conv1/bias:0": (4,), "bn_conv1/gamma:0": (4,)}
    shapes |= {"mrcnn_class_logits/kernel:0": (10, 2), "fc1000/kernel:0": (2, 2)}
    keras = {}
    for name, options in (("plain", {}), ("packed", {"chunks": True, "compression": "gzip"})):
        buffer = io.BytesIO()
        with h5py.File(buffer, "w", libver="latest" if name == "packed" else "earliest") as file:
            for path, shape in shapes.items():
                array = np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
                layer = path.partition("/")[0]
                file.create_dataset(f"{layer}/{path}", data=array, **options)
                file[layer].attrs["weight_names"] = [path.encode()]
        keras[name] = buffer.getvalue()
    state = {"fpn.C1.0.weight": torch.rand(4, 3, 3, 3), "fpn.C1.0.bias": torch.rand(4).half()}
    state |= {"classifier.linear_class.weight": torch.rand(2, 10).t(), "other": torch.tensor(3)}
    files = {"plain.h5": keras["plain"], "packed.h5": keras["packed"]}
    config = {"BACKBONE": {"blocks": [1, 1, 1, 1], "width": 4}, "NUM_CLASSES": 10, "NAME": "a"}
    checkpoint = {"model": state, "config": config, "version": "1", "training": {"step": 3}}
    for name, data, new in (("new.pth", checkpoint, True), ("old.pth", state, False)):
        buffer = io.BytesIO()
        torch.save(data, buffer, _use_new_zipfile_serialization=new)
        files[name] = buffer.getvalue()
    files |= family_samples()
    contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
    files["model.safetensors"] = safetensors.torch.save(contiguous)
    return files


def family_samples():
    """Files of torchvision and detectron2 with one number on nearly every side."""

    def shrunk(shapes):
        return {k: tuple(1 if n > 16 and n % 49 else n for n in s) for k, s in shapes.items()}

    body = fw.resnet_shapes((1, 1, 1, 1), 64, 1)
    model = shrunk(fw.detectron2_shapes("tiny", classes=3, pyramid=1, fully=2))
    model = {k: torch.from_numpy(a.copy()) for k, a in fw.arrays(model).items()}
    files = {}
    for name, data, protocol in (
        ("model.pkl", {"model": {k: t.numpy() for k, t in model.items()}, "__author__": "a"}, 4),
        ("resnet.pkl", {"model": fw.arrays(shrunk(body)), "__author__": "a"}, 2),
        ("buffers.pkl", {"blobs": {"res2_0_branch2c_w": np.ones(2), "cfg": "text"}}, 5),
    ):
        files[name] = pickle.dumps(data, protocol=protocol)
    buffer = io.BytesIO()
    torch.save({"model": model, "iteration": 3}, buffer)
    files["family.pth"] = buffer.getvalue()
    return files


def damaged(content, random):
    """A copy in which bytes are changed, moved, left out or repeated."""
    content = bytearray(content)
    for _ in range(random.integers(1, 9)):
        where = int(random.integers(len(content)))
        kind = random.integers(10)
        if kind < 3:
            content[where] ^= 1 << int(random.integers(8))
        elif kind < 6:
            content[where] = int(random.choice([0, 1, 2, 127, 128, 254, 255]))
        elif kind < 8:
            number = NUMBERS[random.integers(len(NUMBERS))]
            content[where : where + 8] = number.to_bytes(8, "little")[: len(content) - where]
        else:
            start, length = int(random.integers(len(content))), int(random.integers(64))
            content[where : where + length * int(kind == 8)] = content[start : start + length]
    return bytes(content[: random.integers(len(content))] if random.integers(12) == 0 else content)


def damaged_inside(content, random):
    """A zip archive whose members are damaged and whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl") or (data and random.integers(8) == 0):
                data = damaged(data, random)
            new.writestr(name, data)
    return buffer.getvalue()


def check(path):
    """What is wrong with how a file is read, or None."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fault = None
    try:
        weights.describe(path)
        weights.read_options(path)
    except (ValueError, OSError) as error:
        text = str(error)
        if not text.isprintable() or path.name not in text or len(text) > 2000:
            fault = f"message {text!r:.300}"
    except BaseException:
        fault = traceback.format_exc()
    seconds = time.monotonic() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if seconds > SECONDS or grown > MEGABYTES:
        fault = f"{seconds:.1f} seconds, {grown} megabytes; {fault}"
    return fault


def main(seed, count, folder):
    files = sorted(samples().items())
    for number in range(seed, seed + count):
        print("seed", number, flush=True)
        random = np.random.default_rng(number)
        name, content = files[number % len(files)]
        if name in ("new.pth", "family.pth") and random.integers(2):
            content = damaged_inside(content, random)
        else:
            content = damaged(content, random)
        path = Path(folder) / f"{number}_{name}"
        path.write_bytes(content)
        if fault := check(path):
            print(f"FAULT {path}: {fault}", flush=True)
        else:
            path.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
