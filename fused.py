"""Convolution, BatchNorm, sum and ReLU in one pass, for detection in float32 on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from winograd import is_faster, transform_weight


class Prepared(NamedTuple):
    """A convolution and its BatchNorm as one weight and bias."""

    fingerprint: tuple  # of what they were made of
    weight: Tensor  # in the form that the algorithm takes
    bias: Tensor | None


# Beside the modules, so that copies, pickles and state_dicts know nothing of it.
_prepared: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()

# Of this thread: None outside of inference(), else its argument.
_overwrite: ContextVar[bool | None] = ContextVar("overwrite", default=None)


@contextmanager
def inference(overwrite: bool = False) -> Iterator[None]:
    """Inside, and in this thread only, convolve is fast; the rest of torch is as it was.

    The weights that it folds and transforms are kept for the next time. They take as much memory
    as the layers' own, or four times as much where they are transformed for Winograd. A layer
    gives them back when it is next computed without them, as in training, or deleted.

    Args:
        overwrite: whether sums may take the place of convolve's argument `add`. That saves a
            twentieth of a detection, the time of touching new memory, but nobody else may use
            what is added.
    """
    token = _overwrite.set(overwrite)
    try:
        yield
    finally:
        _overwrite.reset(token)


def convolve(
    conv: nn.Conv2d,
    x: Tensor,
    norm: nn.Module | None = None,
    relu: bool = False,
    add: Tensor | None = None,
    winograd: bool = True,
) -> Tensor:
    """norm(conv(x)) + add, and the ReLU of it.

    Inside inference() in one pass, and by Winograd's algorithm where that pays, if all is float32
    on the CPU, in evaluation mode, without gradients and without hooks on conv and norm. Then the
    largest difference is about 3e-6 of the largest output. Weights may change at any time and in
    any way.

    Args:
        x: [B, C, H, W].
        add: [B, K, h, w].
        winograd: False for layers whose errors would add up to several times those of torch's
            own convolutions, as in the depth of a ResNet.
    """
    if torch.compiler.is_compiling():  # which fuses on its own, and cannot look up what is prepared
        return _one_by_one(conv, x, norm, relu, add)
    overwrite = _overwrite.get()
    if overwrite is None or not _can_fuse(conv, x, norm, add):
        _prepared.pop(conv, None)  # training needs the memory
        return _one_by_one(conv, x, norm, relu, add)
    use_winograd = winograd and add is None and _suits_winograd(conv)
    if len(x) == 0 or (use_winograd and not is_faster(x.shape, conv.weight.shape)):
        # A small map after large ones (P6) is not worth a second form of the weight.
        return _one_by_one(conv, x, norm, relu, add)
    weight, bias = _prepare(conv, norm, use_winograd)
    if use_winograd:
        return torch.ops.winograd.conv3x3(x, weight, bias, relu)
    options: tuple = bias, conv.padding, conv.stride, conv.dilation, conv.groups
    # What torch.compile makes of such layers on a CPU: twice as fast as one after the other.
    if torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise_"
    ):
        if add is None:
            options = *options, "relu" if relu else "none", [], ""
            return torch.ops.mkldnn._convolution_pointwise(x, weight, *options)
        options = *options, "add", 1.0, "relu" if relu else None, [], ""
        if overwrite:
            return torch.ops.mkldnn._convolution_pointwise_.binary(add, x, weight, *options)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, add, weight, *options)
    x = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    x = x if add is None else x.add_(add)
    return x.relu_() if relu else x


def is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what goes in and out of a module, or its forward was replaced."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    everywhere = _global_forward_hooks, _global_forward_pre_hooks
    return any(hooks) or any(everywhere) or "forward" in vars(module)


def fold(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a convolution that does what conv and then norm do."""
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    if norm is None:
        return weight, bias
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    weight = (weight * scale.view(-1, 1, 1, 1)).float()
    return weight, (norm.bias.detach() + shift * scale).float()


def _prepare(
    conv: nn.Conv2d, norm: nn.Module | None, use_winograd: bool
) -> tuple[Tensor, Tensor | None]:
    """fold, transformed for Winograd if it is used, anew only if a tensor has changed."""
    if norm is None and not use_winograd:
        return conv.weight, conv.bias
    fingerprint = use_winograd, getattr(norm, "eps", None), *map(_fingerprint, _tensors(conv, norm))
    prepared = _prepared.get(conv)
    if prepared is None or prepared.fingerprint != fingerprint:
        weight, bias = fold(conv, norm)
        if use_winograd:
            # Piece by piece, since it needs a multiple of their memory.
            pieces = [transform_weight(piece) for piece in weight.split(32)]
            weight = torch.cat(pieces, dim=1)
        prepared = _prepared[conv] = Prepared(fingerprint, weight, bias)
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
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if norm is not None and not (
        isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.BatchNorm2d.forward
    ):
        return False
    modules = [conv] if norm is None else [conv, norm]
    if any(module.training or is_watched(module) for module in modules):
        return False
    tensors: list[Any] = (
        [x, *_tensors(conv, norm)] if add is None else [x, add, *_tensors(conv, norm)]
    )
    return all(
        isinstance(t, Tensor) and t.device.type == "cpu" and t.dtype == torch.float32
        for t in tensors
    )


def _suits_winograd(conv: nn.Conv2d) -> bool:
    """Whether Winograd is fast on a large map."""
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    shape = 1, conv.in_channels, 64, 64
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and is_faster(shape, conv.weight.shape)


def _one_by_one(
    conv: nn.Conv2d, x: Tensor, norm: nn.Module | None, relu: bool, add: Tensor | None
) -> Tensor:
    """The definition: what convolve computes, in plain torch."""
    x = conv(x) if norm is None else norm(conv(x))
    x = x if add is None else x + add
    # What a hook may have kept stays as it is.
    kept = add is None and (is_watched(conv) or (norm is not None and is_watched(norm)))
    return F.relu(x, inplace=not kept) if relu else x
