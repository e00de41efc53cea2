from functools import partial

import lightning as L
import pytest
import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.parameterizations import Epsilon, Parameterization, Velocity
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule
from lit_generative.networks.mlp import MLPDenoiser
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import derive_seed, sample_generators
from lit_generative.training.run import global_seed

PARAMETERIZATIONS = [cls for cls in Parameterization.__subclasses__() if cls.__module__.startswith("lit_generative.")]
SHAPE = (3, 2, 4)

both_samplers = pytest.mark.parametrize(
    "sampler", [DDIMSampler(num_steps=5, eta=0.5), DDPMSampler(num_steps=5)], ids=["DDIM", "DDPM"]
)


class Constant(Recorded, torch.nn.Module):
    """Predicts the same number everywhere."""

    sample_shape = SHAPE

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x_t, t, y=None):
        return self.value.expand_as(x_t)


class NoisyConvolution(Recorded, torch.nn.Module):
    """A convolution behind dropout, so that evaluation mode makes a difference."""

    sample_shape = SHAPE

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t, t, y=None):
        return self.layer(self.dropout(x_t))


def ddpm(network: torch.nn.Module | None = None, **options) -> DDPM:
    torch.manual_seed(0)
    defaults = {
        "schedule": LinearSchedule(20, beta_end=0.3),
        "parameterization": Epsilon(),
        "sampler": DDIMSampler(num_steps=5),
        "optimizer": partial(Adam, lr=0.01),
    }
    return DDPM(network or MLPDenoiser(hidden_dim=8, num_layers=1), **{**defaults, **options})


def class_network() -> MLPDenoiser:
    torch.manual_seed(0)
    return MLPDenoiser(hidden_dim=8, num_layers=1, num_classes=3)


def batches(*sizes: int, shape: tuple[int, ...] = (2,)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"image": torch.randn(n, *shape, generator=generator), "label": torch.arange(n) % 3} for n in sizes]


def loader(data: list[dict[str, torch.Tensor]]) -> DataLoader:
    return DataLoader(data, batch_size=None)


def denoising_loss(module: DDPM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    x0 = batch["image"]
    t = module.schedule.random_times(len(x0), "cpu")
    return module.objective.loss(module.predict_noisy(x0, t))


def trainer(**options) -> L.Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, **silent, **options)


def fit(module: DDPM, data: list[dict[str, torch.Tensor]], **options) -> L.Trainer:
    run = trainer(max_steps=len(data), **options)
    run.fit(module, loader(data))
    return run


# ---- the loss


@pytest.mark.parametrize("parameterization", [cls() for cls in PARAMETERIZATIONS], ids=lambda p: type(p).__name__)
def test_the_loss_is_the_mean_squared_error_of_the_prediction(parameterization):
    module, seen = ddpm(Constant(0.25), parameterization=parameterization), []
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args))
    x0 = batches(6, shape=SHAPE)[0]["image"]
    torch.manual_seed(5)
    loss = denoising_loss(module, {"image": x0})
    torch.manual_seed(5)
    t, eps = module.schedule.random_times(6, "cpu"), torch.randn_like(x0)
    alpha, sigma = (value.reshape(6, 1, 1, 1) for value in module.schedule.alpha_sigma(t))
    ((x_seen, t_seen, y),) = seen
    assert y is None
    torch.testing.assert_close(t_seen, t)
    torch.testing.assert_close(x_seen, parameterization.scale_input(alpha * x0 + sigma * eps, alpha, sigma))
    target = parameterization.target(x0, eps, alpha, sigma)
    torch.testing.assert_close(loss, (target - 0.25).square().mean(dim=(1, 2, 3)))


