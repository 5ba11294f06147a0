"""The CUDA kernels: that nvcc compiles them, and what they compute on the host.

On the host g++ compiles the same .cu files against cuda_emulation.h, and every result is compared
with the CPU kernels. test_gpu.py runs them on a real GPU.
"""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_nms import random_boxes
from test_roialign import SPECIAL, align_sample, sample, samplings

from nms import nms
from roialign import crop_and_resize, roi_align

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    ROOT / "nms" / "csrc" / "nms_cuda.cu",
    ROOT / "roialign" / "csrc" / "crop_and_resize_cuda.cu",
    ROOT / "roialign" / "csrc" / "roi_align_cuda.cu",
]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
NAN = float("nan")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nvcc_compiles(source, tmp_path):
    command = [NVCC, "-c", "-std=c++17", "-fmad=false", "-Werror=all-warnings", str(source)]
    subprocess.run([*command, "-o", str(tmp_path / "kernel.o")], check=True, timeout=300)


DRIVER = """
#include "../nms/csrc/nms_cuda.cu"
#include "../roialign/csrc/crop_and_resize_cuda.cu"
#include "../roialign/csrc/roi_align_cuda.cu"

extern "C" void set_reversed(bool reversed) { emulation::reversed = reversed; }

extern "C" void sweep_mask(const uint64_t* mask, int64_t count, uint64_t* removed, bool* keep) {
  LAUNCH(nms::sweep_overlaps, 1, 64, nullptr, mask, count, 0, count, removed, keep);
}

#define DRIVE(T)                                                                                  \\
  extern "C" int sweep_##T(const T* boxes, int64_t count, T threshold, uint64_t* mask,            \\
                           int64_t mask_rows, uint64_t* removed, bool* keep) {                    \\
    return nms::sweep_boxes(boxes, count, threshold, mask, mask_rows, removed, keep, nullptr);    \\
  }                                                                                               \\
  extern "C" int forward_##T(const roialign::Shape* shape, const T* image, const T* boxes,        \\
                             const int64_t* index, T value, T* crops) {                           \\
    return roialign::crop_forward(*shape, image, boxes, index, value, crops, nullptr);            \\
  }                                                                                               \\
  extern "C" int backward_##T(const roialign::Shape* shape, const T* grad, const T* boxes,        \\
                              const int64_t* index, T* grad_image) {                              \\
    return roialign::crop_backward(*shape, grad, boxes, index, grad_image, nullptr);              \\
  }                                                                                               \\
  extern "C" int align_forward_##T(const roialign::Shape* shape, const T* features,               \\
                                   const T* boxes, const int64_t* index,                          \\
                                   const roialign::Sampling* sampling, T* crops) {                \\
    return roialign::align_forward(*shape, features, boxes, index, *sampling, crops, nullptr);    \\
  }                                                                                               \\
  extern "C" int align_backward_##T(const roialign::Shape* shape, const T* grad, const T* boxes,  \\
                                    const int64_t* index, const roialign::Sampling* sampling,     \\
                                    T* grad_features) {                                           \\
    return roialign::align_backward(*shape, grad, boxes, index, *sampling, grad_features,         \\
                                    nullptr);                                                     \\
  }
DRIVE(float)
DRIVE(double)
"""


class Shape(ctypes.Structure):
    """roialign::Shape"""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("crops", "crop_height", "crop_width")),
        ("channels_last", ctypes.c_bool),
    ]


class Sampling(ctypes.Structure):
    """roialign::Sampling"""

    _fields_ = (("ratio", ctypes.c_int64), ("aligned", ctypes.c_bool))


