"""``litgen export``: a checkpoint becomes a folder that diffusers reads."""

import functools

import pytest
import torch
from peft import LoraConfig, PeftModel

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.diffusion.guidance import ClassifierFree
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.solvers import HeunSampler
from lit_generative.diffusion.spacings import Trailing
from lit_generative.finetune.adapters import Adapted
from lit_generative.loading import load_module
from lit_generative.loading_parts import CheckpointPart
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.tensor_ops import sample_generators
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    network = DiffusersUNet(8, 1, num_classes=10, widths=(8,), layers_per_block=1, attention_levels=())
    optimizer = functools.partial(torch.optim.Adam, lr=0.02)
    module = tiny.ddpm(network=network, sampler=DDIMSampler(10), optimizer=optimizer)
    callbacks = [EMA(half_life=100), Checkpoint(dirpath=str(folder))]
    tiny.train(folder, module, tiny.digits(), max_steps=6, callbacks=callbacks)
    return folder / "last.ckpt"


def drawn(pipeline, num_steps):
    options = {"use_clipped_model_output": True, "num_inference_steps": num_steps}
    return tiny.drawn(pipeline, sample_generators(1, 2), **options)


@pytest.mark.parametrize(("option", "ema"), [((), None), (("--no-ema",), False)])
def test_the_folder_draws_what_the_checkpoint_draws(checkpoint, tmp_path, capsys, option, ema):
    from diffusers import DiffusionPipeline

    out = tmp_path / "pipeline"
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(out), "--label", "3", *option]) == 0
    wrote, call = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {out}"
    assert "use_clipped_model_output=True" in call
    ours = load_module(checkpoint, ema=ema).sample(2, torch.tensor([3, 3]), sample_generators(1, 2))
    torch.testing.assert_close(drawn(DiffusionPipeline.from_pretrained(out), 10), ours, rtol=0, atol=1e-4)


def test_averaged_and_raw_weights_differ(checkpoint):
    ours, raw = (load_module(checkpoint, ema=ema).sample(2, generator=sample_generators(1, 2)) for ema in (None, False))
    assert not torch.allclose(ours, raw, atol=1e-3)


def test_the_options_choose_the_pipelines_sampler_for_a_run_whose_own_has_none(tmp_path, capsys):
    from diffusers import DDIMPipeline

    torch.manual_seed(0)
    network = DiffusersUNet(8, 1, num_classes=10, widths=(8,), layers_per_block=1, attention_levels=())
    guided = HeunSampler(3, spacing=Trailing(), guidance=ClassifierFree(3.0))
    optimizer = functools.partial(torch.optim.Adam, lr=0.02)
    module = tiny.ddpm(network=network, sampler=guided, label_dropout=0.2, optimizer=optimizer)
    tiny.train(tmp_path, module, tiny.digits(), max_steps=3, callbacks=[Checkpoint(dirpath=str(tmp_path))])
    command = ["export", "--ckpt_path", str(tmp_path / "last.ckpt"), "--label", "3", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "sampler HeunSampler and its sampler is guided" in told
    assert "Choose a sampler with --sampler, --num_steps and --guidance_scale 1." in told
    assert main([*command, "--sampler", "DDIMSampler", "--num_steps", "5", "--guidance_scale", "1"]) == 0
    assert "num_inference_steps=5" in capsys.readouterr().out
    module = load_module(tmp_path / "last.ckpt")
    module.sampler = DDIMSampler(5, spacing=Trailing())
    ours = module.sample(2, torch.tensor([3, 3]), sample_generators(1, 2))
    torch.testing.assert_close(drawn(DDIMPipeline.from_pretrained(tmp_path / "out"), 5), ours, rtol=0, atol=1e-4)


def test_a_folder_that_holds_something_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path), "--label", "3"]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_another_family_is_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    tiny.train(folder, tiny.vae(), tiny.digits(), callbacks=[Checkpoint(dirpath=str(folder))])
    assert main(["export", "--ckpt_path", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "holds a VAE, not a model of that form. It has no such form." in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A checkpoint of a DDPM on points, and the run of a LoRA on it."""
    folder = tmp_path_factory.mktemp("adapted")
    base = tiny.point_ddpm(optimizer=functools.partial(torch.optim.Adam, lr=0.02))
    tiny.train(folder, base, tiny.ring(), callbacks=[Checkpoint(dirpath=str(folder / "base"))])
    network = Adapted(
        CheckpointPart(str(folder / "base/last.ckpt"), part="network"), LoraConfig(r=2, target_modules="all-linear")
    )
    module = tiny.point_ddpm(network=network, optimizer=functools.partial(torch.optim.Adam, lr=0.1))
    tiny.train(folder, module, tiny.ring(), callbacks=[Checkpoint(dirpath=str(folder / "lora"))])
    return folder


def points(path, ema=None):
    return load_module(path, ema).sample(4, generator=sample_generators(1, 4))


def test_an_adapter_is_loaded_with_the_checkpoint_it_was_trained_on(adapted):
    changed = points(adapted / "lora/last.ckpt")
    assert (changed - points(adapted / "base/last.ckpt")).abs().max() > 0.01
    assert (adapted / "lora/last.ckpt").stat().st_size < (adapted / "base/last.ckpt").stat().st_size * 2


def test_the_adapter_alone_is_read_by_peft(adapted, tmp_path, capsys):
    out = tmp_path / "peft"
    command = ["export", "--ckpt_path", str(adapted / "lora/last.ckpt"), "--format", "peft", "--out", str(out)]
    assert main([*command, "--license", "cc-by-4.0"]) == 0
    assert "PeftModel.from_pretrained(network" in capsys.readouterr().out
    module = load_module(adapted / "base/last.ckpt")
    module.network = PeftModel.from_pretrained(module.network, str(out / "network"))
    samples = module.sample(4, generator=sample_generators(1, 4))
    torch.testing.assert_close(samples, points(adapted / "lora/last.ckpt"))
    assert "license: cc-by-4.0" in (out / "README.md").read_text()


def test_a_merged_checkpoint_needs_no_other(adapted, tmp_path):
    out = tmp_path / "merged"
    assert (
        main(["export", "--ckpt_path", str(adapted / "lora/last.ckpt"), "--format", "merged", "--out", str(out)]) == 0
    )
    expected = points(adapted / "lora/last.ckpt")
    torch.testing.assert_close(points(out / "merged.ckpt"), expected, rtol=1e-4, atol=1e-5)
    keys = torch.load(out / "merged.ckpt", weights_only=True)["state_dict"].keys()
    assert keys == load_module(adapted / "base/last.ckpt").state_dict().keys()


def test_a_form_that_the_model_has_not_names_those_it_has(adapted, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["export", "--ckpt_path", str(adapted / "lora/last.ckpt"), "--format", "transformers", "--out", out]
    assert main(command) == 1
    assert "It can be written as peft, merged." in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--label", "1"), ("--sampler", "DDIMSampler"), ("--guidance_scale", "2")])
def test_a_label_and_a_sampler_are_for_pipelines_alone(adapted, tmp_path, capsys, option):
    out = str(tmp_path / "out")
    command = ["export", "--ckpt_path", str(adapted / "lora/last.ckpt"), "--format", "peft", "--out", out]
    assert main([*command, *option]) == 1
    assert f"{option[0]}: is for the pipeline of a DDPM, not for a DDPM as peft." in capsys.readouterr().err