def test_times_are_uniform_and_the_noise_is_standard_normal():
    module, seen = ddpm(Constant()), []
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args))
    torch.manual_seed(0)
    denoising_loss(module, {"image": torch.zeros(20_000, *SHAPE)})
    ((x_t, t, _),) = seen
    shares = torch.bincount(t, minlength=20) / len(t)
    assert len(shares) == 20
    torch.testing.assert_close(shares, torch.full((20,), 0.05), rtol=0, atol=0.01)
    _, sigma = module.schedule.alpha_sigma(t)
    eps = x_t / sigma.reshape(-1, 1, 1, 1)  # the images are zero
    torch.testing.assert_close(eps.mean(), torch.tensor(0.0), rtol=0, atol=0.01)
    torch.testing.assert_close(eps.std(), torch.tensor(1.0), rtol=0, atol=0.01)


# ---- training


def test_an_update_equals_a_bare_pytorch_step():
    (batch,) = data = batches(6)
    module, bare = ddpm(class_network()), ddpm(class_network())
    run = fit(module, data)

    torch.manual_seed(derive_seed("train", global_seed(), 0, 0))
    network, x0 = bare.network, batch["image"]
    optimizer = Adam(network.parameters(), lr=0.01)
    t, eps = torch.randint(20, (6,)), torch.randn_like(x0)
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.3, 20)).cumprod(0)[t, None]
    x_t = alphas_cumprod.sqrt() * x0 + (1 - alphas_cumprod).sqrt() * eps
    loss = (network(x_t, t, batch["label"]) - eps).square().mean()
    loss.backward()
    optimizer.step()

    torch.testing.assert_close(module.state_dict(), bare.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(run.callback_metrics), {"train/loss": loss.detach()}, rtol=1e-4, atol=1e-5)
    assert run.global_step == 1


def test_the_schedule_of_the_learning_rate_steps_once_an_update():
    run = fit(ddpm(scheduler=partial(StepLR, step_size=1, gamma=0.5)), batches(4, 4))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0025)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_the_held_out_loss_is_a_mean_over_the_whole_set(stage):
    data, module, run, parts = batches(2, 6), ddpm(), trainer(), []
    (run.validate if stage == "val" else run.test)(module, loader(data), verbose=False)
    for i, batch in enumerate(data):
        torch.manual_seed(derive_seed(stage, global_seed(), i, 0))
        parts.append(denoising_loss(module, batch).detach())
    torch.testing.assert_close(dict(run.callback_metrics), {f"{stage}/loss": torch.cat(parts).mean()})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_gives_float32_samples_and_finite_weights(precision):
    module = ddpm(NoisyConvolution(), parameterization=Velocity(), schedule=CosineSchedule(20))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    run = fit(module, batches(6, 6, shape=SHAPE), precision=precision)
    for name, value in module.named_parameters():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert not torch.equal(value, before[name]), name
    assert run.callback_metrics["train/loss"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        samples = module.sample(3)
    assert samples.dtype == torch.float32
    assert samples.isfinite().all()


# ---- samples


@both_samplers
def test_a_sample_depends_on_its_own_generator_and_not_on_its_batch(sampler):
    module = ddpm(NoisyConvolution(), sampler=sampler)
    together = module.sample(8, generator=sample_generators(5, 8))
    apart = [module.sample(n, generator=sample_generators(5, n, start)) for n, start in ((3, 0), (5, 3))]
    assert together.shape == (8, *SHAPE)
    assert not together.requires_grad
    torch.testing.assert_close(module.sample(8, generator=sample_generators(5, 8)), together, rtol=0, atol=0)
    torch.testing.assert_close(together, torch.cat(apart))
    assert (together[0] != together[1]).any()


@both_samplers
def test_the_trajectory_has_a_pair_for_each_step_and_ends_at_the_sample(sampler):
    module = ddpm(NoisyConvolution(), sampler=sampler)
    steps = list(module.trajectory(4, generator=sample_generators(5, 4)))
    assert len(steps) == 5
    assert all(x_t.shape == x0.shape == (4, *SHAPE) for x_t, x0 in steps)
    torch.testing.assert_close(steps[-1][0], module.sample(4, generator=sample_generators(5, 4)), rtol=0, atol=0)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_trajectory_leaves_the_callers_gradient_mode_alone(gradients):
    module = ddpm()
    with torch.set_grad_enabled(gradients):
        for x_t, x0 in module.trajectory(4):
            assert torch.is_grad_enabled() == gradients
            assert not x_t.requires_grad
            assert not x0.requires_grad
        assert torch.is_grad_enabled() == gradients


@pytest.mark.parametrize("steps", [1, 5])
def test_sampling_is_in_evaluation_mode_and_leaves_the_model_as_it_was(steps):
    module, modes = ddpm(NoisyConvolution()).train(), []
    module.network.layer.eval()
    module.network.register_forward_pre_hook(lambda net, _: modes.extend(m.training for m in net.modules()))
    flags = [m.training for m in module.modules()]
    walk = module.trajectory(2)
    for _ in range(steps):
        next(walk)
    walk.close()  # also a walk that is given up halfway
    assert modes
    assert not any(modes)
    assert [m.training for m in module.modules()] == flags


def test_the_label_argument_reaches_the_network():
    module, seen = ddpm(class_network(), clip_samples=False), []
    label = torch.tensor([2, 0, 1])
    samples = module.sample(3, label=label, generator=sample_generators(0, 3))
    others = module.sample(3, label=(label + 1) % 3, generator=sample_generators(0, 3))
    assert (samples != others).any(dim=1).all()
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args[2].tolist()))
    module.sample(3, label=label)
    assert seen == [[2, 0, 1]] * 5


