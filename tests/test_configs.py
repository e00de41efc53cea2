"""Every config in ``configs/`` parses, builds, trains a step, saves, reloads and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lit_generative.__main__ import main
from tests.generated import write_cifar10, write_mnist

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))


def shortened(config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same run on a few generated images, a step long."""
    trainer, data = config["trainer"], config["data"]["init_args"]
    trainer |= {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu", "devices": 1, "limit_val_batches": 1}
    for callback in trainer["callbacks"]:
        options = callback.get("init_args", {})
        if "ModeCoverage" in callback["class_path"]:
            callback["init_args"] = {"num_samples": 20}
        elif "extractor" in options:
            options |= {"num_samples": 12, "every_n_steps": 2}
        elif "num_samples" in options:
            options["num_samples"] = 2
    data |= {"batch_size": 4 * config["model"]["init_args"].get("discriminator_steps", 1)}  # a pack is up to 4
    if "StackedDigits" in config["data"]["class_path"] or "num_samples" in data:
        data["num_samples"] = 400
    if "data_dir" in data:
        data["data_dir"] = str(folder / "data")
        if "CIFAR10" in config["data"]["class_path"]:
            write_cifar10(folder / "data", monkeypatch, num=20)
        else:
            write_mnist(folder / "data", num_train=60, num_test=20)
    sampler = config["model"]["init_args"].get("sampler")
    if sampler:
        sampler["init_args"]["num_steps"] = 2
    return config


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
def test_the_file_as_it_is_parses(path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(ROOT / path), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load((ROOT / path).read_text())
    assert printed["model"]["class_path"] == written["model"]["class_path"]
    assert printed["trainer"]["logger"][0]["init_args"]["name"] == Path(path).stem


@pytest.mark.parametrize("path", CONFIGS)
def test_the_run_trains_saves_reloads_and_samples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = shortened(yaml.safe_load((ROOT / path).read_text()), tmp_path, monkeypatch)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "config.yaml"]) == 0
    run = Path("runs") / Path(path).stem / "version_0"
    assert (run / "config.yaml").exists()
    assert len(list((run / "samples").glob("step_*.png"))) == 1
    scored = [c for c in config["trainer"]["callbacks"] if "FIDEvaluation" in c["class_path"]]
    assert (run / "records.jsonl").exists() == bool(scored)
    assert bool(scored) == any(name in path for name in ("digits", "fashion"))
    assert main(["test", "--config", "config.yaml", "--ckpt_path", "last", "--trainer.limit_test_batches", "1"]) == 0
    assert main(["sample", "--ckpt_path", str(run), "--num", "2", "--format", "npz", "--device", "cpu"]) == 0
    samples = np.load("samples/samples.npz")
    assert len(samples[samples.files[0]]) == 2
    assert np.isfinite(samples[samples.files[0]]).all()
