"""Pixels in memory: tensors, and whatever has the buffer protocol, as NumPy's arrays do."""

import ctypes
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanoglimpse.errors import UsageError

# By the format letters of Python's `struct`.
TYPES = {
    "?": torch.bool,
    "B": torch.uint8,
    "b": torch.int8,
    "H": torch.uint16,
    "h": torch.int16,
    "i": torch.int32,
    "l": torch.int64,
    "q": torch.int64,
    "e": torch.float16,
    "f": torch.float32,
    "d": torch.float64,
}
ACCEPTED = (
    "a picture must be a path, a URL, a data URI, bytes, an open file, a Pillow image, an array or "
    "a tensor"
)


def as_image(pixels: Any) -> Image.Image:
    """An image of an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W], with C = 1, 3, 4.

    The other order of the axes is recognised by its channels. Values are 0 … 255 of any type, 0 … 1
    of floats, all of uint16, or bool.

    Raises:
        UsageError: it is neither, or its shape or values are others.
    """
    tensor = pixels.detach().cpu() if isinstance(pixels, Tensor) else _of_buffer(pixels)
    shape = tuple(tensor.shape)
    if tensor.ndim == 2:
        tensor = tensor[..., None]
    elif tensor.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[-1] in (1, 3, 4)
        if first and (isinstance(pixels, Tensor) or not last):
            tensor = tensor.permute(1, 2, 0)
    height, width, channels = (*tensor.shape, 0)[:3] if tensor.ndim == 3 else (0, 0, 0)
    if channels not in (1, 3, 4) or not height or not width:
        raise UsageError(
            f"pixels must be [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, got {shape}; "
            "give several pictures as a list"
        )
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    levels = _levels(tensor).contiguous()
    data = ctypes.string_at(levels.data_ptr(), levels.numel())
    return Image.frombytes(mode, (width, height), data)


def _of_buffer(pixels: Any) -> Tensor:
    try:
        view = memoryview(pixels)
    except TypeError:
        raise UsageError(f"{ACCEPTED}, got {type(pixels).__name__}") from None
    kind = TYPES.get(view.format.lstrip("@="))
    if kind is None or not view.nbytes:
        raise UsageError(f"pixels of type {view.format!r} and shape {view.shape} are not read")
    return torch.frombuffer(bytearray(view.tobytes()), dtype=kind).view(view.shape or ())


def _levels(tensor: Tensor) -> Tensor:
    """Values as uint8, in memory of their own."""
    if tensor.dtype == torch.uint8:
        return tensor.clone(memory_format=torch.contiguous_format)
    if tensor.is_complex() or tensor.is_quantized:
        raise UsageError(f"pixels of {tensor.dtype} are not read")
    wide = tensor.double()
    low, high = wide.min().item(), wide.max().item()
    if tensor.dtype == torch.uint16:
        wide = (wide / 256).floor()
    elif tensor.dtype == torch.bool or (tensor.is_floating_point() and high <= 1):
        wide = wide * 255
    if not (math.isfinite(low + high) and low >= 0 and wide.max().item() <= 255):
        raise UsageError(f"pixels must be 0 … 255, or 0 … 1 as floats, got {low:g} … {high:g}")
    return wide.round().to(torch.uint8)
