"""Convolution, BatchNorm, sum and ReLU in one pass on a CPU, in float32 or bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from winograd import is_faster, transform_weight


class Prepared(NamedTuple):
    """A convolution and its BatchNorm as one weight and bias."""

    fingerprint: tuple  # of what they were made of
    weight: Tensor  # in the form that the algorithm takes
    bias: Tensor | None


# Beside the modules, so that copies, pickles and state_dicts know nothing of it.
_prepared: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()


class Mode(NamedTuple):
    """The arguments of fast()."""

    overwrite: bool
    dtype: torch.dtype


_mode: ContextVar[Mode | None] = ContextVar("mode", default=None)  # None outside of fast()


@contextmanager
def fast(overwrite: bool = False, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, and in this thread only, convolve is fast; the rest of torch is as it was.

    Without gradients, the weights that it folds and transforms are kept for the next time. They
    take as much memory as the layers' own, or four times as much where they are transformed for
    Winograd. A layer gives them back when convolve next computes it with a gradient or outside, or
    when it is deleted. With gradients nothing is kept, and there are first derivatives only: no
    double backward, torch.func or activation checkpointing.

    Args:
        overwrite: whether sums may take the place of convolve's argument `add`. That saves a
            twentieth of a detection, the time of touching new memory, but nobody else may use
            what is added.
        dtype: of what goes in and out of layers without gradients: float32, or bfloat16 on a
            processor that can_use_bfloat16.
    """
    token = _mode.set(Mode(overwrite, dtype))
    try:
        yield
    finally:
        _mode.reset(token)


def can_use_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16, rather than a program in its place."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def convolve(
    conv: nn.Conv2d,
    x: Tensor,
    norm: nn.Module | None = None,
    relu: bool = False,
    add: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """norm(conv(x)) + add, and the ReLU of it.

    Inside fast() in one pass, and by Winograd's algorithm where that pays, if all is on the CPU,
    weights are float32, BatchNorm is in evaluation mode, and conv and norm have no hooks. Then the
    largest difference in float32 is about 2e-6 of the largest output. Weights may change at any
    time and in any way.

    Args:
        x: [B, C, H, W].
        add: [B, K, h, w].
        exact: whether to compute in float32 in any case, for what must not be rounded.
    """
    if torch.compiler.is_compiling():  # which fuses on its own, and cannot look up what is prepared
        return _one_by_one(conv, x, norm, relu, add)
    if exact and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _one_by_one(conv, x.to(conv.weight.dtype), norm, relu, add)
    mode, learning = _mode.get(), torch.is_grad_enabled()
    fusible = mode is not None and _can_fuse(conv, x, norm, add)
    if learning or not fusible:
        _prepared.pop(conv, None)  # training needs the memory
    if mode is None or not fusible or len(x) == 0:
        return _one_by_one(conv, x, norm, relu, add)
    dtype = torch.float32 if exact or learning else mode.dtype
    x, add = x.to(dtype), None if add is None else add.to(dtype)
    if dtype != torch.float32:  # of 16 bits, oneDNN adds in this layout only
        x = x.contiguous(memory_format=torch.channels_last)
        add = None if add is None else add.contiguous(memory_format=torch.channels_last)
    winograd = add is None and dtype == torch.float32 and _suits_winograd(conv, x)
    if learning:
        weight, bias = fold(conv, norm)
        if winograd:
            return _Winograd.apply(x, weight, bias, relu)
    else:
        weight, bias = _prepare(conv, norm, dtype, "winograd" if winograd else "direct")
        if winograd:
            return torch.ops.winograd.conv3x3(x, weight, bias, relu)
        if _has_onednn():
            return _onednn(conv, x, weight, bias, relu, add, mode.overwrite)
    bias = None if bias is None else bias.to(x.dtype)
    x = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    x = x if add is None else x.add_(add)
    return x.relu_() if relu else x


