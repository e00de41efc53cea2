"""What a score was measured with; scores of unequal records are not comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from lit_generative.metrics.features import FeatureExtractor
from lit_generative.metrics.measures import Measure, describe_measures

FREE = ("subject", "versions")
"""Parts of a record that may differ: what was measured, not how."""


def score_record(
    extractor: FeatureExtractor,
    measures: Sequence[Measure],
    reference: Mapping[str, Any],
    images: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything a score depends on, as plain data.

    Args:
        extractor: Network whose features were compared.
        measures: What was computed.
        reference: Record of the real images.
        images: Record of the generated ones; ``count``, ``seed`` and what the model was ``shown`` belong to the
            protocol, the rest to the subject.

    Returns:
        Nested dictionary of numbers and texts; how it was measured, and under ``subject`` what.
    """
    subject = {name: value for name, value in images.items() if name not in ("count", "seed", "shown")}
    shown = {"shown": images["shown"]} if "shown" in images else {}
    return {
        "name": extractor.frechet_name,
        **extractor.record(),
        "quantization": "uint8, rounded",
        "measures": describe_measures(measures),
        "reference": dict(reference),
        "num_samples": images["count"],
        "seed": images.get("seed"),
        **shown,
        "subject": subject,
        "versions": {"lit_generative": version("lit-generative"), "torch": str(torch.__version__)},
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In what two records' protocols differ, as in ``resize: 'tf1' and 'clean'``; empty if scores are comparable.

    Of the measures those count that both have. A seed counts if both have one: images from files have none.
    """
    a, b = dict(a), dict(b)
    ours, theirs = a.pop("measures", {}), b.pop("measures", {})
    found = [
        f"{name}: {ours[name]} and {theirs[name]}" for name in ours if name in theirs and ours[name] != theirs[name]
    ]
    if None in (a.get("seed"), b.get("seed")):
        a["seed"] = b["seed"] = None
    return found + [
        f"{key}: {left!r} and {right!r}"
        for key in sorted({*a, *b} - {*FREE})
        if (left := a.get(key)) != (right := b.get(key))
    ]


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Refuse to compare scores that were measured differently.

    Raises:
        ValueError: If the records differ in anything but the subject; every difference is named.
    """
    if found := differences(a, b):
        raise ValueError(f"The scores are not comparable, since they differ in {'; '.join(found)}. Measure both alike.")
