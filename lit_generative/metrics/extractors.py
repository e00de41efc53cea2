"""Extractors by name, for the command line; a config names their classes."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from lit_generative.metrics.features import FeatureExtractor

NAMES = {
    "inception": "lit_generative.metrics.inception.InceptionV3",
    "digits": "lit_generative.metrics.small_nets.DigitsFeatures",
    "stacked_digits": "lit_generative.metrics.small_nets.StackedDigitsFeatures",
    "fashion": "lit_generative.metrics.small_nets.FashionFeatures",
    "dinov2": "lit_generative.metrics.transformers_nets.DINOv2",
    "clip": "lit_generative.metrics.transformers_nets.CLIP",
}


def build_extractor(name: str, weights: str | None = None, dtype: str = "float32") -> FeatureExtractor:
    """Build a feature extractor.

    Args:
        name: One of :data:`NAMES`, or the full path of a class.
        weights: File of weights, for an extractor that takes one; for DINOv2 and CLIP a folder or a name on the hub.
        dtype: "float32", or "bfloat16" for an extractor that can choose.

    Raises:
        ValueError: If there is no such extractor, or it does not take what was given.
        FileNotFoundError: If its weights are not there.
    """
    cls = _find_class(name)
    accepted = inspect.signature(cls).parameters
    arguments: dict[str, Any] = {}
    if weights is not None:
        key = next((key for key in ("weights", "model") if key in accepted), None)
        if key is None:
            raise ValueError(f"build_extractor: {name} takes no weights, got {weights!r}. Leave weights out.")
        arguments[key] = weights
    if "dtype" in accepted:
        arguments["dtype"] = dtype
    elif dtype != "float32":
        raise ValueError(f"build_extractor: {name} computes in float32 only, got dtype {dtype!r}. Leave dtype out.")
    return cls(**arguments)


def _find_class(name: str) -> type[FeatureExtractor]:
    module, _, attribute = NAMES.get(name, name).rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise ValueError(
            f"build_extractor: there is no extractor {name!r}. {f'Did you mean {near[0]}? ' if near else ''}"
            f"Names: {', '.join(NAMES)}; or give the full path of a class."
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"build_extractor: {name} cannot be imported: {error}. Check the path.") from error
    if not (isinstance(cls, type) and issubclass(cls, FeatureExtractor)):
        raise ValueError(f"build_extractor: {name} must be a subclass of FeatureExtractor, got {cls!r}.")
    return cls
