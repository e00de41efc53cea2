"""Penalties, constraints, augmentation and wrapped discriminators within the training step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_generative.gan.augmentation.adaptive import AdaptiveAugmentation
from lit_generative.gan.augmentation.base import Augmentation
from lit_generative.gan.constraints import WeightClipping
from lit_generative.gan.losses import RelativisticAverage, RelativisticPairing, Wasserstein
from lit_generative.gan.packing import Packing
from lit_generative.gan.penalties import DRAGAN, R1, R2, GradientPenalty
from lit_generative.gan.spectral import SpectralNorm
from lit_generative.networks.mlp import MLPDiscriminator
from tests import tiny


def train(tmp_path, steps: int = 4, **options):
    module = tiny.gan(**options)
    tiny.train(tmp_path, module, tiny.ring(batch_size=24), max_steps=steps)
    return module


class Shift(Augmentation):
    """Moves points aside, and notes what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.observed: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return x + 5.0

    def observe(self, real_logits: Tensor, num_images: int) -> None:
        self.observed.append((len(real_logits), num_images))


class Noted(R1):
    """Notes the updates at which it is asked for."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(gamma=1.0, every_n_steps=every_n_steps)
        self.asked: list[int] = []

    def due(self, step: int) -> bool:
        self.asked.append(step)
        return super().due(step)


def test_a_lazy_penalty_counts_the_discriminators_updates(tmp_path):
    penalty = Noted(every_n_steps=3)
    train(tmp_path, steps=3, penalties=[penalty], discriminator_steps=2)
    assert penalty.asked == [0, 1, 2, 3, 4, 5]


def test_a_lazy_penalty_goes_on_counting_after_a_resume(tmp_path):
    first, second = Noted(every_n_steps=3), Noted(every_n_steps=3)
    module = tiny.gan(penalties=[first], discriminator_steps=2)
    tiny.train(tmp_path, module, tiny.ring(), max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    resumed = tiny.gan(penalties=[second], discriminator_steps=2)
    tiny.train(tmp_path, resumed, tiny.ring(), max_steps=3, ckpt_path=tmp_path / "a.ckpt")
    assert second.asked == [4, 5]


def test_the_critics_weights_are_clipped_after_every_update_and_the_generators_are_not(tmp_path):
    before = tiny.gan()
    module = train(tmp_path, loss=Wasserstein(), constraints=[WeightClipping(0.02)])
    assert max(p.abs().max() for p in module.discriminator.parameters()) <= 0.02
    assert max(p.abs().max() for p in before.discriminator.parameters()) > 0.02
    assert max(p.abs().max() for p in module.generator.parameters()) > 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"penalties": [GradientPenalty()]},
        {"penalties": [DRAGAN()]},
        {"penalties": [R1(gamma=1.0), R2(gamma=1.0)], "loss": RelativisticPairing()},
        {"loss": RelativisticAverage()},
        {"discriminator": SpectralNorm(MLPDiscriminator(hidden_dim=4, num_layers=1))},
        {"discriminator": Packing(MLPDiscriminator(hidden_dim=4, num_layers=1, input_dim=4), num_packed=2)},
        {"accumulate_grad_batches": 3, "discriminator_steps": 2, "penalties": [R1(gamma=1.0)]},
    ],
)
def test_each_trains_saves_and_comes_back(tmp_path, options):
    module = tiny.gan(**options)
    before = tiny.weights(tiny.gan(**options))
    trainer = tiny.train(tmp_path, module, tiny.ring(batch_size=24), max_steps=3)
    after = module.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith("discriminator"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "a.ckpt")
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_penalty_is_taken_in_float32(tmp_path, precision):
    dtypes = []

    class Watched(R1):
        def compute(self, discriminator, x, x_hat):
            value = super().compute(discriminator, x, x_hat)
            dtypes.extend([x.dtype, x_hat.dtype, value.dtype, torch.is_autocast_enabled("cpu")])
            return value

    module = tiny.gan(penalties=[Watched(gamma=1.0)])
    tiny.train(tmp_path, module, tiny.ring(), max_steps=1, precision=precision)
    assert dtypes == [torch.float32, torch.float32, torch.float32, False]


def test_both_sides_are_augmented_in_both_updates_and_each_update_is_observed(tmp_path):
    augmentation = Shift()
    module = tiny.gan(augmentation=augmentation, discriminator_steps=2)
    augmentation.observed.clear()
    tiny.train(tmp_path, module, tiny.ring(batch_size=24), max_steps=1)
    assert augmentation.sizes == [12, 12, 12, 12, 12]  # data and samples twice, and the generator's samples
    assert augmentation.observed == [(12, 12), (12, 12)]


def test_the_discriminator_sees_what_the_augmentation_gives():
    module = tiny.gan(augmentation=Shift())
    x = torch.randn(3, 2)
    torch.testing.assert_close(module.judge(x, None), module.discriminator(x + 5.0))


def test_a_relativistic_generator_is_given_verdicts_on_its_own_batch(tmp_path):
    pairs = []

    class Watched(RelativisticPairing):
        def generator_loss(self, fake_logits, real_logits=None):
            pairs.append((fake_logits.requires_grad, real_logits.requires_grad, len(real_logits)))
            return super().generator_loss(fake_logits, real_logits)

    train(tmp_path, steps=1, loss=Watched())
    assert pairs == [(True, False, 24)]


def test_every_term_is_logged_by_its_name(tmp_path):
    module = tiny.gan(penalties=[R1(gamma=1.0), GradientPenalty()])
    trainer = tiny.train(tmp_path, module, tiny.ring(), max_steps=1)
    names = {"discriminator_loss", "generator_loss", "real_logits", "fake_logits", "r1", "gradient_penalty"}
    assert {f"train/{name}" for name in names} <= set(trainer.callback_metrics)


def test_the_state_of_an_augmentation_that_adapts_is_logged(tmp_path):
    ada = AdaptiveAugmentation(initial_p=0.25, interval=1, adjust_images=60, operations=["x_flip"])
    trainer = tiny.train(tmp_path, tiny.image_gan(augmentation=ada), tiny.digits(batch_size=6), max_steps=1)
    assert abs(float(trainer.callback_metrics["train/augmentation_p"]) - 0.25) == pytest.approx(0.1)
    assert trainer.callback_metrics["train/overfitting"] == ada.overfitting


@pytest.mark.parametrize("name", ["discriminator_steps", "accumulate_grad_batches"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        tiny.gan(**{name: 0})
