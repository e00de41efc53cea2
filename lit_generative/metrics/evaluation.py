"""One pass over a source of images, on any number of processes, and a cache for the real ones."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.features import FeatureExtractor, check_images
from lit_generative.metrics.generative_metrics import new_collector
from lit_generative.metrics.measures import Measure
from lit_generative.metrics.moments import Moments
from lit_generative.metrics.processes import num_processes, on_first_process, process_index, raise_together
from lit_generative.metrics.sources import ImageSource

CACHE_VERSION = 1
"""Part of every key: raised when the same images would give other numbers."""


def collect_features(
    source: ImageSource,
    extractor: FeatureExtractor,
    measures: Sequence[Measure],
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda _: None,
    in_step: bool = False,
) -> FeatureSet:
    """Features of all images; every process must call it, and takes every n-th batch.

    The batches are the same for any number of processes, so the features are, too.

    Args:
        source: Where the images come from.
        extractor: Lies on ``device``.
        measures: What will be asked of the features.
        batch_size: Images at a time.
        device: Where features are computed.
        progress: Told how many images are done, all processes together.
        in_step: Every process draws equally many batches, the last perhaps for nothing: a model whose weights are
            sharded over the processes draws with all of them at once.

    Raises:
        ValueError: If an image is damaged; in every process, so that none waits for the others.
    """
    extractor.eval()
    collector = new_collector(extractor, measures)
    step = batch_size * num_processes()
    with raise_together():
        for first in range(0, source.count, step):
            start = first + process_index() * batch_size
            if start >= source.count:  # fewer batches are left than processes
                if in_step:
                    source.pixels(torch.tensor([0]))
                break
            indices = torch.arange(start, min(start + batch_size, source.count))
            collector.update(_extract(extractor, source.pixels(indices), device), indices)
            progress(min(step, source.count - first))
    return collector.gather()


def _extract(extractor: FeatureExtractor, pixels: Tensor, device: torch.device | str) -> Any:
    check_images(pixels, "collect_features")
    with torch.inference_mode(), torch.autocast(torch.device(device).type, enabled=False):
        return extractor(pixels.to(device))


def cached_features(key: dict[str, Any], compute: Callable[[], FeatureSet], folder: Path | None = None) -> FeatureSet:
    """Features of real images from the disk, or computed and written there; every process must call it.

    Process 0 alone reads and writes, so processes need not share a disk; the others get an empty set, since scores are
    computed in process 0.

    Args:
        key: Plain data that tells this set from every other: data, split, transform, count, extractor and contents.
        compute: Computes the set.
        folder: Where files lie; None for :func:`cache_folder`.
    """
    text = json.dumps({"version": CACHE_VERSION, **key}, sort_keys=True)
    path = (folder or cache_folder()) / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
    found = _load(path, text) if process_index() == 0 else None
    if on_first_process(lambda: found is not None):
        return found or FeatureSet(Moments(0, torch.empty(0), torch.empty(0, 0)))
    computed = compute()
    if process_index() == 0:
        _save(path, text, computed)
    return computed


def features_key(
    reference: Mapping[str, Any], extractor: FeatureExtractor, measures: Sequence[Measure]
) -> dict[str, Any]:
    """What tells real features from every other: the images, the extractor, and what is kept of its features.

    Args:
        reference: Record of the images.
        extractor: Network of the features.
        measures: What will be asked of them.
    """
    kept = {f"keep_{kind}": any(getattr(m, f"needs_{kind}") for m in measures) for kind in ("embedding", "logits")}
    return {"reference": dict(reference), **extractor.record(), **kept}


def cache_folder() -> Path:
    """``$LITGEN_CACHE``, or ``lit_generative`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lit_generative"
    return Path(os.environ.get("LITGEN_CACHE", default)).expanduser()


def _load(path: Path, key: str) -> FeatureSet | None:
    if not path.exists():
        return None
    try:
        data, found = read_features(path)
        if found != key:
            raise ValueError("it holds other features")
    except ValueError as error:
        warnings.warn(f"{path} cannot be used ({error}); the real features are computed again.", stacklevel=2)
        return None
    return data


def _save(path: Path, key: str, data: FeatureSet) -> None:
    try:
        write_features(path, key, data)
    except OSError as error:  # a full or read-only disk must not end a training run
        warnings.warn(f"{path} cannot be written ({error}); the real features are not kept.", stacklevel=2)


def read_features(path: Path) -> tuple[FeatureSet, str]:
    """Features from a file of :func:`write_features`, and its key.

    Raises:
        ValueError: If the file is cut short or something else.
        FileNotFoundError: If it is not there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            key = (file.metadata() or {})["key"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            moments = Moments(int(tensors["count"]), tensors["mean"], tensors["cov"])
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} holds no features of ours, or is cut short: {error!r}") from error
    return FeatureSet(moments, tensors.get("embedding"), tensors.get("logits")), key


def write_features(path: Path, key: str, data: FeatureSet) -> None:
    """Write features, wholly or not at all.

    Args:
        path: File; its folder is made.
        key: Text that says what they are.
        data: The features.

    Raises:
        OSError: If the disk is full or closed.
    """
    moments = data.moments
    tensors = {"count": torch.tensor(moments.count), "mean": moments.mean, "cov": moments.cov}
    tensors |= {name: x for name in ("embedding", "logits") if (x := getattr(data, name)) is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, metadata={"key": key})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
