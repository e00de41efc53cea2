import pytest
import torch

from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.mode_coverage import ModeCoverage
from lit_generative.metrics.mode_coverage import mixture_coverage
from tests import tiny

NAMES = {"val/modes", "val/high_quality", "val/reverse_kl"}


def fit(tmp_path, *callbacks, module=None, **options):
    options = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None} | options
    module = module or tiny.gan()
    return module, tiny.train(tmp_path, module, tiny.ring(), callbacks=list(callbacks), **options)


def test_validation_logs_the_coverage_of_the_averaged_weights(tmp_path):
    ema = EMA(half_life=50, ramp_up=None)
    module, trainer = fit(tmp_path, ema, ModeCoverage(num_samples=300, seed=4))
    module.load_state_dict({**module.state_dict(), **ema.state_dict()["weights"]["ema"]})
    data = trainer.datamodule
    points = module.sample(300, generator=torch.Generator().manual_seed(4))
    expected = mixture_coverage(points, data.centers, data.std)
    for name in NAMES:
        assert float(trainer.callback_metrics[name]) == pytest.approx(expected[name[4:]], rel=1e-6)


def test_testing_logs_it_too(tmp_path):
    trainer = tiny.trainer(tmp_path, callbacks=[ModeCoverage(num_samples=100)])
    (found,) = trainer.test(tiny.gan(), tiny.ring(), verbose=False)
    assert {"test/modes", "test/high_quality", "test/reverse_kl"} <= set(found)


def test_training_ends_in_the_same_bits_as_without(tmp_path):
    with_it, _ = fit(tmp_path, ModeCoverage(num_samples=100), max_steps=6)
    without, _ = fit(tmp_path, max_steps=6)
    tiny.assert_same(tiny.weights(with_it), tiny.weights(without))


def test_data_without_modes_and_a_wrong_count_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Digits has no `centers` and `std`"):
        tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[ModeCoverage()])
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        ModeCoverage(num_samples=0)
