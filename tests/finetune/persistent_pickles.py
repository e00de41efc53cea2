"""Pickles of the published form of NVLabs' networks, of modules that stand at their place."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class EasyDict(dict):
    """Pickled as ``dnnlib.util.EasyDict``."""


class Persistent:
    """Pickled as an object of a class that is called ``class_name``.

    Args:
        class_name: That name.
        tensors: Parameters by dotted name; a name with a dot belongs to a module within.
        buffers: Likewise.
        attributes: Other attributes by dotted name of the module and their own.
    """

    def __init__(self, class_name: str, tensors: Mapping[str, Any], buffers: Mapping[str, Any] = {}, **attributes: Any):
        self.class_name = class_name
        children = sorted({k.partition(".")[0] for k in (*tensors, *buffers, *attributes) if "." in k})

        def below(values: Mapping[str, Any], child: str) -> dict[str, Any]:
            return {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{child}.")}

        def own(values: Mapping[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in values.items() if "." not in k}

        self.state = {
            "training": False,
            "_parameters": {k: torch.nn.Parameter(v) if isinstance(v, Tensor) else v for k, v in own(tensors).items()},
            "_buffers": own(buffers),
            "_non_persistent_buffers_set": set(),
            "_modules": {
                c: Persistent("Layer", below(tensors, c), below(buffers, c), **below(attributes, c)) for c in children
            },
            "weight_gain": np.float64(0.5),
            **own(attributes),
        }

    def meta(self) -> dict[str, Any]:
        source = "import os\nos.system('touch ran')\n"
        return EasyDict(type="class", version=6, module_src=source, class_name=self.class_name, state=self.state)


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise AssertionError("the real one must not be called")


class _Pickler(pickle._Pickler):
    """Writes the names that the published files have; in Python, as the one in C looks every name up."""

    def reducer_override(self, obj: Any) -> Any:
        return (_reconstruct_persistent_obj, (obj.meta(),)) if isinstance(obj, Persistent) else NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        renamed = {
            EasyDict: "dnnlib.util EasyDict",
            _reconstruct_persistent_obj: "torch_utils.persistence _reconstruct_persistent_obj",
        }.get(obj)
        if renamed is None:
            return super().save_global(obj, name)
        self.write(pickle.GLOBAL + renamed.replace(" ", "\n").encode() + b"\n")
        self.memoize(obj)
        return None

    dispatch = pickle._Pickler.dispatch | {type: save_global, type(_reconstruct_persistent_obj): save_global}


def persistent_pickle(value: Any, protocol: int = 4) -> bytes:
    """A pickle with the names of the published files."""
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()
