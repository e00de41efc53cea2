"""How likely held-out data is under a model, by estimators of the model's own family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lit_generative.callbacks.example_evaluation import ExampleEvaluation
from lit_generative.types import DensityEstimator


class DensityEvaluation(ExampleEvaluation):
    """Logs what each estimator says of the test data, as ``test/<name>``: means over the examples.

    Args:
        estimators: As in :mod:`lit_generative.diffusion.likelihood`.
        max_batches: As in :class:`~lit_generative.callbacks.example_evaluation.ExampleEvaluation`.
        on_validation: Likewise.
        seed: Likewise.

    Raises:
        ValueError: If there is no estimator, ``max_batches`` is below 1, or an estimator cannot be asked of the model.
    """

    def __init__(
        self,
        estimators: Sequence[DensityEstimator],
        max_batches: int | None = None,
        on_validation: bool = False,
        seed: int = 0,
    ) -> None:
        if not estimators:
            raise ValueError("DensityEvaluation: needs at least one of estimators.")
        super().__init__(max_batches, on_validation, seed)
        self.estimators = list(estimators)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for estimator in self.estimators:
            estimator.check(pl_module)

    @override
    def figures(self, module: Any, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for estimator in self.estimators:
            found |= estimator.estimate(module, x, y, self.generators(x))
        return found
