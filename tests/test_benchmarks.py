"""The benchmarks run, and compare like with like."""

from __future__ import annotations

import functools
import json
import re
import sys
import time

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from benchmarks import (
    callbacks,
    diffusion_models,
    diffusion_quality,
    finetuning,
    frechet_speed,
    mode_coverage,
    overhead,
    patches,
    vae_likelihood,
)
from benchmarks.runs import ROOT
from lit_generative.__main__ import main
from lit_generative.tensor_ops import derive_seed, from_uint8
from lit_generative.vae.module import VAE
from tests.generated import write_mnist
from tests.tiny import trainer, weights


@pytest.fixture
def small_unet(tmp_path, monkeypatch):
    """Benchmarks of diffusion models read the config with a quarter of the U-Net's widths."""
    config = yaml.safe_load((ROOT / "configs/diffusion/ddpm_digits.yaml").read_text())
    config["model"]["init_args"]["network"]["init_args"]["widths"] = [8, 16]
    folder = tmp_path / "configs/diffusion"
    folder.mkdir(parents=True)
    (folder / "ddpm_digits.yaml").write_text(yaml.safe_dump(config))
    with monkeypatch.context() as patch:
        patch.setattr(diffusion_models, "ROOT", tmp_path)
        yield


DIGITS = {setting.family: setting for setting in overhead.SETTINGS if setting.width is None}


