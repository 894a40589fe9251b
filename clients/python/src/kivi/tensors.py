# SPDX-License-Identifier: Apache-2.0
"""Arrays of any library to the bytes of the wire, and back.

Accepted: NumPy arrays, anything with `__dlpack__` (torch, JAX, CuPy) and the buffer protocol.
No library is imported that the caller has not imported.  bfloat16, which NumPy lacks, is carried
as uint16 bit patterns, which a bf16 layout therefore accepts; its results come back as float32.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Sequence, Tuple

import numpy as np

DTYPES = {"float16": ("f16", 2), "bfloat16": ("bf16", 2), "float32": ("f32", 4)}


def to_numpy(array: Any) -> Tuple[np.ndarray, str]:
    """(array in host memory, name of its element type).  bfloat16 comes as uint16 bits."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach()
        if array.device.type != "cpu":
            array = array.cpu()
        if array.dtype == torch.bfloat16:
            return array.contiguous().view(torch.int16).numpy().view(np.uint16), "bfloat16"
        return array.numpy(), str(array.dtype).replace("torch.", "")
    if not isinstance(array, np.ndarray):
        if hasattr(array, "get") and type(array).__module__.startswith("cupy"):
            array = array.get()
        elif type(array).__module__.startswith("jax"):
            array = np.asarray(array)
        elif hasattr(array, "__dlpack__"):
            try:
                array = np.from_dlpack(array)
            except (BufferError, RuntimeError, TypeError) as error:
                raise TypeError(f"{type(array).__name__}: NumPy cannot take it by DLPack ({error}); "
                                "give bfloat16 as uint16 bit patterns, and what lies on a device "
                                "as a copy in host memory") from error
        else:
            array = np.asarray(array)
    if array.dtype.name == "bfloat16":  # ml_dtypes, as JAX gives it
        return array.view(np.uint16), "bfloat16"
    return array, array.dtype.name


def to_wire(array: Any, dtype: str, shape: Sequence[int], name: str) -> memoryview:
    """The elements of `array` in C order as bytes.

    Args:
        array: see the module.
        dtype: "f16", "bf16" or "f32"; the array must have it, nothing is converted silently.
        shape: what it must have; -1 is free.
        name: of the argument, for errors.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it should be.
    """
    values, element = to_numpy(array)
    if dtype == "bf16" and element == "uint16":
        element = "bfloat16"
    if DTYPES.get(element, ("", 0))[0] != dtype:
        raise TypeError(f"{name}: elements are {element}, the layout says {dtype}; convert first")
    if len(values.shape) != len(shape) or any(
            want not in (-1, have) for want, have in zip(shape, values.shape)):
        wanted = ", ".join("any" if n == -1 else str(n) for n in shape)
        raise ValueError(f"{name}: shape is {tuple(values.shape)}, expected ({wanted})")
    return memoryview(np.ascontiguousarray(values)).cast("B")


def from_wire(data: Any, dtype: str, shape: Sequence[int], offset: int = 0) -> np.ndarray:
    """An array over `data` (no copy): float16, float32, or float32 widened from bfloat16."""
    count = math.prod(shape)
    if dtype == "bf16":
        bits = np.frombuffer(data, np.uint16, count, offset).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    kind = np.float16 if dtype == "f16" else np.float32
    return np.frombuffer(data, kind, count, offset).reshape(shape)