def test_labels_that_are_not_given_are_drawn_for_each_sample():
    module, seen = ddpm(class_network()), []
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    module.sample(30, generator=sample_generators(0, 30))
    assert set(seen[0].tolist()) == {0, 1, 2}
    assert all(torch.equal(y, seen[0]) for y in seen)


@pytest.mark.parametrize("sampler", [DDIMSampler(num_steps=20), DDPMSampler(num_steps=20)], ids=["DDIM", "DDPM"])
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
def test_samples_are_clipped_to_the_range_of_images(sampler, schedule):
    module = ddpm(Constant(), sampler=sampler, schedule=schedule)  # no noise anywhere: the guess is x_t / alpha
    assert module.sample(5).abs().max() <= 1


@both_samplers
def test_samples_are_free_if_clipping_is_turned_off(sampler):
    assert ddpm(Constant(), sampler=sampler, clip_samples=False).sample(5).abs().max() > 1


def test_only_the_network_is_averaged():
    assert ddpm().sampling_modules == ["network"]


# ---- refusals


def test_more_steps_than_levels_are_refused_before_training():
    with pytest.raises(ValueError, match="DDIMSampler: num_steps=21 is more than the schedule's 20 noise levels"):
        ddpm(sampler=DDIMSampler(num_steps=21))


def test_an_unconditional_model_refuses_labels():
    with pytest.raises(ValueError, match="unconditional, so it takes no label"):
        ddpm().sample(2, label=torch.tensor([0, 1]))


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, got 0\.\.3"):
        ddpm(class_network()).sample(2, label=torch.tensor([0, 3]))


# ---- checkpoints


@both_samplers
@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_reloaded_checkpoint_gives_the_same_samples_and_settings(sampler, num_classes, tmp_path):
    network = MLPDenoiser(hidden_dim=8, num_layers=1, num_classes=num_classes)
    module = ddpm(network, sampler=sampler, schedule=CosineSchedule(12, offset=0.1), clip_samples=False)
    fit(module, batches(4, 4)).save_checkpoint(tmp_path / "ddpm.ckpt")
    loaded = DDPM.load_from_checkpoint(tmp_path / "ddpm.ckpt")
    samples = [m.sample(4, generator=sample_generators(3, 4)) for m in (module, loaded)]
    torch.testing.assert_close(*samples, rtol=0, atol=0)
    torch.testing.assert_close(loaded.schedule.alphas_cumprod, module.schedule.alphas_cumprod, rtol=0, atol=0)
    assert vars(loaded.sampler)["num_steps"] == 5
    assert (loaded.clip_samples, loaded.num_classes) == (False, num_classes)
    assert loaded.configure_optimizers()["optimizer"].defaults["lr"] == 0.01