def test_overhead_prints_a_row_for_each_family(capsys):
    overhead.main(["--size", "digits", "--steps", "2", "--warmup", "1", "--rounds", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "32-true |" in line]
    assert [row[0].strip() for row in rows] == ["dcgan_digits", "vae_digits", "ddpm_digits"]
    assert all(float(row[k]) > 0 for row in rows for k in (3, 4, 6, 7))


def test_frechet_speed_compares_methods_that_agree(capsys):
    frechet_speed.main(["--quick", "--rounds", "2", "--sqrtm-rounds", "1"])
    text = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| (scipy|torch|ours)", line)]
    assert [row[0].strip() for row in rows] == 2 * list(frechet_speed.METHODS)
    assert [int(row[1]) for row in rows] == 2 * [1, 2, 2, 2]
    errors = [abs(float(row[5])) for row in rows]
    assert max(errors) < 1e-6
    assert max(errors[2:4] + errors[6:8]) < 1e-11
    assert "48 dimensions, 300 real and 30 generated" in text
    assert "One evaluation of 200 digits" in text


@pytest.mark.parametrize("family", sorted(DIGITS))
def test_the_bare_loop_trains_the_same_weights(tmp_path, family):
    (ours, data), (bare, _) = built(family), built(family)
    step = overhead.bare_step(family, bare, "32-true")
    for index, batch in zip(range(3), data.train_dataloader(), strict=False):
        torch.manual_seed(derive_seed("train", 0, index, 0))  # as the modules seed themselves
        step(from_uint8(batch["image"]), batch["label"])
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(ours, data)
    torch.testing.assert_close(weights(ours), weights(bare))


def built(family):
    """The digits' module without what the bare loop leaves out; plain SGD does not magnify rounding as Adam does."""
    module, data = DIGITS[family].build()
    for role in ("", "generator_", "discriminator_"):
        setattr(module, f"{role}optimizer", functools.partial(torch.optim.SGD, lr=0.01))
        setattr(module, f"{role}scheduler", None)
    return module, data


def test_callbacks_prints_the_cost_of_each_and_a_sum_within_the_step(capsys):
    callbacks.main(["--quick", "--rounds", "1", "--warmup", "1"])
    tables = capsys.readouterr().out.split("## ")[1:]
    assert [table.partition(",")[0] for table in tables] == ["DCGAN", "DDPM", "small U-Net"]
    ours = {type(callback).__name__ for callback in callbacks.ours("", 1.0, None)}
    for table in tables:
        rows = {name: float(ms) for name, ms in re.findall(r"^\| (\S.*?) \| ([\d.]+) \(", table, re.MULTILINE)}
        total = rows.pop("**sum**")
        assert set(rows) == {*ours, callbacks.CALLS, callbacks.LOGGER}
        assert total == pytest.approx(sum(rows.values()), abs=0.01)  # each is rounded
        step = re.search(r"A step: ([\d.]+)", table)
        assert 0 < total < float(step[1])


def test_time_in_a_function_that_calls_another_is_counted_once():
    meter = callbacks.Meter(warmup=0, steps=1)

    def work(seconds):
        start = time.process_time()
        while time.process_time() < start + seconds:
            pass

    inner = meter.timed("inner", work)
    meter.timed("outer", lambda: (work(0.01), inner(0.02), inner(0.02)))()
    assert meter.seconds["inner"] == pytest.approx(0.04, rel=0.1)
    assert meter.seconds["outer"] == pytest.approx(0.01, rel=0.2)


@pytest.mark.slow  # each run is a process
def test_mode_coverage_runs_what_is_missing_and_puts_the_published_rows_below(tmp_path, capsys):
    options = ["--data", "ring", "--seeds", "3", "--work", str(tmp_path), "--out", str(tmp_path / "table.md")]
    options += ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    mode_coverage.main([*options, "--methods", "gan"])
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == ["| config or paper", "modes", "high quality", "reverse KL, nats", "steps", "weights", "CPU s |"]
    assert rows[2][0] == "| `ring_gan`"
    assert re.fullmatch(r"\d\.\d", rows[2][1])
    assert [row[0] for row in rows[3:]] == [
        "| GAN, published",
        "| Unrolled, published",
        *("| VEEGAN, published", "| PacGAN2, published"),
    ]
    assert capsys.readouterr().out.count("ring_gan 3") == 1
    results = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert sorted(results) == ["ring_gan_3"]
    mode_coverage.main([*options, "--methods", "gan"])  # nothing is run again
    assert {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == results


def test_mode_coverage_tells_mean_deviation_and_the_size_of_the_networks():
    runs = [{"modes": 7.0, "high_quality": 0.5, "reverse_kl": 0.25, "seconds": 10.0}]
    runs.append({"modes": 8.0, "high_quality": 0.7, "reverse_kl": 0.75, "seconds": 13.0})
    (row,) = [line for line in mode_coverage.table("ring", {"ring_gan": runs}).splitlines() if "`ring_gan`" in line]
    assert row == "| `ring_gan` | 7.5 ± 0.7 | 60.0% ± 14.1% | 0.500 ± 0.354 | 6,000 | 17 k + 1 k | 12 |"


def test_a_run_of_mode_coverage_that_fails_says_where_its_log_is(tmp_path, monkeypatch):
    (tmp_path / "python").write_text('#!/bin/sh\necho "no such option: $*" >&2; exit 2\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # ours takes five seconds to fail
    with pytest.raises(RuntimeError, match=r"--trainer.max_stepz=2 failed: see .*ring_gan_0.log_fit.txt"):
        mode_coverage.main(
            ["--data", "ring", "--methods", "gan", "--seeds", "0", "--work", str(tmp_path), *("--trainer.max_stepz=2",)]
        )
    log = (tmp_path / "ring_gan_0/log_fit.txt").read_text()
    assert log.startswith("no such option: -m lit_generative fit --config")
    assert log.endswith("--seed_everything 0 --trainer.max_stepz=2\n")


@pytest.fixture
def in_this_process(monkeypatch):
    """`litgen` without a new process, which the test of mode coverage starts."""

    def run(command, config, folder, options):
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder)
        start = time.process_time()
        assert main([command, "--config", str(config), "--trainer.enable_progress_bar=false", *options]) == 0
        return time.process_time() - start

    monkeypatch.setattr(vae_likelihood, "litgen", run)


@pytest.mark.slow  # trains and tests
def test_vae_likelihood_trains_tests_and_prints_a_row_for_each_method(tmp_path, monkeypatch, in_this_process):
    monkeypatch.setitem(vae_likelihood.CALLBACKS[1], "init_args", {"num_draws": 100})
    options = ["--data", "digits-8bit", "--methods", "IWAE-5", "IWAE-5, DReG", "--seeds", "1", "--work", str(tmp_path)]
    options += ["--out", str(tmp_path / "table.md"), "--trainer.max_steps=2", "--trainer.limit_test_batches=1"]
    vae_likelihood.main([*options, "--data.eval_batch_size=2"])
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == "| method | NLL, nats | ELBO, nats | bits per dimension | active units | CPU s to train | seeds |"
    assert len(rows) == 3  # DReG is left out of 8-bit data
    assert re.fullmatch(r"\| IWAE-5 \| [\d.]+ \| -[\d.]+ \| [\d.]+ \| [\d.]+ \| \d+ \| 1 \|", rows[2])
    (tmp_path / "table.md").unlink()
    cached = ["--data", "digits-8bit", "--methods", "VAE", "IWAE-5", "--seeds", "1", "2", "--cached", *options[7:]]
    vae_likelihood.main([*cached, "--data.eval_batch_size=2"])
    again = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert again == rows  # what was not run is left out


def test_vae_likelihood_builds_every_method_on_every_kind_of_data(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VAE, "model", skip={"optimizer", "scheduler"})
    for data, what in vae_likelihood.DATA.items():
        config = yaml.safe_load((vae_likelihood.ROOT / f"configs/vae/{what.config}.yaml").read_text())["model"]
        for name in ("optimizer", "scheduler"):
            config["init_args"].pop(name)
        for method in vae_likelihood.METHODS:
            options = vae_likelihood.options_of(vae_likelihood.Run(data, method, 0), tmp_path)
            chosen = [o for o in options if o.startswith("--model.") and "scheduler" not in o]
            parsed = parser.parse_args([f"--model={json.dumps(config)}", *chosen])
            objective = parsed.model.init_args.objective.class_path.rpartition(".")[2]
            assert objective == ("ImportanceWeighted" if method.startswith("IWAE") else "Elbo")


@pytest.mark.slow  # trains for some seconds
def test_diffusion_quality_tabulates_and_draws_what_it_measures_once(tmp_path, capsys, small_unet):
    options = ["--models", "flow", "--steps", "51", "--samples", "10", "--calls", "4", "6", "--other-calls", "2"]
    options += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    diffusion_quality.main(options)
    table = (tmp_path / "diffusion_quality_digits.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| flow")]
    assert [row.split(" | ")[0] for row in rows] == [*["| flow"] * 4, "| flow: DDIM", "| flow: Heun"]
    assert [row.count(" | ") for row in rows] == [4, 3, 3, 3, 3, 3]
    assert all(float(number) > 0 for row in rows for number in re.findall(r"[\d.]+", row))
    assert (tmp_path / "diffusion_steps_digits.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("'distance'") == 7
    diffusion_quality.main(options)
    assert "'distance'" not in capsys.readouterr().out
    diffusion_quality.main([*options, "--other-calls", "2", "3", "--cached"])
    told = capsys.readouterr().out
    assert "'distance'" not in told
    for path in tmp_path.rglob("DDPM-2_10.json"):  # measured of another model
        path.write_text(json.dumps(json.loads(path.read_text()) | {"key": []}))
    diffusion_quality.main([*options, "--cached"])
    assert "'distance'" not in (stale := capsys.readouterr().out)
    assert [row.split(" | ")[1] for row in stale.splitlines() if row.startswith("| flow | ")][1] == ""
    assert [row.split(" | ")[2:4] for row in told.splitlines() if row.startswith("| flow | ")][1:] == [["", ""]] * 3


def test_diffusion_quality_on_fashion_has_the_config_of_that_data(tmp_path):
    write_mnist(tmp_path, num_train=80, num_test=20)
    data = diffusion_models.choose_data("fashion", str(tmp_path))
    module = diffusion_models.build(diffusion_quality.GRID[0], 60, data.name)
    images = data.module()
    images.setup("fit")
    assert tuple(module.network.sample_shape) == images.sample_shape == (1, 32, 32)
    assert type(data.extractor()).__name__ == "FashionFeatures"


@pytest.mark.slow  # trains a few steps
def test_patches_are_compared_at_equal_seconds(tmp_path, small_unet):
    out = tmp_path / "patches.md"
    options = ["--data", "digits", "--minutes", "0.01", "--seeds", "3", "--samples", "10", "--probe", "2"]
    patches.main([*options, "--work", str(tmp_path), "--out", str(out)])
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| digits")]
    assert [row[1] for row in rows] == ["1", "2"]
    assert all(float(row[k]) > 0 for row in rows for k in (2, 3, 4, 5))
    first, second = (diffusion_models.build(patches.MODEL, 60, "digits", int(row[1])).network for row in rows)
    assert (first.unet.config.sample_size, second.unet.config.sample_size) == (16, 8)


@pytest.mark.slow  # makes two bases and trains a few steps
def test_finetuning_counts_what_is_trained_and_what_a_checkpoint_holds(tmp_path):
    out = tmp_path / "finetuning.md"
    methods = ["LoRA, rank 4", "textual inversion", "prompt tuning, 20"]
    finetuning.main(["--steps", "4", "--rounds", "1", "--out", str(out), "--methods", *methods])
    lines = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    found = {cells[0]: cells[1:] for cells in lines}
    assert found["full U-Net"][3] == "859,520,964"
    assert found["LoRA, rank 4"][3] == "797,184"  # rank x (in + out) of 4 projections in 32 attention layers
    assert found["full"][3] == "6,738,415,616"
    assert found["prompt tuning, 20"][3] == f"{20 * 4096:,}"
    assert found["textual inversion"][0] == "32"
    assert float(found["LoRA, rank 4"][1].split()[0]) < 1000  # kB, of a base of 4 MB
    assert finetuning.size_of(10_314_251_568) == "10.3 GB"


@pytest.mark.parametrize(
    ("name", "binarize"), [("fashion-8bit", None), ("fashion-static", "static"), ("digits-8bit", None)]
)
def test_likelihoods_are_of_the_pixels_that_the_title_says(name, binarize, capsys, tmp_path):
    data = vae_likelihood.DATA[name]
    options = vae_likelihood.options_of(vae_likelihood.Run(name, "VAE", 0), tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / f"configs/vae/{data.config}.yaml"), *options, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["binarize"] == binarize
    assert ("Discretized" in printed["model"]["init_args"]["likelihood"]["class_path"]) == (binarize is None)