def dense(conv: nn.Conv2d, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    """The ReLU of norm(conv(x)), [R, K, 1, 1], of x [R, C, P, P] and a kernel as large as that.

    A product of matrices, otherwise as convolve.
    """
    mode = None if torch.compiler.is_compiling() else _mode.get()
    if mode is None or torch.is_grad_enabled() or not _can_fuse(conv, x, norm, None):
        if not torch.compiler.is_compiling():
            _prepared.pop(conv, None)
        x = _widen(x, conv)
        x = F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]
        return F.relu(x if norm is None else norm(x))
    weight, bias = _prepare(conv, norm, mode.dtype, "dense")
    x = F.linear(x.to(mode.dtype).permute(0, 2, 3, 1).flatten(1), weight, bias)
    return F.relu(x, inplace=True)[:, :, None, None]


def deconvolve(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """The ReLU of a transposed convolution with kernel 2 and stride 2, [R, P, P, 2, 2, K].

    Computed as the product of matrices it is, since each output sees one input.
    """
    assert conv.bias is not None
    weight, bias = conv.weight.permute(2, 3, 1, 0).flatten(0, 2), conv.bias.repeat(4)
    mode = _mode.get()
    if mode and mode.dtype == x.dtype != weight.dtype:
        weight = weight.to(x.dtype)
    pixels = x.permute(0, 2, 3, 1)
    # Of two dimensions: in place on the view that more would be, a ReLU has a slow gradient.
    x = F.relu(F.linear(pixels.flatten(0, 2), weight, bias.to(x.dtype)), inplace=True)
    return x.view(*pixels.shape[:3], 2, 2, conv.out_channels)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what goes in and out of a module, or its forward was replaced."""
    hooks: Any = module._forward_hooks, module._forward_pre_hooks
    hooks = *hooks, module._backward_hooks, module._backward_pre_hooks
    everywhere: Any = _global_forward_hooks, _global_forward_pre_hooks
    everywhere = *everywhere, _global_backward_hooks, _global_backward_pre_hooks
    return any(hooks) or any(everywhere) or "forward" in vars(module)


def fold(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a convolution that does what conv and then norm do."""
    if norm is None:
        return conv.weight, conv.bias
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    weight = conv.weight * scale.float().view(-1, 1, 1, 1)
    return weight, (norm.bias + shift * scale).float()


class _Winograd(torch.autograd.Function):
    """F.conv2d(x, weight, bias, padding=1) and ReLU, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        output = torch.ops.winograd.conv3x3(x, transform_weight(weight), bias, relu)
        ctx.save_for_backward(x, weight, output if relu else None)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, output = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        if output is not None:
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = grad_bias = None
        if to_x:
            turned = transform_weight(weight.flip(2, 3).transpose(0, 1))
            grad_x = torch.ops.winograd.conv3x3(grad, turned, None, False)
        if to_weight:
            grad_weight = torch.ops.winograd.weight_gradient(x, grad)
        if to_bias:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


def _has_onednn() -> bool:
    there = torch.backends.mkldnn.is_available()
    return there and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


def _onednn(
    conv: nn.Conv2d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    add: Tensor | None,
    overwrite: bool,
) -> Tensor:
    """In one pass what torch.compile makes of such layers: twice as fast as one by one."""
    if add is not None and bias is not None:
        bias = bias.to(x.dtype)  # without a sum it may be more exact
    options: tuple = bias, conv.padding, conv.stride, conv.dilation, conv.groups
    if add is None:
        options = *options, "relu" if relu else "none", [], ""
        return torch.ops.mkldnn._convolution_pointwise(x, weight, *options)
    options = *options, "add", 1.0, "relu" if relu else None, [], ""
    if overwrite:
        return torch.ops.mkldnn._convolution_pointwise_.binary(add, x, weight, *options)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, add, weight, *options)


def _prepare(
    conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype, form: str
) -> tuple[Tensor, Tensor | None]:
    """fold in a form, "direct", "winograd" or "dense", anew only if a tensor has changed."""
    if norm is None and form == "direct" and dtype == torch.float32:
        return conv.weight, conv.bias
    tensors = map(_fingerprint, _tensors(conv, norm))
    fingerprint = dtype, form, getattr(norm, "eps", None), *tensors
    prepared = _prepared.get(conv)
    if prepared is None or prepared.fingerprint != fingerprint:
        weight, bias = fold(conv, norm)
        if form == "winograd":
            weight = transform_weight(weight)
        elif form == "dense":
            weight = weight.permute(0, 2, 3, 1).flatten(1)  # of pixels in channels_last
        bias = bias if bias is None or form == "direct" else bias.to(dtype)
        prepared = _prepared[conv] = Prepared(fingerprint, weight.to(dtype), bias)
    return prepared.weight, prepared.bias


def _tensors(conv: nn.Conv2d, norm: nn.Module | None) -> list[Any]:
    """All that the result depends on; a BatchNorm may lack some."""
    tensors: list[Any] = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
    if isinstance(norm, nn.BatchNorm2d):
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return tensors


# A prime, so that the same place in different filters or channels is in different columns.
_COLUMNS = 4099


def _fingerprint(tensor: Tensor) -> tuple:
    """Differs whenever anything in a float32 tensor has changed, in whatever way.

    A small tensor is its own fingerprint. Of a large one it is the sums of its 64-bit words in
    _COLUMNS columns, which take a percent of a detection or so. Any change of one number changes a
    sum. Changes of several go unseen only if they cancel out within each column, whose words lie
    multiples of 33 kB apart.
    """
    numbers = tensor.detach()
    if tensor.numel() <= 2 * _COLUMNS:
        return tensor.shape, numbers.numpy().tobytes()
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        numbers = numbers.permute(0, 2, 3, 1)
    numbers = numbers.reshape(-1).contiguous()  # no copy, since in the order of the memory
    start = numbers.storage_offset() % 2
    stop = start + (len(numbers) - start) // (2 * _COLUMNS) * 2 * _COLUMNS
    sums = numbers[start:stop].view(torch.int64).view(-1, _COLUMNS).sum(dim=0)
    parts = numbers[:start], numbers[stop:], sums
    return tensor.shape, tensor.stride(), *(part.numpy().tobytes() for part in parts)


def _can_fuse(conv: nn.Conv2d, x: Tensor, norm: nn.Module | None, add: Tensor | None) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return False
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if norm is not None and not (
        isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.BatchNorm2d.forward
    ):
        return False
    if is_watched(conv) or (norm is not None and (norm.training or is_watched(norm))):
        return False
    mode = _mode.get()
    maps = [x] if add is None else [x, add]
    return all(
        isinstance(t, Tensor)
        and t.device.type == "cpu"
        and (t.dtype == torch.float32 or (i < len(maps) and mode and t.dtype == mode.dtype))
        for i, t in enumerate([*maps, *_tensors(conv, norm)])
    )


def _suits_winograd(conv: nn.Conv2d, x: Tensor) -> bool:
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    plain = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    return plain and is_faster(x.shape, conv.weight.shape)


def _widen(x: Tensor, module: nn.Module) -> Tensor:
    """What layers before made in 16 bits, as a layer that is not fused takes it."""
    if (mode := _mode.get()) and x.dtype == mode.dtype != torch.float32:
        return x.to(next((p.dtype for p in module.parameters()), torch.float32))
    return x


def _one_by_one(
    conv: nn.Conv2d, x: Tensor, norm: nn.Module | None, relu: bool, add: Tensor | None
) -> Tensor:
    """The definition: what convolve computes, in plain torch."""
    x, add = _widen(x, conv), None if add is None else _widen(add, conv)
    x = conv(x) if norm is None else norm(conv(x))
    x = x if add is None else x + add
    # What a hook may have kept stays as it is.
    kept = add is None and (is_watched(conv) or (norm is not None and is_watched(norm)))
    return F.relu(x, inplace=not kept) if relu else x