class Emulation:
    """The launchers of the .cu files on CPU tensors."""

    def __init__(self, library):
        self.library = library

    def call(self, name, dtype, *arguments):
        number = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}[dtype]
        converted = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                assert argument.is_contiguous() or argument.dim() == 4
                argument = ctypes.c_void_p(argument.data_ptr())
            elif isinstance(argument, float):
                argument = number(argument)
            elif isinstance(argument, int):
                argument = ctypes.c_int64(argument)
            converted.append(argument)
        function = getattr(
            self.library, f"{name}_{'float' if number is ctypes.c_float else 'double'}"
        )
        assert function(*converted) == 0

    def nms(self, boxes, scores, threshold, mask_rows):
        order = scores.argsort(stable=True, descending=True)
        count, words = len(order), -(-len(order) // 64)
        # All ones, so that it shows if the kernels read what they have not written.
        mask = torch.full((mask_rows, words), -1)
        removed = torch.zeros(words, dtype=torch.int64)
        keep = torch.empty(count, dtype=torch.bool)
        ranked = boxes[order].contiguous()
        self.call("sweep", boxes.dtype, ranked, count, threshold, mask, mask_rows, removed, keep)
        return order[keep]

    def shape(self, values, crops, size, images, pixels):
        last = values.is_contiguous(memory_format=torch.channels_last)
        last = last and not values.is_contiguous()
        return ctypes.byref(Shape(images, values.shape[1], *pixels, crops, *size, last))

    def forward(self, image, boxes, index, size, value):
        shape = self.shape(image, len(boxes), size, len(image), image.shape[2:])
        crops = torch.empty_like(crop_and_resize(image, boxes, index.clamp(0, 2), *size))
        self.call("forward", image.dtype, shape, image, boxes, index, value, crops)
        return crops

    def backward(self, grad, boxes, index, images, pixels):
        shape = self.shape(grad, len(boxes), grad.shape[2:], images, pixels)
        operator = torch.ops.roialign.crop_and_resize_backward
        image = torch.zeros_like(operator(grad, boxes, index, images, *pixels))
        self.call("backward", grad.dtype, shape, grad, boxes, index, image)
        return image

    def align(self, features, boxes, index, size, sampling):
        shape = self.shape(features, len(boxes), size, len(features), features.shape[2:])
        crops = torch.full_like(roi_align(features, boxes, index.clamp(0, 2), *size), NAN)
        sampling = ctypes.byref(Sampling(*sampling))
        self.call("align_forward", features.dtype, shape, features, boxes, index, sampling, crops)
        return crops

    def align_backward(self, grad, boxes, index, images, pixels, sampling):
        shape = self.shape(grad, len(boxes), grad.shape[2:], images, pixels)
        operator = torch.ops.roialign.roi_align_backward
        features = torch.zeros_like(
            operator(grad, boxes, index.clamp(0, 2), images, *pixels, 1, True)
        )
        sampling = ctypes.byref(Sampling(*sampling))
        self.call("align_backward", grad.dtype, shape, grad, boxes, index, sampling, features)
        return features


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("the emulation needs g++ and the ucontext.h of glibc")
    folder = tmp_path_factory.mktemp("emulation")
    tests = Path(__file__).resolve().parent
    (folder / "cuda_runtime_api.h").write_text(f'#include "{tests / "cuda_emulation.h"}"\n')
    (folder / "driver.cpp").write_text(DRIVER.replace("../", f"{ROOT}/"))
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror"]
    files = [f"-I{folder}", str(folder / "driver.cpp"), "-o", str(folder / "driver.so")]
    subprocess.run(["g++", *flags, *files], check=True)
    return ctypes.CDLL(str(folder / "driver.so"))


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def emulation(library, request):
    library.set_reversed(request.param)
    return Emulation(library)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@both_dtypes
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(
    ("count", "mask_rows"),
    [(1, 64), (2, 64), (63, 64), (64, 64), (65, 128), (300, 320), (300, 128)],
)
def test_emulated_nms(emulation, dtype, threshold, count, mask_rows):
    boxes, scores = random_boxes(count, seed=count)
    boxes = boxes.to(dtype)
    boxes[3::17] = NAN
    boxes[4::19, 2:] = boxes[4::19, :2]
    keep = emulation.nms(boxes, scores, threshold, mask_rows)
    assert keep.tolist() == nms(boxes, scores, threshold).tolist()


def test_emulated_sweep_of_more_words_than_threads(emulation):
    count, words = 70 * 64 - 5, 70
    random = np.random.RandomState(0)
    bits = np.triu(random.random_sample((count, words * 64)) < 0.002, 1)
    mask = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)
    removed, keep = np.zeros(words, np.uint64), np.empty(count, bool)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (mask, removed, keep)]
    emulation.library.sweep_mask(pointers[0], ctypes.c_int64(count), *pointers[1:])
    gone = np.zeros(words * 64, bool)
    for row in range(count):
        if not gone[row]:
            gone |= bits[row]
    assert 500 < keep.sum() < count
    assert (keep == ~gone[:count]).all()


