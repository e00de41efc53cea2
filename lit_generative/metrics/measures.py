"""What a measure is: numbers from the features of real and generated images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.processes import on_first_process
from lit_generative.recipe import Recorded, describe


class Measure(Recorded, ABC):
    """Scores generated images against real ones; YAML chooses which."""

    scores: tuple[str, ...]
    """Names of what :meth:`compute` gives."""
    needs_real: bool = True
    """Whether the real images are looked at."""
    needs_embedding: bool = False
    """Whether the single features are needed, not only their mean and covariance."""
    needs_logits: bool = False
    """Whether class logits are needed."""

    @abstractmethod
    def compute(self, real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
        """Scores by name: ``{"kid": 0.01, "kid_se": 0.001}``."""


def compute_scores(measures: Iterable[Measure], real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
    """Every measure's scores, computed in one process and known in all; every process must call it."""

    def scores() -> dict[str, float]:
        return {name: value for measure in measures for name, value in measure.compute(real, fake).items()}

    return on_first_process(scores)


def check_measures(measures: Iterable[Measure]) -> None:
    """Refuse measures that would write over each other.

    Raises:
        ValueError: If there is none, or two give a score of one name.
    """
    names = [name for measure in measures for name in measure.scores]
    if not names:
        raise ValueError("measures: needs at least one, such as Frechet().")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"measures: two of them give {sorted(twice)[0]!r}. Leave one of them out.")


def describe_measures(measures: Iterable[Measure]) -> dict[str, dict[str, Any]]:
    """Settings of the measures by class, as plain data, for the record of a score."""
    return {type(measure).__name__: dict(describe(measure).get("init_args") or {}) for measure in measures}


def choose_rows(x: Tensor, most: int, seed: int = 0) -> Tensor:
    """``x`` itself, or ``most`` of its rows drawn without replacement: the first ones may be of one class alone."""
    if len(x) <= most:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:most]]


def embedding_of(data: FeatureSet, who: str) -> Tensor:
    """The features ``(n, D)`` as they were kept, in float32.

    Raises:
        ValueError: If they were not kept.
    """
    if data.embedding is None:
        raise ValueError(f"{who}: needs the single features, and only their moments were kept.")
    return data.embedding


def logits_of(data: FeatureSet, who: str) -> Tensor:
    """The class logits ``(n, K)`` as they were kept, in float32.

    Raises:
        ValueError: If the extractor gave none.
    """
    if data.logits is None:
        raise ValueError(f"{who}: needs class logits, which this extractor does not give. Leave the measure out.")
    return data.logits
