"""``litgen export``: a checkpoint becomes a folder that diffusers reads."""

import functools

import pytest
import torch

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.loading import load_module
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


@pytest.mark.parametrize(("option", "ema"), [((), None), (("--no-ema",), False)])
def test_the_folder_draws_what_the_checkpoint_draws(checkpoint, tmp_path, capsys, option, ema):
    from diffusers import DiffusionPipeline

    out = tmp_path / "pipeline"
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(out), "--label", "3", *option]) == 0
    wrote, call = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {out}"
    assert "use_clipped_model_output=True" in call
    pipeline = DiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        generator=sample_generators(1, 2),
        num_inference_steps=10,
        use_clipped_model_output=True,
        output_type="np",
    ).images
    ours = load_module(checkpoint, ema=ema).sample(2, torch.tensor([3, 3]), sample_generators(1, 2))
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, ours, rtol=0, atol=1e-4)


def test_averaged_and_raw_weights_differ(checkpoint):
    ours, raw = (load_module(checkpoint, ema=ema).sample(2, generator=sample_generators(1, 2)) for ema in (None, False))
    assert not torch.allclose(ours, raw, atol=1e-3)


def test_a_folder_that_holds_something_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path), "--label", "3"]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_another_family_is_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    tiny.train(folder, tiny.vae(), tiny.digits(), callbacks=[Checkpoint(dirpath=str(folder))])
    assert main(["export", "--ckpt_path", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "holds a VAE, not a diffusion model" in capsys.readouterr().err