# ---- options


def test_label_dropout_hides_some_labels_in_training_and_none_in_validation():
    module, seen = ddpm(class_network(), label_dropout=0.3), []
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    trainer().validate(module, loader(batches(900)), verbose=False)
    fit(module, batches(900))
    in_validation, in_training = seen
    assert set(in_validation.tolist()) == {0, 1, 2}
    assert (in_training == 3).float().mean().item() == pytest.approx(0.3, abs=0.05)
    kept = in_training != 3
    torch.testing.assert_close(in_training[kept], (torch.arange(900) % 3)[kept])


def test_an_objective_with_parts_logs_them():
    from lit_generative.diffusion.bounds import ContinuousGaussian
    from lit_generative.diffusion.objectives import Hybrid

    network = MLPDenoiser(hidden_dim=8, num_layers=1, learned_variance=True)
    module = ddpm(network, objective=Hybrid(decoder=ContinuousGaussian()))
    run = fit(module, batches(6))
    assert {"train/loss", "train/simple", "train/vlb_bits_per_dim"} == set(run.callback_metrics)
    assert module.sample(4).isfinite().all()


def test_noise_and_times_are_those_asked_for():
    from lit_generative.diffusion.noise import NoiseSource
    from lit_generative.diffusion.times import LogitNormal

    module, seen = ddpm(Constant(), noise=NoiseSource(perturbation=2.0), times=LogitNormal(mean=-4.0, std=0.1)), []
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args))
    fit(module, [{"image": torch.zeros(500, *SHAPE)}])
    ((x_t, t, _),) = seen
    assert t.max() <= 1  # sigmoid(-4) of 20 levels
    _, sigma = module.schedule.alpha_sigma(t)
    assert (x_t / sigma.reshape(-1, 1, 1, 1)).std().item() == pytest.approx(5**0.5, rel=0.05)


def test_times_that_learn_see_each_loss_and_weigh_it():
    from lit_generative.diffusion.times import LossSecondMoment

    module = ddpm(times=LossSecondMoment(num_timesteps=20, history=1))
    before = {name: value.clone() for name, value in module.times.state_dict().items()}
    fit(module, batches(60, 60))
    assert any(not torch.equal(value, before[name]) for name, value in module.times.state_dict().items())


def test_filled_holes_agree_with_what_is_known():
    torch.manual_seed(0)  # with other weights a pixel may be clamped to the same end in both
    module, (batch,) = ddpm(NoisyConvolution(), sampler=DDPMSampler(5)), batches(4, shape=SHAPE)
    x = 0.9 * batch["image"].clamp(-1, 1)
    mask = torch.zeros(4, 1, 2, 4, dtype=torch.bool)
    mask[..., :2] = True
    filled = module.inpaint(x, mask, generator=sample_generators(0, 4), num_resamples=2)
    torch.testing.assert_close(filled[..., :2], x[..., :2], rtol=0, atol=0)
    assert (filled[..., 2:] != x[..., 2:]).all()
    alone = module.inpaint(x[:1], mask[:1], generator=sample_generators(0, 1), num_resamples=2)
    torch.testing.assert_close(alone, filled[:1])
    other = module.inpaint(x, mask, generator=sample_generators(0, 4), num_resamples=1)
    assert not torch.allclose(other, filled)


