import json
import shutil

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from lit_generative.diffusion.parameterizations import Epsilon, Velocity
from lit_generative.finetune.pipelines import SD, SDXL, build_pipeline, load_pipeline, noise_of


def test_both_kinds_are_loaded_in_float32_and_known_by_their_index(tiny_sd, tiny_sdxl):
    for folder, name in ((tiny_sd, SD), (tiny_sdxl, SDXL)):
        pipeline = load_pipeline("X", folder)
        assert type(pipeline).__name__ == name
        assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}


def test_half_precision_on_disk_becomes_float32(tiny_sd, tmp_path):
    diffusers.DiffusionPipeline.from_pretrained(tiny_sd).to(torch.float16).save_pretrained(tmp_path)
    pipeline = load_pipeline("X", str(tmp_path))
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_a_language_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"must be a pipeline's folder.*holds a LlamaForCausalLM.*CausalLM"):
        load_pipeline("X", str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model_index.json, but .* holds none"):
        load_pipeline("X", str(tmp_path))


def test_another_pipeline_is_refused_by_name(tmp_path):
    unet = UNet2DModel(
        sample_size=4,
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a DDPMPipeline"):
        load_pipeline("X", str(tmp_path))


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"there is no folder \./lost"):
        load_pipeline("X", "./lost")


def test_a_hub_name_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"X: the pipeline nobody/nothing cannot be loaded.*in its cache"):
        load_pipeline("X", "nobody/nothing")


def test_pickled_weights_are_refused(tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "sd")
    file = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ValueError, match=r"with safetensors"):
        load_pipeline("X", str(tmp_path / "sd"))


def test_a_unet_that_sees_more_than_latents_is_refused(tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "sd")
    pipeline = load_pipeline("X", tiny_sd)
    unet = diffusers.UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    unet.save_pretrained(tmp_path / "sd" / "unet")
    with pytest.raises(ValueError, match=r"latents alone, of 4 channels, but .* takes 9"):
        load_pipeline("X", str(tmp_path / "sd"))


def test_a_pipeline_is_built_of_the_very_modules(tiny_sdxl):
    loaded = load_pipeline("X", tiny_sdxl)
    names = ("unet", "vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    built = build_pipeline(SDXL, {name: getattr(loaded, name) for name in names}, zeros_for_empty=False)
    assert built.unet is loaded.unet
    assert built.config.force_zeros_for_empty_prompt is False


@pytest.mark.parametrize(("prediction", "expected"), [("epsilon", Epsilon), ("v_prediction", Velocity)])
def test_noise_levels_and_prediction_are_the_schedulers(prediction, expected):
    scheduler = DDIMScheduler(
        50, beta_start=0.002, beta_end=0.03, beta_schedule="scaled_linear", prediction_type=prediction
    )
    schedule, parameterization = noise_of("X", scheduler)
    assert type(parameterization) is expected
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod)


def test_a_zero_terminal_snr_is_kept_and_refused_for_a_network_that_predicts_the_noise():
    settings = {"num_train_timesteps": 50, "rescale_betas_zero_snr": True}
    schedule, _ = noise_of("X", DDPMScheduler(prediction_type="v_prediction", **settings))
    assert schedule.alphas_cumprod[-1] == 0
    expected = DDPMScheduler(prediction_type="v_prediction", **settings).alphas_cumprod
    torch.testing.assert_close(schedule.alphas_cumprod.float(), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"Epsilon"):
        noise_of("X", DDPMScheduler(**settings))


def test_flow_matching_is_refused():
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler .*Flow matching"):
        noise_of("X", FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"prediction_type 'flow_prediction'"):
        noise_of("X", diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"))
