"""A checkpoint draws with another sampler, other steps and another guidance than it was trained with."""

import argparse

import pytest
import torch

from lit_generative.cli import samplers
from lit_generative.diffusion.diffusers_sampler import DiffusersSampler
from lit_generative.diffusion.guidance import ClassifierFree
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.solvers import HeunSampler
from lit_generative.diffusion.spacings import Trailing
from lit_generative.recipe import describe
from lit_generative.tensor_ops import sample_generators
from tests import families, tiny


def chosen(module, *options: str):
    parser = argparse.ArgumentParser()
    samplers.add_arguments(parser)
    args = parser.parse_args(options)
    args.ckpt_path = "x.ckpt"
    samplers.choose(args, module)
    return module.sampler


def guided(**options):
    return tiny.ddpm(num_classes=3, label_dropout=0.1, **options)


def test_without_options_the_sampler_is_the_runs():
    module = guided()
    before = module.sampler
    assert chosen(module) is before


def test_steps_alone_keep_the_rest():
    old = HeunSampler(3, s_churn=2.0, spacing=Trailing(), guidance=ClassifierFree(2.0, rescale=0.5))
    new = chosen(guided(sampler=old), "--num_steps", "5")
    assert describe(new) == describe(HeunSampler(5, 2.0, spacing=Trailing(), guidance=ClassifierFree(2.0, rescale=0.5)))
    assert old.num_steps == 3


def test_another_scale_keeps_the_kind_of_guidance_and_a_first_one_is_classifier_free():
    new = chosen(guided(sampler=DDIMSampler(3, guidance=ClassifierFree(2.0, rescale=0.5))), "--guidance_scale", "4")
    assert describe(new.guidance) == describe(ClassifierFree(4.0, rescale=0.5))
    assert describe(chosen(guided(), "--guidance_scale", "3").guidance) == describe(ClassifierFree(3.0))


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_another_sampler_keeps_steps_spacing_and_guidance(name):
    module = guided(sampler=DDIMSampler(4, eta=0.3, spacing=Trailing(), guidance=ClassifierFree(2.0)))
    new = chosen(module, "--sampler", name)
    assert type(new).__name__ == name
    assert (new.num_steps, type(new.spacing), new.guidance.scale) == (4, Trailing, 2.0)
    assert getattr(new, "eta", 0.3) == 0.3  # its own only where it is the same
    assert module.sample(2, generator=sample_generators(0, 2)).isfinite().all()


def test_a_scheduler_of_diffusers_takes_other_steps():
    from diffusers import DDIMScheduler

    old = DiffusersSampler(DDIMScheduler(), 3)
    module = tiny.ddpm(sampler=old)
    new = chosen(module, "--num_steps", "5")
    assert describe(new) == describe(DiffusersSampler(DDIMScheduler(), 5))
    assert old.num_steps == 3
    expected = tiny.ddpm(sampler=DiffusersSampler(DDIMScheduler(), 5)).sample(2, generator=sample_generators(0, 2))
    torch.testing.assert_close(module.sample(2, generator=sample_generators(0, 2)), expected)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: tiny.vae(), ["--num_steps", "5"], "--num_steps: the VAE in x.ckpt has no sampler to choose"),
        (lambda: tiny.vae(), ["--sampler", "DDIMSampler"], "--sampler: the VAE in x.ckpt has no sampler to choose"),
        (lambda: tiny.ddpm(), ["--num_steps", "11"], "num_steps=11 is more than the schedule's 10 noise levels"),
        (lambda: tiny.ddpm(), ["--num_steps", "0"], "num_steps must be at least 1, got 0"),
        (lambda: tiny.ddpm(), ["--guidance_scale", "2"], "ClassifierFree asks the network without a label"),
    ],
)
def test_what_does_not_fit_is_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        chosen(build(), *options)


def test_sample_and_evaluate_draw_with_it(tmp_path, capsys):
    import json

    from lit_generative.__main__ import main

    run = families.trainer(tmp_path / "run", max_steps=1, limit_val_batches=0)
    run.fit(families.build("ddpm"), families.digits())
    run.save_checkpoint(tmp_path / "run" / "last.ckpt")
    path = ["--ckpt_path", str(tmp_path / "run" / "last.ckpt"), "--device", "cpu", "--num", "4"]
    pictures = []
    for options in ([], ["--sampler", "DDIMSampler"], ["--num_steps", "2"]):
        assert main(["sample", *path, "--out", str(tmp_path), *options]) == 0
        pictures.append((tmp_path / "grid.png").read_bytes())
    assert len(set(pictures)) == 3
    data = "class_path: lit_generative.data.digits.Digits\n"
    (tmp_path / "data.yaml").write_text(f"data:\n  {data}")
    scored = ["--reference", str(tmp_path / "data.yaml"), "--extractor", "digits", "--metrics", "kid"]
    options = ["--json", str(tmp_path / "scores.json"), "--num_steps", "2"]
    assert main(["evaluate", *path, *scored, *options]) == 0
    record = json.loads((tmp_path / "scores.json").read_text())["record"]
    assert record["subject"]["sampler"]["init_args"]["num_steps"] == 2