@both_dtypes
@both_layouts
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (1, 3)])
def test_emulated_forward(emulation, dtype, layout, size):
    image, boxes, index = sample(dtype, layout, boxes=40)
    boxes[::5, 2:] = 1
    boxes[::11, 1] = NAN
    crops = emulation.forward(image, boxes, index, size, -2.0)
    assert torch.equal(crops, crop_and_resize(image, boxes, index, *size, -2.0))


@both_layouts
def test_emulated_index_out_of_range_is_outside(emulation, layout):
    image, boxes, index = sample(layout=layout)
    index[::2] = torch.tensor([-1, 3, 2**40, -(2**40), 3, -1])
    crops = emulation.forward(image, boxes, index, (2, 2), 5.0)
    assert (crops[::2] == 5).all()
    assert torch.equal(crops[1::2], crop_and_resize(image, boxes[1::2], index[1::2], 2, 2, 5.0))


@both_dtypes
@both_layouts
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (1, 3)])
def test_emulated_backward(emulation, dtype, layout, size):
    _, boxes, index = sample(dtype, boxes=40)
    boxes[::5, 2:] = 1
    boxes[::11, 1] = NAN
    grad = torch.randn(40, 5, *size, dtype=dtype).contiguous(memory_format=layout)
    grad_image = emulation.backward(grad, boxes, index, 3, (9, 13))
    expected = torch.ops.roialign.crop_and_resize_backward(grad, boxes, index, 3, 9, 13)
    torch.testing.assert_close(grad_image, expected, rtol=1e-5, atol=1e-5)
    assert grad_image.abs().sum() > 0


def align_boxes(dtype):
    """Boxes of all kinds, those of SPECIAL, huge ones, and some that are not finite."""
    _, boxes, _ = align_sample(dtype, boxes=30)
    huge = torch.tensor([[-1e7, -1e3, 1e3, 1e7], [-1e30, 0, 1e30, 9], [0, -3e38, 9, 3e38]])
    boxes = torch.cat([boxes, SPECIAL.to(dtype), huge.to(dtype)])
    boxes[::11, 1] = NAN
    boxes[5::11, 2] = float("inf")
    return boxes, torch.arange(len(boxes)) % 3


@both_dtypes
@both_layouts
@samplings
@pytest.mark.parametrize("size", [(7, 7), (1, 3)])
def test_emulated_align(emulation, dtype, layout, sampling, size):
    features, _, _ = align_sample(dtype, layout)
    boxes, index = align_boxes(dtype)
    crops = emulation.align(features, boxes, index, size, sampling)
    expected = roi_align(features, boxes, index, *size, *sampling)
    torch.testing.assert_close(crops, expected, rtol=1e-5, atol=2e-6)
    assert crops.abs().sum() > 0


@both_layouts
def test_emulated_align_of_an_index_out_of_range_is_zero(emulation, layout):
    features, boxes, index = align_sample(layout=layout)
    index[::2] = torch.tensor([-1, 3, 2**40, -(2**40), 3, -1])
    crops = emulation.align(features, boxes, index, (2, 2), (2, False))
    assert (crops[::2] == 0).all()
    expected = roi_align(features, boxes[1::2], index[1::2], 2, 2, 2, False)
    torch.testing.assert_close(crops[1::2], expected, rtol=1e-5, atol=2e-6)
    expected = emulation.align_backward(crops, boxes, index, 3, (9, 13), (2, False))
    operator = torch.ops.roialign.roi_align_backward
    known = operator(crops[1::2].clone(), boxes[1::2], index[1::2], 3, 9, 13, 2, False)
    torch.testing.assert_close(expected, known, rtol=1e-5, atol=1e-5, check_stride=False)


@both_dtypes
@both_layouts
@samplings
@pytest.mark.parametrize("size", [(7, 7), (1, 3)])
def test_emulated_align_backward(emulation, dtype, layout, sampling, size):
    boxes, index = align_boxes(dtype)
    grad = torch.randn(len(boxes), 5, *size, dtype=dtype).contiguous(memory_format=layout)
    features = emulation.align_backward(grad, boxes, index, 3, (9, 13), sampling)
    operator = torch.ops.roialign.roi_align_backward
    expected = operator(grad, boxes, index, 3, 9, 13, *sampling)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert features.abs().sum() > 0