def test_a_walk_that_fills_holes_jumps_as_far_as_it_is_told_and_one_level_if_not():
    module, seen = ddpm(Constant(0.5)), []
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args[1][0].item()))
    x, mask = torch.zeros(2, *SHAPE), torch.rand(2, 1, 2, 4, generator=torch.Generator().manual_seed(0)) < 0.5

    def filled(**options) -> torch.Tensor:
        return module.inpaint(x, mask, generator=sample_generators(0, 2), num_resamples=2, **options)

    ones, untold = filled(jump_length=1), filled()
    torch.testing.assert_close(ones, untold, rtol=0, atol=0)
    seen.clear()
    filled(jump_length=2)
    a, b, c, d, e = sorted(set(seen), reverse=True)
    assert seen == [a, b, a, b, c, d, c, d, e]


def super_resolution() -> tuple[DDPM, list[torch.Tensor]]:
    """A model of 8 x 8 pixels, and what its network will see."""
    from lit_generative.diffusion.conditions import SuperResolution
    from lit_generative.networks.diffusers_unet import DiffusersUNet

    torch.manual_seed(0)
    network = DiffusersUNet(8, 1, widths=(8,), layers_per_block=1, attention_levels=(), extra_channels=1)
    seen: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return ddpm(network, condition=SuperResolution(4)), seen


def test_a_model_of_super_resolution_draws_from_small_images_alone():
    module, seen = super_resolution()
    condition = module.condition
    x = batches(4, shape=(1, 8, 8))[0]["image"]
    fit(module, [{"image": x}])
    torch.testing.assert_close(seen[0][:, 1:], condition.of(x))
    low = condition.shrink(x)
    large = module.super_resolve(low, generator=sample_generators(0, 4))
    assert large.shape == (4, 1, 8, 8)
    torch.testing.assert_close(seen[-1][:, 1:], condition.of(x))
    with pytest.raises(ValueError, match="samples of this model need images, of which it makes its SuperResolution"):
        module.sample(2)
    with pytest.raises(ValueError, match="trained with the condition SuperResolution"):
        ddpm(NoisyConvolution()).super_resolve(low)
    with pytest.raises(ValueError, match=r"needs small images of shape \(N, 1, 2, 2\), got \(4, 1, 8, 8\)"):
        module.super_resolve(x)


def test_samples_like_images_are_made_of_what_the_model_is_shown_of_them():
    module, seen = super_resolution()
    x = batches(4, shape=(1, 8, 8))[0]["image"]
    shown, samples = module.samples_of(x, generator=sample_generators(0, 4))
    torch.testing.assert_close(shown, module.condition.of(x), rtol=0, atol=0)
    torch.testing.assert_close(seen[0][:, 1:], shown)
    expected = module.super_resolve(module.condition.shrink(x), generator=sample_generators(0, 4))
    torch.testing.assert_close(samples, expected)
    with pytest.raises(ValueError, match="samples_of needs a model with a condition"):
        ddpm(NoisyConvolution()).samples_of(x)


def test_holes_are_filled_in_images_of_the_models_size():
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"inpaint: needs images of shape \(N, 3, 2, 4\), got \(2, 1, 4, 4\)"):
        ddpm(NoisyConvolution()).inpaint(x, x > 0)


def test_a_model_that_is_shown_images_fills_no_holes():
    module, _ = super_resolution()
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="inpaint needs a model without condition: no SuperResolution can be made"):
        module.inpaint(x, x > 0)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_bound_is_computed_once_a_step_though_it_is_loss_and_log(stage, monkeypatch):
    from lit_generative.diffusion.bounds import ContinuousGaussian
    from lit_generative.diffusion.objectives import Hybrid, VariationalBoundObjective

    calls, original = [], VariationalBoundObjective.loss
    monkeypatch.setattr(VariationalBoundObjective, "loss", lambda *args: calls.append(1) or original(*args))
    network = MLPDenoiser(hidden_dim=8, num_layers=1, learned_variance=True)
    module = ddpm(network, objective=Hybrid(decoder=ContinuousGaussian()))
    getattr(trainer(max_steps=2), stage)(module, loader(batches(4, 4)))
    assert len(calls) == 2
