"""Pipelines of diffusers draw the images that the model draws."""

import json

import pytest
import torch

from lit_generative.diffusion.continuous import RectifiedFlow
from lit_generative.diffusion.guidance import ClassifierFree
from lit_generative.diffusion.objectives import Hybrid
from lit_generative.diffusion.parameterizations import CleanImage, Epsilon, FlowVelocity, Velocity
from lit_generative.diffusion.pipelines import how_to_call, to_pipeline
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule
from lit_generative.diffusion.solvers import EulerSampler
from lit_generative.diffusion.spacings import EvenLogSNR, Leading, Linspace, Trailing
from lit_generative.diffusion.variances import BetaVariance, LearnedVariance, PosteriorVariance
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.tensor_ops import sample_generators
from tests import tiny
from tests.tiny import ddpm, point_ddpm, weights


def unet(**options):
    torch.manual_seed(0)
    defaults = {"image_size": 8, "channels": 1, "widths": (8, 16), "layers_per_block": 1, "attention_levels": (-1,)}
    network = DiffusersUNet(**defaults | options)
    for p in network.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(p, std=0.2)
    return network


def drawn(pipeline, **options):
    return tiny.drawn(pipeline, sample_generators(5, 3), **options)


CASES = {
    "DDPM": ({"sampler": DDPMSampler(20)}, {}),
    "DDPM beta, linspace": ({"sampler": DDPMSampler(7, variance=BetaVariance(), spacing=Linspace())}, {}),
    "DDPM leading": ({"sampler": DDPMSampler(5, spacing=Leading())}, {}),
    "DDPM trailing, v": ({"sampler": DDPMSampler(5, spacing=Trailing()), "parameterization": Velocity()}, {}),
    "DDPM small, x0": (
        {"sampler": DDPMSampler(20, variance=PosteriorVariance()), "parameterization": CleanImage()},
        {},
    ),
    "DDIM": ({"sampler": DDIMSampler(20)}, {"use_clipped_model_output": True}),
    "DDIM leading": ({"sampler": DDIMSampler(5, spacing=Leading())}, {"use_clipped_model_output": True}),
    "DDIM leading, offset": ({"sampler": DDIMSampler(5, spacing=Leading(1))}, {"use_clipped_model_output": True}),
    "DDIM trailing, eta": (
        {"sampler": DDIMSampler(5, eta=0.5, spacing=Trailing())},
        {"eta": 0.5, "use_clipped_model_output": True},
    ),
    "DDIM unclipped": ({"sampler": DDIMSampler(5, spacing=Trailing()), "clip_samples": False}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_draws_the_same_images_after_a_round_trip_through_a_folder(case, tmp_path):
    from diffusers import DiffusionPipeline

    options, call = CASES[case]
    module = ddpm(**{"network": unet(), "schedule": CosineSchedule(20)} | options)
    to_pipeline(module).save_pretrained(tmp_path)
    assert how_to_call(module).endswith("draws the same images.")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    ours = module.sample(3, generator=sample_generators(5, 3)).clamp(-1, 1)
    theirs = drawn(pipeline, num_inference_steps=module.sampler.num_steps, **call)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.05


@pytest.mark.parametrize(
    ("sampler", "variance"),
    [
        (DDPMSampler(20), "learned_range"),
        (DDPMSampler(5, spacing=Leading()), "learned_range"),
        (DDPMSampler(7, variance=LearnedVariance()), "learned_range"),
        (DDPMSampler(5, variance=PosteriorVariance(), spacing=Trailing()), "fixed_small"),
        (DDPMSampler(5, variance=BetaVariance(), spacing=Leading()), "fixed_large"),
        (DDIMSampler(5, spacing=Trailing()), None),
    ],
)
def test_a_learned_variance_goes_along_where_the_sampler_takes_it(sampler, variance, tmp_path):
    from diffusers import DiffusionPipeline

    module = ddpm(
        network=unet(learned_variance=True),
        schedule=LinearSchedule(20, beta_end=0.3),
        sampler=sampler,
        objective=Hybrid(),
    )
    before = weights(module)
    ours = module.sample(3, generator=sample_generators(5, 3)).clamp(-1, 1)
    to_pipeline(module).save_pretrained(tmp_path)
    assert how_to_call(module).endswith("draws the same images.")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.get("variance_type") == variance
    assert pipeline.unet.config.out_channels == (2 if variance == "learned_range" else 1)
    call = {} if variance else {"use_clipped_model_output": True}
    theirs = drawn(pipeline, num_inference_steps=sampler.num_steps, **call)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(weights(module), before, rtol=0, atol=0)


@pytest.mark.parametrize("spacing", [Trailing(), Leading(1)])
def test_noise_that_diffusers_leaves_in_the_last_step_is_said(spacing):
    large = ddpm(network=unet(), schedule=LinearSchedule(20), sampler=DDPMSampler(5, BetaVariance(), spacing))
    assert "leaves noise in its images: the last step is at time" in how_to_call(large)
    ours = large.sample(3, generator=sample_generators(5, 3)).clamp(-1, 1)
    assert (drawn(to_pipeline(large), num_inference_steps=5) - ours).abs().max() > 1e-3
    small = ddpm(network=unet(), schedule=LinearSchedule(20), sampler=DDPMSampler(5, PosteriorVariance(), spacing))
    ours = small.sample(3, generator=sample_generators(5, 3)).clamp(-1, 1)
    assert how_to_call(small).endswith("draws the same images.")
    torch.testing.assert_close(drawn(to_pipeline(small), num_inference_steps=5), ours, rtol=0, atol=1e-4)


def test_one_class_of_a_conditional_model_becomes_the_whole_pipeline():
    module = ddpm(network=unet(num_classes=4), sampler=DDIMSampler(10))
    module.network.unet.class_embedding.weight.data *= 20
    before = weights(module)
    others = []
    for label in (1, 3):
        pipeline = to_pipeline(module, label)
        assert pipeline.unet.config.num_class_embeds is None
        theirs = drawn(pipeline, num_inference_steps=10, use_clipped_model_output=True)
        ours = module.sample(3, torch.tensor([label] * 3), sample_generators(5, 3)).clamp(-1, 1)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        others.append(theirs)
    assert not torch.allclose(*others, atol=1e-2)
    torch.testing.assert_close(weights(module), before, rtol=0, atol=0)


def test_ddim_on_times_that_diffusers_does_not_visit_says_so():
    module = ddpm(network=unet(), sampler=DDIMSampler(3))
    assert "on other times" in how_to_call(module)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"network": unet(patch_size=2)}, "folds patches"),
        (
            {"schedule": RectifiedFlow(), "parameterization": FlowVelocity()},
            "continuous and of its parameterization Flow",
        ),
        ({"sampler": EulerSampler(3)}, "of its sampler EulerSampler"),
        ({"sampler": DDIMSampler(3, spacing=EvenLogSNR())}, "of its spacing EvenLogSNR"),
        (
            {
                "network": unet(num_classes=2),
                "label_dropout": 0.1,
                "sampler": DDIMSampler(3, guidance=ClassifierFree(2.0)),
            },
            "its sampler is guided",
        ),
        ({"network": unet(extra_channels=1), "self_conditioning": True}, "sees more than x_t"),
    ],
)
def test_what_a_pipeline_has_no_place_for_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        to_pipeline(ddpm(**{"network": unet()} | changes))


def test_a_model_of_points_is_refused():
    with pytest.raises(ValueError, match="its network is no DiffusersUNet"):
        to_pipeline(point_ddpm())


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"choose it: 0\.\.1, got None"):
        to_pipeline(ddpm(network=unet(num_classes=2), sampler=DDIMSampler(3)))
    with pytest.raises(ValueError, match=r"choose it: 0\.\.1, got 2"):
        to_pipeline(ddpm(network=unet(num_classes=2), sampler=DDIMSampler(3)), 2)
    with pytest.raises(ValueError, match="has no classes"):
        to_pipeline(ddpm(network=unet()), 1)


def test_the_schedule_is_kept_to_the_last_digit(tmp_path):
    module = ddpm(network=unet(), schedule=CosineSchedule(20), sampler=DDPMSampler(20), parameterization=Epsilon())
    to_pipeline(module).save_pretrained(tmp_path)
    betas = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["trained_betas"]
    assert betas == module.schedule.betas.tolist()
    assert not list(tmp_path.rglob("*.bin"))
    assert list(tmp_path.rglob("*.safetensors"))
