"""What ``litgen evaluate`` compares with: images, a config's data, or statistics from an earlier pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_generative.cli.errors import wrong_keys
from lit_generative.cli.image_sets import FolderImages, NpzImages, load_arrays
from lit_generative.metrics.evaluation import cached_features, features_key, read_features, write_features
from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.features import FeatureExtractor
from lit_generative.metrics.measures import Measure
from lit_generative.metrics.moments import Moments
from lit_generative.metrics.sources import DataModuleImages, ImageSource
from lit_generative.types import Split

Reference = tuple[FeatureSet, dict[str, Any]]


def image_set(path: str, split: Split = "train") -> ImageSource:
    """A folder of images, an .npz file, or the data of a config (.yaml).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of these.
    """
    file = Path(path)
    if file.is_dir():
        return FolderImages(file)
    if not file.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if file.suffix == ".npz":
        return NpzImages(file)
    if file.suffix in (".yaml", ".yml"):
        return DataModuleImages(_data_module(file), split)
    raise ValueError(f"{path} must be a folder of images, an .npz, a config (.yaml) or statistics (.safetensors).")


def load_reference(
    path: str,
    split: Split,
    extractor: FeatureExtractor,
    measures: Sequence[Measure],
    collect: Callable[[ImageSource, str], FeatureSet],
) -> Reference:
    """Features of the reference: read, or collected and kept for the next time.

    Args:
        path: As in :func:`image_set`, statistics of ours (.safetensors), or of others (.npz with ``mu`` and ``sigma``).
        split: Which part of a config's data.
        extractor: Network of the features.
        measures: What will be asked of them.
        collect: Passes images through the extractor.

    Returns:
        The features, and a record of where they come from.

    Raises:
        ValueError: If statistics are of another extractor, or a measure needs more than they hold.
    """
    if Path(path).suffix == ".safetensors":
        return _own_statistics(path, extractor, measures)
    if Path(path).suffix == ".npz" and "mu" in (arrays := load_arrays(path)):
        return _foreign_statistics(path, arrays, extractor, measures)
    source = image_set(path, split)
    record = source.record()
    key = features_key(record, extractor, measures)
    return cached_features(key, lambda: collect(source, "reference")), record


def save_statistics(path: Path, data: FeatureSet, extractor: FeatureExtractor, images: dict[str, Any]) -> Path:
    """Write features to be a reference later; they say which extractor and images they are of.

    Raises:
        ValueError: If the file is not named ``.safetensors``.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"--save_statistics: the file must be named .safetensors, got {path}.")
    write_features(path, json.dumps({"extractor": extractor.record(), "images": images}), data)
    return path


def _own_statistics(path: str, extractor: FeatureExtractor, measures: Sequence[Measure]) -> Reference:
    data, key = read_features(Path(path))
    written = json.loads(key)
    if not isinstance(written.get("extractor"), dict):
        raise ValueError(f"{path} does not say what it holds. Write it with litgen evaluate --save_statistics.")
    theirs, ours = written["extractor"], extractor.record()
    if found := [
        f"{name} ({theirs.get(name)!r}, now {ours.get(name)!r})" for name in ours if theirs.get(name) != ours[name]
    ]:
        raise ValueError(f"{path} holds features of another extractor: {', '.join(found)}. Use that one.")
    _check_contents(path, data, measures)
    return data, written["images"]


def _foreign_statistics(
    path: str, arrays: dict[str, Any], extractor: FeatureExtractor, measures: Sequence[Measure]
) -> Reference:
    mean, cov = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    dim = extractor.dim
    if mean.shape != (dim,) or cov.shape != (dim, dim):
        raise ValueError(
            f"{path}: mu and sigma must be of {dim} features as {extractor.name} gives, got {tuple(mean.shape)} and "
            f"{tuple(cov.shape)}."
        )
    data = FeatureSet(Moments(0, mean, (cov + cov.T) / 2))
    _check_contents(path, data, measures)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return data, {"statistics": Path(path).name, "fingerprint": digest}


def _check_contents(path: str, data: FeatureSet, measures: Sequence[Measure]) -> None:
    for measure in measures:
        for kind in ("embedding", "logits"):
            # The Inception score looks at no real image.
            wanted = getattr(measure, f"needs_{kind}") and measure.needs_real
            if wanted and getattr(data, kind) is None:
                raise ValueError(
                    f"{path} does not hold what {', '.join(measure.scores)} need. Leave it out of --metrics, or give "
                    "the reference images themselves."
                )


def _data_module(file: Path) -> Any:
    from jsonargparse import ArgumentParser
    from lightning import LightningDataModule

    config = yaml.safe_load(file.read_text())
    data = config.get("data", config) if isinstance(config, dict) else None
    if not isinstance(data, dict) or "class_path" not in data:
        raise ValueError(f"{file} must hold `data` with a class_path, as a config of litgen fit does.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    try:
        module = parser.instantiate_classes(parser.parse_object({"data": data})).data
    except Exception as error:
        reason = next(wrong_keys({"data": data}), None) or " ".join(str(error).split())
        raise ValueError(f"{file}: its data cannot be built: {reason}") from error
    module.prepare_data()
    module.setup("validate")
    return module
