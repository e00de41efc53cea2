"""Figures of each example are averaged over held-out data, and their noise belongs to the example."""

import pytest
import torch
from typing_extensions import override

from lit_generative.callbacks.example_evaluation import ExampleEvaluation
from lit_generative.tensor_ops import randn
from tests.tiny import ddpm, digits, point_ddpm, ring, trainer


class Noisy(ExampleEvaluation):
    """Mean brightness, and noise; remembers the labels it was given."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.labels = []

    @override
    def figures(self, module, x, y):
        assert not module.training
        self.labels.append(y)
        return {"brightness": x.flatten(start_dim=1).mean(dim=1), "noise": randn((len(x),), self.generators(x))}


def scores(tmp_path, callback, module=None, batch_size=90):
    run = trainer(tmp_path, callbacks=[callback])
    return run.test(module or ddpm(), digits(eval_batch_size=batch_size), verbose=False)[0]


def test_figures_are_means_over_the_test_data(tmp_path):
    data = digits()
    data.setup("test")
    pixels = data.examples("test", torch.arange(data.num_examples("test"))).float() / 127.5 - 1
    found = scores(tmp_path, Noisy(), batch_size=50)  # the last batch is smaller
    assert found["test/brightness"] == pytest.approx(pixels.mean().item(), abs=1e-5)


def test_noise_depends_on_the_example_and_the_seed_alone(tmp_path):
    first, other_batches, other_seed = (
        scores(tmp_path, Noisy(seed=seed), batch_size=size)["test/noise"] for seed, size in ((0, 90), (0, 7), (1, 90))
    )
    assert first == pytest.approx(other_batches, abs=1e-6)
    assert first != pytest.approx(other_seed, abs=1e-3)


def test_fewer_batches_can_be_scored(tmp_path):
    callback = Noisy(max_batches=2)
    scores(tmp_path, callback, batch_size=50)
    assert len(callback.labels) == 2
    with pytest.raises(ValueError, match="Noisy: max_batches must be at least 1, got 0"):
        Noisy(max_batches=0)


def test_labels_are_given_where_the_model_has_classes(tmp_path):
    with_classes, without = Noisy(), Noisy()
    scores(tmp_path, with_classes, ddpm(num_classes=10))
    scores(tmp_path, without, ddpm())
    assert all(y is not None for y in with_classes.labels)
    assert without.labels == [None] * len(with_classes.labels)


def test_validation_data_is_scored_if_asked_for(tmp_path):
    for asked in (False, True):
        run = trainer(tmp_path, callbacks=[Noisy(on_validation=asked)])
        run.validate(point_ddpm(), ring(), verbose=False)
        assert ("val/noise" in run.callback_metrics) == asked


def test_the_sanity_check_is_not_scored(tmp_path):
    callback = Noisy(on_validation=True)
    run = trainer(tmp_path, callbacks=[callback], max_steps=1, num_sanity_val_steps=1, val_check_interval=1.0)
    run.fit(ddpm(), digits(eval_batch_size=200))
    assert callback.labels == []
