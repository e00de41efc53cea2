"""Each config of ``configs/finetune/toy`` trains, reloads, tests, samples and is exported, on a base just made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_generative.__main__ import main

ROOT = Path(__file__).parents[2]
FORMATS = {
    "dreambooth_full": "diffusers",
    "dreambooth_lora": "diffusers-lora",
    "dreambooth_lora_sdxl": "diffusers-lora",
    "full_finetuning": "diffusers",
    "llama_full_gradual": "transformers",
    "llama_lora": "peft",
    "llama_prefix": "peft",
    "llama_prompt": "peft",
    "llama_ptuning": "peft",
    "style_lora": "merged",
    "textual_inversion": "textual-inversion",
}
"""How each is exported; the transfer of StyleGAN2 leaves a checkpoint like any other."""


def shortened(name: str) -> dict[str, Any]:
    """Two steps of the run."""
    config = yaml.safe_load((ROOT / f"configs/finetune/toy/{name}.yaml").read_text())
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu", "limit_val_batches": 1}
    config["trainer"] |= {"check_val_every_n_epoch": None, "max_epochs": -1, "log_every_n_steps": 1}
    for callback in config["trainer"]["callbacks"]:
        options = callback.get("init_args", {})
        options |= {key: 2 for key in ("every_n_steps", "num_samples") if key in options}
        if "FIDEvaluation" in callback["class_path"]:
            options["num_samples"] = 12
    config["data"]["init_args"] |= {
        key: 2 for key in ("num_class_images", "class_steps") if key in config["data"]["init_args"]
    }
    if sampling := config["model"]["init_args"].get("sampling"):
        sampling["init_args"]["num_steps"] = 2
    return config


def test_each_has_a_twin_for_a_real_base():
    toys = {path.stem for path in (ROOT / "configs/finetune/toy").glob("*.yaml")}
    real = {path.stem for path in (ROOT / "configs/finetune").glob("*.yaml")}
    assert toys == set(FORMATS) | {"stylegan2_transfer"}
    assert real == toys | {"llama_qlora"}  # which needs a GPU
    for path in (ROOT / "configs/finetune").glob("*.yaml"):
        assert path.read_text().splitlines()[2].startswith("# Result: not measured"), path


def test_the_tokenizer_is_that_of_the_models_revision(tiny_llama, tmp_path, monkeypatch):
    def seen(who: str, pretrained: str, revision: str | None) -> None:
        raise ValueError(f"{who} loads {pretrained} of {revision}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_generative.data.texts.load_tokenizer", seen)
    Path("config.yaml").write_text(yaml.safe_dump(shortened("llama_lora")))
    model = [f"--model.init_args.pretrained={tiny_llama}", "--model.init_args.revision=abc"]
    with pytest.raises(ValueError, match=f"ToyTexts loads {tiny_llama} of abc"):
        main(["fit", "--config", "config.yaml", *model])
    with pytest.raises(ValueError, match=f"ToyTexts loads {tiny_llama} of def"):
        main(["fit", "--config", "config.yaml", *model, "--data.init_args.revision=def"])


def test_real_bases_are_pinned():
    for path in (ROOT / "configs/finetune").glob("*.yaml"):
        assert len(yaml.safe_load(path.read_text())["model"]["init_args"].get("revision", 40 * "0")) == 40, path
        assert "pretrained" not in path.read_text() or "revision" in path.read_text(), path


@pytest.mark.slow  # some seconds each
@pytest.mark.parametrize("name", FORMATS)
def test_the_run_trains_reloads_samples_and_is_exported(name, tmp_path, monkeypatch, request):
    base = request.getfixturevalue("tiny_llama" if "llama" in name else "tiny_sdxl" if "sdxl" in name else "tiny_sd")
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(shortened(name)))
    assert main(["fit", "--config", "config.yaml", f"--model.init_args.pretrained={base}"]) == 0
    run = f"runs/{name}"
    state = torch.load(next(Path(run).rglob("last.ckpt")), weights_only=True)["state_dict"]
    if "full" not in name:  # adapters alone
        size = sum(file.stat().st_size for file in Path(base).rglob("*.safetensors"))
        assert 4 * sum(value.numel() for value in state.values()) < 0.2 * size
    options = ["--model.init_args.pretrained", base, "--ckpt_path", "last", "--trainer.limit_test_batches", "1"]
    assert main(["test", "--config", "config.yaml", *options]) == 0
    prompt = ["--prompt", "a photo of a circle", "--num", "2", "--device", "cpu"]
    quick = ["--max_new_tokens", "3"] if "llama" in name else ["--num_steps", "2", "--format", "npz"]
    assert main(["sample", "--ckpt_path", run, *prompt, *quick]) == 0
    if "llama" in name:
        lines = [json.loads(line) for line in Path("samples/samples.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == ["a photo of a circle"] * 2
    else:
        assert Path("samples/samples.npz").stat().st_size > 1000
    assert main(["export", "--ckpt_path", run, "--format", FORMATS[name], "--out", "out", "--license", "mit"]) == 0
    assert "license: mit" in Path("out/README.md").read_text()
    assert list(Path("out").rglob("*.safetensors"))


@pytest.mark.slow  # a base first
def test_the_transfer_of_stylegan2_trains_and_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=2", "--trainer.callbacks", '[{"class_path": "lit_generative.callbacks.ema.EMA"}]']
    short += ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=0"]
    assert main(["fit", "--config", str(ROOT / "configs/gan/stylegan2_digits.yaml"), *short]) == 0
    before = torch.load(next(Path("runs").rglob("last.ckpt")), weights_only=True)["state_dict"]
    Path("config.yaml").write_text(yaml.safe_dump(shortened("stylegan2_transfer")))
    assert main(["fit", "--config", "config.yaml"]) == 0
    after = torch.load(next(Path("runs/stylegan2_transfer").rglob("last.ckpt")), weights_only=True)["state_dict"]
    frozen = next(key for key in before if key.startswith("discriminator.from_colours") and key.endswith("weight"))
    found = next(value for key, value in after.items() if key.replace(".loaded", "") == frozen)
    torch.testing.assert_close(found, before[frozen], rtol=0, atol=0)
    assert main(["sample", "--ckpt_path", "runs/stylegan2_transfer", "--num", "2", "--device", "cpu"]) == 0
