from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lit_generative.gan.losses import Hinge, NonSaturating
from lit_generative.gan.module import GAN
from lit_generative.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from lit_generative.networks.mlp import MLPDiscriminator, MLPGenerator
from lit_generative.tensor_ops import derive_seed, sample_generators
from lit_generative.training.run import global_seed


class RememberingHinge(Hinge):
    """Remembers the dtypes of the logits it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = []

    def discriminator_loss(self, real_logits, fake_logits):
        self.dtypes += [real_logits.dtype, fake_logits.dtype]
        return super().discriminator_loss(real_logits, fake_logits)

    def generator_loss(self, fake_logits):
        self.dtypes += [fake_logits.dtype]
        return super().generator_loss(fake_logits)


def points_gan(**options) -> GAN:
    torch.manual_seed(0)
    defaults = {
        "loss": NonSaturating(),
        "generator_optimizer": partial(Adam, lr=0.01),
        "discriminator_optimizer": partial(Adam, lr=0.02),
    }
    return GAN(
        MLPGenerator(latent_dim=3, hidden_dim=8, num_layers=1),
        MLPDiscriminator(hidden_dim=6, num_layers=1),
        **{**defaults, **options},
    )


def image_gan(num_classes: int | None = None, **options) -> GAN:
    torch.manual_seed(0)
    return GAN(
        DCGANGenerator(image_size=8, channels=2, latent_dim=5, width=4, num_classes=num_classes),
        DCGANDiscriminator(image_size=8, channels=2, width=3, num_classes=num_classes),
        Hinge(),
        partial(Adam, lr=0.01),
        partial(Adam, lr=0.01),
        **options,
    )


def batches(*sizes: int, shape: tuple[int, ...] = (2,)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"image": torch.randn(n, *shape, generator=generator).clamp(-1, 1), "label": torch.arange(n) % 3} for n in sizes
    ]


def trainer(**options) -> L.Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, **silent, **options)


def loader(data: list[dict[str, torch.Tensor]]) -> DataLoader:
    return DataLoader(data, batch_size=None)


def fit(module: GAN, data: list[dict[str, torch.Tensor]], **options) -> L.Trainer:
    run = trainer(max_steps=len(data), **options)
    run.fit(module, loader(data))
    return run


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def moved(before: dict[str, torch.Tensor], network: torch.nn.Module) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in network.named_parameters())


# ---- the order of updates


@pytest.mark.parametrize("discriminator_steps", [1, 3])
def test_global_step_counts_generator_updates(discriminator_steps):
    run = fit(points_gan(discriminator_steps=discriminator_steps), batches(6, 6, 6, 6))
    updates = [{int(state["step"]) for state in optimizer.state.values()} for optimizer in run.optimizers]
    assert run.global_step == run.fit_loop.total_batch_idx + 1 == 4
    assert updates == [{4}, {4 * discriminator_steps}]


def test_each_discriminator_update_sees_its_own_part_of_the_batch():
    module, seen = points_gan(discriminator_steps=3), []
    module.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    (batch,) = data = batches(7)
    fit(module, data)
    reals, fakes, for_generator = seen[0:6:2], seen[1:6:2], seen[6:]
    torch.testing.assert_close(torch.cat(reals), batch["image"], rtol=0, atol=0)
    assert [len(x) for x in reals] == [len(x) for x in fakes] == [3, 2, 2]
    assert not torch.isin(fakes[0], fakes[1]).any()
    assert len(for_generator) == 1
    torch.testing.assert_close(for_generator[0], fakes[2], rtol=0, atol=0)  # one forward serves both


def test_both_networks_get_the_labels_of_the_part():
    module, seen = image_gan(num_classes=3, discriminator_steps=2), {"generator": [], "discriminator": []}
    for name, labels in seen.items():
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, labels=labels: labels.append(args[1]))
    fit(module, batches(5, shape=(2, 8, 8)))
    first, second = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    assert [y.tolist() for y in seen["generator"]] == [first.tolist(), second.tolist()]
    assert [y.tolist() for y in seen["discriminator"]] == [y.tolist() for y in (first, first, second, second, second)]


@pytest.mark.parametrize("discriminator_steps", [1, 2])
def test_each_backward_reaches_its_own_network_only(discriminator_steps):
    module, reached = points_gan(discriminator_steps=discriminator_steps), {}
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, n=name: reached.update({n: reached.get(n, 0) + 1}))
    fit(module, batches(4))
    expected = {"generator": 1, "discriminator": discriminator_steps}
    assert reached == {name: expected[name.partition(".")[0]] for name, _ in module.named_parameters()}
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("discriminator_steps", [1, 2])
def test_an_update_equals_a_bare_pytorch_step(discriminator_steps):
    data, bare = batches(5), points_gan().double()
    data = [{**batch, "image": batch["image"].double()} for batch in data]
    module = points_gan(discriminator_steps=discriminator_steps).double()
    fit(module, data)

    g, d = bare.generator, bare.discriminator
    g_optimizer, d_optimizer = Adam(g.parameters(), lr=0.01), Adam(d.parameters(), lr=0.02)
    torch.manual_seed(derive_seed("train", global_seed(), 0, 0))
    for x in data[0]["image"].double().tensor_split(discriminator_steps):
        x_hat = g(torch.randn(len(x), 3, dtype=torch.float64))
        d_loss = -(F.logsigmoid(d(x)) + F.logsigmoid(-d(x_hat.detach()))).mean()
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
    g_loss = -F.logsigmoid(d(x_hat)).mean()
    g_optimizer.zero_grad()
    g_loss.backward()
    g_optimizer.step()

    # The module takes its losses in float32, hence not float64's own tolerance.
    torch.testing.assert_close(module.state_dict(), bare.state_dict(), rtol=1e-5, atol=1e-6)


# ---- optimizers


@pytest.mark.parametrize(("learner", "resting"), [("generator", "discriminator"), ("discriminator", "generator")])
def test_each_network_has_its_own_learning_rate(learner, resting):
    module = points_gan(**{f"{learner}_optimizer": partial(SGD, lr=0.1), f"{resting}_optimizer": partial(SGD, lr=0.0)})
    before = {name: weights(module.get_submodule(name)) for name in (learner, resting)}
    fit(module, batches(4))
    assert moved(before[learner], module.get_submodule(learner))
    assert not moved(before[resting], module.get_submodule(resting))


def test_schedules_step_once_a_generator_update():
    halving = partial(StepLR, step_size=1, gamma=0.5)
    tenth = partial(StepLR, step_size=2, gamma=0.1)
    module = points_gan(discriminator_steps=3, generator_scheduler=halving, discriminator_scheduler=tenth)
    run = fit(module, batches(6, 6))
    rates = {o.param_groups[0]["name"]: o.param_groups[0]["lr"] for o in run.optimizers}
    assert rates == pytest.approx({"generator": 0.01 / 4, "discriminator": 0.02 / 10})


# ---- logs and evaluation


def test_losses_and_logits_are_logged_apart():
    module, logits = points_gan(), []
    module.discriminator.register_forward_hook(lambda *args: logits.append(args[2].detach().clone()))
    metrics = fit(module, batches(5)).callback_metrics
    real, fake, fake_after = logits
    expected = {
        "train/real_logits": real.mean(),
        "train/fake_logits": fake.mean(),
        "train/discriminator_loss": (F.softplus(-real) + F.softplus(fake)).mean(),
        "train/generator_loss": F.softplus(-fake_after).mean(),
    }
    torch.testing.assert_close(dict(metrics), expected)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_held_out_verdicts_are_means_over_the_whole_set(stage):
    module, data = points_gan(), batches(3, 6)
    run = trainer()
    (run.validate if stage == "val" else run.test)(module, loader(data), verbose=False)
    names = ("discriminator_loss", "generator_loss", "real_logits", "fake_logits")
    assert set(run.callback_metrics) == {f"{stage}/{name}" for name in names}
    with torch.no_grad():
        expected = module.discriminator(torch.cat([batch["image"] for batch in data])).mean()
    torch.testing.assert_close(run.callback_metrics[f"{stage}/real_logits"], expected)


def test_validation_within_a_fit_changes_no_weight_of_it():
    data, held_out = batches(4, 4, shape=(2, 8, 8)), batches(3, shape=(2, 8, 8))
    plain, validated = image_gan(), image_gan()
    fit(plain, data)
    run = trainer(max_steps=2, val_check_interval=1)
    run.fit(validated, loader(data), loader(held_out))
    assert "val/generator_loss" in run.callback_metrics
    torch.testing.assert_close(validated.state_dict(), plain.state_dict(), rtol=0, atol=0)


# ---- refusals


def test_a_batch_smaller_than_discriminator_steps_is_refused():
    with pytest.raises(ValueError, match=r"split into discriminator_steps=3 parts, each of .* has 2 examples"):
        fit(points_gan(discriminator_steps=3), batches(2))


def test_discriminator_steps_below_one_are_refused():
    with pytest.raises(ValueError, match="discriminator_steps must be at least 1, got 0"):
        points_gan(discriminator_steps=0)


@pytest.mark.parametrize(("in_generator", "in_discriminator"), [(3, None), (None, 3), (3, 4)])
def test_networks_with_different_classes_are_refused(in_generator, in_discriminator):
    generator = DCGANGenerator(image_size=8, width=2, num_classes=in_generator)
    discriminator = DCGANDiscriminator(image_size=8, width=2, num_classes=in_discriminator)
    with pytest.raises(ValueError, match=f"got num_classes={in_generator} and {in_discriminator}"):
        GAN(generator, discriminator, Hinge(), SGD, SGD)


def test_an_unconditional_model_refuses_labels():
    with pytest.raises(ValueError, match="unconditional, so it takes no label"):
        points_gan().sample(2, label=torch.tensor([0, 1]))


@pytest.mark.parametrize("label", [[0, 3], [-1, 0]])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        image_gan(num_classes=3).sample(2, label=torch.tensor(label))


def test_a_wrong_number_of_labels_is_refused():
    with pytest.raises(ValueError, match="need one label for each of 2 samples"):
        image_gan(num_classes=3).sample(2, label=torch.tensor([0, 1, 2]))


# ---- samples


def test_samples_are_what_the_generator_makes_of_the_noise_and_the_label():
    module, label = image_gan(num_classes=3).eval(), torch.tensor([2, 0, 1, 2])
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    samples = module.sample(4, label=label, generator=torch.Generator().manual_seed(7))
    assert samples.shape == (4, 2, 8, 8)
    assert not samples.requires_grad
    torch.testing.assert_close(samples, module.generator(z, label).detach())


def test_labels_that_are_not_given_are_drawn_for_each_sample():
    module, seen = image_gan(num_classes=3), []
    module.generator.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    module.sample(30, generator=sample_generators(0, 30))
    assert set(seen[0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_sample_does_not_depend_on_its_batch(num_classes):
    module = image_gan(num_classes=num_classes)
    fit(module, batches(6, shape=(2, 8, 8)))
    together = module.sample(8, generator=sample_generators(5, 8))
    apart = [module.sample(n, generator=sample_generators(5, n, start)) for n, start in ((3, 0), (5, 3))]
    torch.testing.assert_close(together, torch.cat(apart))


def test_sampling_is_in_evaluation_mode_and_leaves_the_model_as_it_was():
    module, modes = image_gan().train(), []
    module.generator.layers[1].eval()
    module.generator.register_forward_pre_hook(lambda net, _: modes.extend(m.training for m in net.modules()))
    flags = [m.training for m in module.modules()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    module.sample(4)
    assert not any(modes)
    assert [m.training for m in module.modules()] == flags
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


def test_only_the_generator_is_averaged():
    assert points_gan().sampling_modules == ["generator"]


# ---- precision and checkpoints


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_gives_float32_samples_and_finite_weights(precision):
    module = image_gan(num_classes=3, discriminator_steps=2)
    before = {name: weights(module.get_submodule(name)) for name in ("generator", "discriminator")}
    run = fit(module, batches(6, 6, shape=(2, 8, 8)), precision=precision)
    assert all(moved(value, module.get_submodule(name)) for name, value in before.items())
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in module.parameters())
    assert all(value.dtype == torch.float32 for value in run.callback_metrics.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        assert module.sample(3).dtype == torch.float32


def test_bf16_mixed_updates_are_those_of_float32_up_to_rounding():
    def updates(precision: str) -> torch.Tensor:
        optimizers = {f"{name}_optimizer": partial(SGD, lr=0.5) for name in ("generator", "discriminator")}
        module = points_gan(discriminator_steps=3, **optimizers)
        before = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
        fit(module, batches(60), precision=precision)
        return torch.nn.utils.parameters_to_vector(module.parameters()).detach() - before

    exact = updates("32-true")
    torch.testing.assert_close(updates("bf16-mixed"), exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_losses_are_taken_in_float32_under_bf16_mixed():
    module = points_gan(loss=RememberingHinge())
    fit(module, batches(4), precision="bf16-mixed")
    assert module.loss.dtypes == [torch.float32] * 3


@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_reloaded_checkpoint_gives_the_same_samples(num_classes, tmp_path):
    module = image_gan(num_classes=num_classes, discriminator_steps=2)
    fit(module, batches(6, 6, shape=(2, 8, 8))).save_checkpoint(tmp_path / "gan.ckpt")
    loaded = GAN.load_from_checkpoint(tmp_path / "gan.ckpt")
    samples = [m.sample(4, generator=sample_generators(3, 4)) for m in (module, loaded)]
    torch.testing.assert_close(*samples, rtol=0, atol=0)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_a_reloaded_checkpoint_keeps_its_settings(tmp_path):
    module = points_gan(loss=Hinge(margin=2.5), discriminator_steps=2, generator_scheduler=partial(StepLR, step_size=3))
    fit(module, batches(4)).save_checkpoint(tmp_path / "gan.ckpt")
    loaded = GAN.load_from_checkpoint(tmp_path / "gan.ckpt")
    assert isinstance(loaded.loss, Hinge)
    assert (loaded.loss.margin, loaded.discriminator_steps, loaded.latent_dim) == (2.5, 2, 3)
    generator_entry, discriminator_entry = loaded.configure_optimizers()
    assert generator_entry["optimizer"].defaults["lr"] == 0.01
    assert discriminator_entry["optimizer"].defaults["lr"] == 0.02
    assert generator_entry["lr_scheduler"]["scheduler"].step_size == 3
    assert "lr_scheduler" not in discriminator_entry
