"""Read pickles of tensors without running what a file may ask for.

A pickle is a program that calls functions by name. Here a name is looked up in a short list of stand-ins, which hold
data and do nothing else; any other name is refused before it is imported.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.storage import TypedStorage
from typing_extensions import override

_NUMBERS = re.compile(r"[biufc]\d{1,2}")
_ASKED_FOR = re.compile(r"GLOBAL (\S+)")


class PersistentObject:
    """Data of an object of a class that was never imported, as NVLabs' persistence writes it.

    Args:
        class_name: What the file calls its class.
        state: Its attributes.
    """

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: Mapping[str, Any]) -> None:
        self.class_name = class_name
        self.state = state

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes an object after it was built")


def restricted_load(path: str | os.PathLike[str]) -> Any:
    """Read a pickle that holds tensors, numpy arrays of numbers and plain data.

    Objects of ``torch_utils.persistence`` become :class:`PersistentObject`; their source code, which the file holds
    too, is not looked at. ``dnnlib.util.EasyDict`` becomes a dict.

    Args:
        path: The file.

    Returns:
        What it holds. Tensors lie on the CPU and ask for no gradient; arrays are tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it asks for anything else, which the message names, or is damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        with file.open("rb") as stream:
            return _finished(_Unpickler(stream).load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} was refused: {error}. Nothing of it was run.") from error
    except Exception as error:  # a damaged or hostile pickle fails in many ways
        raise ValueError(f"{file} cannot be read as a pickle of tensors: {type(error).__name__}: {error}.") from error


class _Unpickler(pickle.Unpickler):
    """Knows the stand-ins alone; they are made anew for each file, so that none can change the next one's."""

    def __init__(self, stream: io.BufferedReader) -> None:
        super().__init__(stream)
        array, scalar = _Function(lambda *_: _Array()), _Function(_scalar)
        self._known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,  # a call in protocol 3 and below
            "__builtin__.set": set,
            "_codecs.encode": _Function(lambda text, _: text.encode("latin1")),  # bytes, in protocol 2
            "dnnlib.util.EasyDict": type("EasyDict", (dict,), {"__setstate__": _refuse}),
            "torch_utils.persistence._reconstruct_persistent_obj": _Function(_persistent_object),
            "torch.storage._load_from_bytes": _Function(_storage),
            "torch._utils._rebuild_tensor_v2": _Function(_tensor),
            "torch._utils._rebuild_parameter": _Function(lambda data, *_: data),
            "numpy.ndarray": _Function(_refuse),  # an argument of _reconstruct, never called
            "numpy.dtype": _Function(lambda kind, *_: _Kind(kind)),
            "numpy.core.multiarray._reconstruct": array,
            "numpy._core.multiarray._reconstruct": array,
            "numpy.core.multiarray.scalar": scalar,
            "numpy._core.multiarray.scalar": scalar,
        }

    @override
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor and no plain data")
        return self._known[f"{module}.{name}"]

    @override
    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it keeps data outside of itself (persistent_load)")


class _Function:
    """What a file may call; neither its attributes nor its code can be reached from the file."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        _refuse()


class _Kind:
    """Data type of an array: numbers only, as objects could be anything."""

    def __init__(self, kind: str) -> None:
        if not _NUMBERS.fullmatch(kind):
            raise pickle.UnpicklingError(f"it holds an array of {kind!r}, not of numbers")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array that gets its values after it was made."""

    value: Tensor

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Kind, bool, bytes]) -> None:
        _, shape, kind, by_columns, raw = state
        values = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if by_columns else "C")
        self.value = torch.from_numpy(values.astype(kind.dtype.newbyteorder("=")))


def _scalar(kind: _Kind, raw: bytes) -> Any:
    return np.frombuffer(raw, kind.dtype)[0].item()


def _refuse(*_: Any) -> Any:
    raise pickle.UnpicklingError("it changes or calls what it must not")


def _persistent_object(meta: Mapping[str, Any]) -> PersistentObject:
    if meta.get("type") != "class":
        raise pickle.UnpicklingError(f"it holds a persistent {meta.get('type')!r}, where only a class is known")
    return PersistentObject(str(meta["class_name"]), meta["state"])


def _storage(raw: bytes) -> TypedStorage:
    try:
        storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its long message advises to run the code
        named = _ASKED_FOR.search(str(error))
        raise pickle.UnpicklingError(f"a tensor's values ask for {named[1] if named else 'code'}") from error
    if not isinstance(storage, TypedStorage):
        raise pickle.UnpicklingError(f"it holds a {type(storage).__name__} where a tensor's values are expected")
    return storage


def _tensor(storage: TypedStorage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    values = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)  # .untyped() warns
    return values.as_strided(size, stride, offset)  # checks that all of it lies in the storage


def _finished(value: Any) -> Any:
    """The same with arrays as tensors and mappings as plain dicts, at any depth."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, PersistentObject):
        return PersistentObject(value.class_name, _finished(value.state))
    if isinstance(value, Mapping):
        return {key: _finished(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finished(item) for item in value)
    return value
