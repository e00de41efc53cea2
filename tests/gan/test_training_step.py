"""What an update costs and what it is under mixed precision: no waiting, no graph that nobody needs, true penalties."""

from __future__ import annotations

import functools

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision as Plugin
from torch.utils._python_dispatch import TorchDispatchMode

from lit_generative.callbacks.gradient_clipping import GradientClipping
from lit_generative.gan.augmentation.adaptive import AdaptiveAugmentation
from lit_generative.gan.augmentation.diff_augment import DiffAugment
from lit_generative.gan.constraints import WeightClipping
from lit_generative.gan.losses import RelativisticPairing
from lit_generative.gan.penalties import DRAGAN, R1, R2, GradientPenalty
from lit_generative.gan.penalty_decay import Decaying
from lit_generative.training.checkpoint_io import SafeCheckpointIO
from tests import tiny

SGD = functools.partial(torch.optim.SGD, lr=0.05)


def float16(scale: float = 2.0**10) -> dict:
    return {"plugins": [SafeCheckpointIO(), Plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]}


PRECISIONS = {"bf16": {"precision": "bf16-mixed"}, "fp16": float16()}
PENALTIES = {"R1, R2": [R1(gamma=2.0), R2(gamma=2.0)], "GP": [GradientPenalty()], "DRAGAN": [DRAGAN()]}


# ---- mixed precision


def change(tmp_path, name: str, callbacks=(), **options) -> dict[str, torch.Tensor]:
    """What one update adds to the weights of a network."""
    penalties = options.pop("penalties", [])
    module = tiny.gan(hidden_dim=16, penalties=penalties, generator_optimizer=SGD, discriminator_optimizer=SGD)
    before = tiny.weights(module.get_submodule(name))
    tiny.train(tmp_path, module, tiny.ring(), max_steps=1, callbacks=list(callbacks), **options)
    return {key: value - before[key] for key, value in tiny.weights(module.get_submodule(name)).items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("penalties", PENALTIES)
def test_a_penalized_update_is_that_of_float32_up_to_rounding(tmp_path, penalties, precision):
    exact = change(tmp_path, "discriminator", penalties=PENALTIES[penalties])
    free = change(tmp_path, "discriminator")
    rounded = change(tmp_path, "discriminator", penalties=PENALTIES[penalties], **PRECISIONS[precision])
    size = max(value.abs().max() for value in exact.values())
    assert max((exact[key] - free[key]).abs().max() for key in exact) > 0.2 * size  # the penalty is felt
    for key, value in exact.items():
        torch.testing.assert_close(rounded[key], value, rtol=0, atol=0.02 * float(size))


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_under_16_mixed_clipping_bounds_the_step_of_each_network_whatever_the_loss_scale(tmp_path, name, scale):
    clipping = GradientClipping(max_norm={"generator": 1e-3, "discriminator": 1e-2})
    update = change(tmp_path, name, [clipping], penalties=[R1(gamma=2.0)], **float16(scale))
    norm = torch.cat([value.flatten() for value in update.values()]).norm()
    expected = 0.05 * {"generator": 1e-3, "discriminator": 1e-2}[name]
    torch.testing.assert_close(norm, torch.tensor(expected), rtol=1e-3, atol=0)


# ---- cost


class Waits(TorchDispatchMode):
    """Counts what reads a number off the device, for which a GPU has to finish first."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


OPTIONS = {
    "plain": {},
    "penalties": {
        "penalties": [R1(gamma=1.0), Decaying(R2(gamma=1.0), 0.1, 10), GradientPenalty(), DRAGAN()],
        "loss": RelativisticPairing(),
    },
    "critic": {"discriminator_steps": 2, "constraints": [WeightClipping()], "accumulate_grad_batches": 2},
    "DiffAugment": {"augmentation": DiffAugment()},
    "ADA": {"augmentation": AdaptiveAugmentation(initial_p=0.5, interval=2)},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_waits_for_the_device(tmp_path, options):
    counts = []
    build = tiny.image_gan if "A" in options else tiny.gan
    module = build(**({"generator_optimizer": SGD, "discriminator_optimizer": SGD} | OPTIONS[options]))
    step = module.training_step

    def watched(*args):
        with Waits() as waits:
            step(*args)
        counts.append(waits.count)

    module.training_step = watched
    data = tiny.digits(batch_size=8) if build is tiny.image_gan else tiny.ring(batch_size=8)
    tiny.train(tmp_path, module, data, max_steps=4, log_every_n_steps=100)
    # ADA asks once how far it had come when it was saved.
    assert counts == [int(options == "ADA"), 0, 0, 0]


@pytest.mark.parametrize(
    ("steps", "parts", "graphs"),
    [(1, 1, [True]), (3, 1, [False, False, True]), (1, 2, [False, False, True, True])],
)
def test_samples_keep_a_graph_only_if_the_generator_learns_from_them(tmp_path, steps, parts, graphs):
    module = tiny.gan(discriminator_steps=steps, accumulate_grad_batches=parts)
    made = []
    module.generator.register_forward_hook(lambda _, __, samples: made.append(samples.requires_grad))
    tiny.train(tmp_path, module, tiny.ring(), max_steps=1)
    assert made == graphs


def test_one_backward_pass_in_all_goes_through_the_generator(tmp_path):
    module, calls = tiny.gan(discriminator_steps=2), []

    def watch(name: str) -> None:
        def hook(layer, inputs, output) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: calls.append(name))

        module.get_submodule(name).layers[-1].register_forward_hook(hook)

    watch("generator")
    watch("discriminator")
    tiny.train(tmp_path, module, tiny.ring(), max_steps=1)
    assert calls == ["discriminator"] * 5 + ["generator"]  # real and fake twice; then through it to the generator
