"""Every estimator is asked for every example, and each draws the same noise."""

import pytest
from typing_extensions import override

from lit_generative.callbacks.density_evaluation import DensityEvaluation
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import randn
from lit_generative.types import DensityEstimator
from tests.tiny import point_ddpm, ring, trainer


class Noisy(Recorded, DensityEstimator):
    """Noise, and how often it was asked."""

    def __init__(self, name: str = "noise") -> None:
        self.name = name

    @override
    def estimate(self, module, x, y, generator):
        return {self.name: randn((len(x),), generator), f"{self.name}_count": x.new_full((len(x),), len(generator))}


def test_each_estimator_gives_its_figures_of_the_same_noise(tmp_path):
    run = trainer(tmp_path, callbacks=[DensityEvaluation([Noisy(), Noisy("other")])])
    found = run.test(point_ddpm(), ring(), verbose=False)[0]
    assert found["test/noise"] == found["test/other"]
    assert {"test/noise_count", "test/other_count"} <= found.keys()
    validated = trainer(tmp_path, callbacks=[DensityEvaluation([Noisy()], max_batches=1, on_validation=True, seed=3)])
    validated.validate(point_ddpm(), ring(), verbose=False)
    assert "val/noise" in validated.callback_metrics
    assert validated.callbacks[0].seed == 3


def test_estimators_are_needed():
    with pytest.raises(ValueError, match="needs at least one of estimators"):
        DensityEvaluation([])
    with pytest.raises(ValueError, match="max_batches must be at least 1, got 0"):
        DensityEvaluation([Noisy()], max_batches=0)
