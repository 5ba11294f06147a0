"""Convolution, BatchNorm, sum and ReLU in one pass, for detection in float32 on a CPU."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from winograd import is_faster, transform_weight


class Folded(NamedTuple):
    """A convolution and its BatchNorm as one weight and bias."""

    version: tuple  # of what they were made of
    weight: Tensor  # in the form that the algorithm takes
    bias: Tensor | None


# Beside the modules, so that copies, pickles and state_dicts know nothing of it.
_prepared: WeakKeyDictionary[nn.Module, Folded | None] = WeakKeyDictionary()


def prepare(model: nn.Module) -> None:
    """Lets convolve be fast with the convolutions of a model.

    Their folded weights are made where they are first used, and kept. They take as much memory as
    the weights themselves, or four times as much where they are transformed for Winograd.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            _prepared.setdefault(module, None)


def drop(model: nn.Module) -> None:
    """Undoes prepare and frees the memory."""
    for module in model.modules():
        _prepared.pop(module, None)


def convolve(
    conv: nn.Conv2d,
    x: Tensor,
    norm: nn.Module | None = None,
    relu: bool = False,
    add: Tensor | None = None,
    overwrite: bool = False,
    winograd: bool = True,
) -> Tensor:
    """norm(conv(x)) + add, and the ReLU of it.

    In one pass, by Winograd's algorithm where that pays, if the convolution is prepared, in
    evaluation mode, in float32 on the CPU and without a gradient; the largest difference is about
    3e-6 of the largest output. Weights may change at any time, in place too.

    Args:
        x: [B, C, H, W].
        add: [B, K, h, w].
        overwrite: whether the result may take the place of `add`, which saves time.
        winograd: False for layers whose errors would add up to several times those of torch's
            own convolutions, as in the depth of a ResNet.
    """
    fusable = _can_fuse(conv, x, norm, add)
    winograd = fusable and winograd and _suits_winograd(conv)
    # A small map after large ones (P6) shall not need a second form of the weight.
    small = winograd and not (add is None and is_faster(x.shape, conv.weight.shape))
    if small or not fusable:
        x = conv(x)
        x = x if norm is None else norm(x)
        x = x if add is None else x + add
        return F.relu(x, inplace=True) if relu else x
    version = _version(conv, norm)
    folded = _prepared[conv]
    if folded is None or folded.version != version:
        weight, bias = fold(conv, norm)
        if winograd:
            # Piece by piece, since it needs a multiple of their memory.
            pieces = [transform_weight(piece) for piece in weight.split(32)]
            weight = torch.cat(pieces, dim=1)
        folded = _prepared[conv] = Folded(version, weight, bias)
    _, weight, bias = folded
    if winograd:
        return torch.ops.winograd.conv3x3(x, weight, bias, relu)
    if add is not None and not overwrite:
        add = add.clone()
    # What torch.compile makes of such layers on a CPU: twice as fast as one after the other.
    if torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise_"
    ):
        options = bias, conv.padding, conv.stride, conv.dilation, conv.groups
        if add is None:
            unary = "relu" if relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, weight, *options, unary, [], "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            add, x, weight, *options, "add", 1.0, "relu" if relu else None, [], ""
        )
    x = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    x = x if add is None else add.add_(x)
    return x.relu_() if relu else x


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


def _can_fuse(conv: nn.Conv2d, x: Tensor, norm: nn.Module | None, add: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or conv not in _prepared:
        return False
    for module in (conv,) if norm is None else (conv, norm):
        # A hook may look at what is not computed here, or change it.
        if module.training or module._forward_hooks or module._forward_pre_hooks:
            return False
    if norm is not None and not (
        isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats
    ):
        return False
    tensors = (x, conv.weight) if add is None else (x, conv.weight, add)
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors):
        return False
    return not (torch.is_autocast_enabled("cpu") or len(x) == 0 or isinstance(conv.padding, str))


def _suits_winograd(conv: nn.Conv2d) -> bool:
    """Whether Winograd is fast on a large map."""
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    shape = 1, conv.in_channels, 64, 64
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and is_faster(shape, conv.weight.shape)


def _version(conv: nn.Conv2d, norm: nn.Module | None) -> tuple:
    """Changes with the weights, wherever they are changed."""
    tensors = [conv.weight, conv.bias]
    if isinstance(norm, nn.BatchNorm2d):
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return (
        # Changes of weight.data are not counted in _version: the sum of a filter shows most.
        conv.weight.detach()[0].sum().item(),
        norm.eps if isinstance(norm, nn.BatchNorm2d) else None,
        *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None),
    )
