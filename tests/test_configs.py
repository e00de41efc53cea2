"""Every config in ``configs/`` parses, builds, trains a step, saves, reloads and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import instantiate_module
from PIL import Image

from lit_generative.__main__ import main
from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.variances import BetaVariance
from tests.generated import write_cifar10, write_mnist

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
WITH_BASE = [path for path in CONFIGS if path.startswith("configs/finetune/")]
"""Those that begin with a pretrained model: they run in ``tests/finetune/test_toy_configs.py``."""


def shortened(config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same run on a few generated images, a step long."""
    trainer, data = config["trainer"], config["data"]["init_args"]
    trainer |= {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu", "devices": 1, "limit_val_batches": 1}
    for callback in trainer["callbacks"]:
        options = callback.get("init_args", {})
        if "ModeCoverage" in callback["class_path"]:
            callback["init_args"] = {"num_samples": 20}
        elif "estimators" in options:
            options["max_batches"] = 1
            for estimator in options["estimators"]:
                estimator["init_args"]["num_steps"] = 3
        elif "extractor" in options:
            options |= {"num_samples": 12, "every_n_steps": 2}
        elif "num_samples" in options:
            options["num_samples"] = 2
    if "DDPM" in config["model"]["class_path"] and "CIFAR10" in config["data"]["class_path"]:
        # The network at full size is trained below: here are all its parts, but few channels.
        network = config["model"]["init_args"]["network"]["init_args"]
        network["widths"] = [width // 8 for width in network["widths"]]
    data |= {"batch_size": 4 * config["model"]["init_args"].get("discriminator_steps", 1)}  # a pack is up to 4
    if "StackedDigits" in config["data"]["class_path"] or "num_samples" in data:
        data["num_samples"] = 400
    if "data_dir" in data:
        data["data_dir"] = str(folder / "data")
        if "CIFAR10" in config["data"]["class_path"]:
            write_cifar10(folder / "data", monkeypatch, num=20)
        else:
            write_mnist(folder / "data", num_train=60, num_test=20)
    if sampler := config["model"]["init_args"].get("sampler"):
        sampler["init_args"]["num_steps"] = 2
    return config


def train_first_stage(config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model of latents is trained on."""
    first = Path(config["model"]["init_args"]["codec"]["init_args"]["checkpoint"]).name
    stage = shortened(yaml.safe_load((ROOT / f"configs/vae/{first}.yaml").read_text()), folder, monkeypatch)
    Path("first.yaml").write_text(yaml.safe_dump(stage))
    assert main(["fit", "--config", "first.yaml"]) == 0


def test_there_is_a_config_of_each_family_for_each_data_set():
    for family, method in (("gan", "dcgan"), ("vae", "vae"), ("diffusion", "ddpm")):
        for data in ("digits", "fashion", "cifar10"):
            assert f"configs/{family}/{method}_{data}.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS)
def test_the_head_says_paper_command_and_result(path):
    paper, command, result = (ROOT / path).read_text().splitlines()[:3]
    assert "arXiv:" in paper
    assert command == f"# litgen fit --config {path}"
    assert result.startswith("# Result: ")


@pytest.mark.parametrize("path", CONFIGS)
def test_the_run_has_the_name_of_the_file(path):
    written = yaml.safe_load((ROOT / path).read_text())
    assert written["trainer"]["logger"][0]["init_args"]["name"] == Path(path).stem


@pytest.mark.parametrize("path", [path for path in WITH_BASE if "/toy/" not in path])  # the others run
def test_the_file_as_it_is_parses(path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(ROOT / path), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load((ROOT / path).read_text())
    assert printed["model"]["class_path"] == written["model"]["class_path"]


def what_test_runs(path: str) -> str:
    """Names of the classes that decide what ``litgen test`` does with a config."""
    config = yaml.safe_load((ROOT / path).read_text())
    model = config["model"]["init_args"]
    parts = [model[name] for name in ("objective", "prior", "posterior", "likelihood", "condition") if name in model]
    parts += [config["model"], config["data"], *config["trainer"]["callbacks"]]
    return " ".join(sorted(part["class_path"] for part in parts))


RUN = [path for path in CONFIGS if path not in WITH_BASE]
TESTED = {what_test_runs(path): path for path in reversed(RUN)}.values()
"""The first of each kind of test; the others are tested by ``make whole``."""


def prepared(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A shortened config, written to ``config.yaml`` in the new working directory, beside what it starts from."""
    monkeypatch.chdir(tmp_path)
    config = shortened(yaml.safe_load((ROOT / path).read_text()), tmp_path, monkeypatch)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    if "codec" in config["model"]["init_args"]:
        train_first_stage(config, tmp_path, monkeypatch)
    return config


def check_test() -> None:
    assert main(["test", "--config", "config.yaml", "--ckpt_path", "last", "--trainer.limit_test_batches", "1"]) == 0


@pytest.mark.whole  # a minute and a half in all
@pytest.mark.parametrize("path", [path for path in RUN if path not in TESTED])
def test_the_run_is_tested(path, tmp_path, monkeypatch):
    prepared(path, tmp_path, monkeypatch)
    assert main(["fit", "--config", "config.yaml"]) == 0
    check_test()


@pytest.mark.parametrize("path", RUN)
def test_the_run_trains_saves_reloads_and_samples(path, tmp_path, monkeypatch):
    config = prepared(path, tmp_path, monkeypatch)
    assert main(["fit", "--config", "config.yaml"]) == 0
    run = Path("runs") / Path(path).stem / "version_0"
    assert (run / "config.yaml").exists()
    assert len(list((run / "samples").glob("step_*.png"))) == 1
    scored = [c for c in config["trainer"]["callbacks"] if "FIDEvaluation" in c["class_path"]]
    assert (run / "records.jsonl").exists() == bool(scored)
    from_images = "condition" in config["model"]["init_args"]  # no samples from noise alone
    assert bool(scored) == any(name in path for name in ("digits", "fashion"))
    if path in TESTED:
        check_test()
    options = ["--ckpt_path", str(run), "--num", "2", "--format", "npz", "--device", "cpu"]
    if from_images:
        Image.new("L", (4, 4)).save("low.png")
        options += ["--low_res", "low.png"]
    assert main(["sample", *options]) == 0
    samples = np.load("samples/samples.npz")
    assert len(samples[samples.files[0]]) == 2
    assert np.isfinite(samples[samples.files[0]]).all()


@pytest.mark.slow  # half a minute for the largest
@pytest.mark.parametrize(
    ("name", "published"),
    [("ddpm", 35_746_307), ("improved_ddpm", 52_500_000), ("edm", 55_700_000), ("flow", 35_746_307)],
)
def test_a_recipe_for_cifar10_has_the_published_size_and_trains_ten_steps_at_it(name, published):
    config = yaml.safe_load((ROOT / f"configs/diffusion/{name}_cifar10.yaml").read_text())["model"]
    module = instantiate_module(DDPM, config["init_args"])
    size = sum(p.numel() for p in module.network.parameters())
    assert size == published if published == 35_746_307 else size == pytest.approx(published, rel=0.07)
    if name == "ddpm":  # the variance that 3.17 was sampled with
        assert isinstance(module.sampler.variance, BetaVariance)
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"]
    x0 = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    before = [p.detach().clone() for p in list(module.network.parameters())[:2]]
    torch.manual_seed(0)
    for _ in range(10):
        t, _ = module.times.draw(1, module.schedule, "cpu")
        with torch.autocast("cpu", torch.bfloat16):  # in half of the time
            loss = module.objective.loss(module.predict_noisy(x0, t)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all((p != q).any() for p, q in zip(list(module.network.parameters())[:2], before, strict=True))
