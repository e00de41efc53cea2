import json

import numpy as np
import pytest
import torch

from lit_generative.__main__ import main
from lit_generative.callbacks.ema import EMA
from lit_generative.data.digits import Digits
from lit_generative.metrics.frechet import frechet_distance
from lit_generative.metrics.moments import FeatureSums
from lit_generative.metrics.small_nets import DigitsFeatures
from tests import families

CONFIG = (
    "data: {class_path: lit_generative.data.digits.Digits, init_args: {image_size: &size 8}}\nmodel: {size: *size}\n"
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path):
    """Two sets of digits: ``a.npz`` and ``b.npz``."""
    data = Digits()
    data.setup()
    train = data.splits.train.image.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", images=train[:120])
    np.savez(tmp_path / "b.npz", images=train[120:300])
    (tmp_path / "data.yaml").write_text(CONFIG)
    return train


def run(capsys, *arguments: str, code: int = 0) -> str:
    assert main(["evaluate", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def evaluate(capsys, *arguments: str, metrics: str = "fid,kid,is,prdc") -> dict:
    run(capsys, *arguments, "--extractor", "digits", "--metrics", metrics, "--json", "out.json")
    with open("out.json") as file:
        return json.load(file)


def moments(images: np.ndarray):
    sums = FeatureSums(96)
    sums.update(DigitsFeatures()(torch.from_numpy(images).permute(0, 3, 1, 2)).embedding)
    return sums.moments()


def test_two_arrays_are_scored_and_recorded(capsys, images):
    result = evaluate(capsys, "--images", "a.npz", "--reference", "b.npz")
    expected = frechet_distance(moments(images[120:300]), moments(images[:120]))
    assert result["metrics"]["fid"] == pytest.approx(expected, rel=1e-6)
    assert set(result["metrics"]) == {
        "fid",
        "kid",
        "kid_se",
        "is",
        "is_std",
        "precision",
        "recall",
        "density",
        "coverage",
    }
    record = result["record"]
    assert record["extractor"] == "digits"
    assert (record["num_samples"], record["reference"]["count"]) == (120, 180)
    assert record["subject"]["file"] == "a.npz"


def test_the_table_names_what_was_measured(capsys, images):
    out = run(capsys, "--images", "a.npz", "--reference", "b.npz", "--extractor", "digits")
    assert "Frechet distance (digits features)" in out
    assert "FID" not in out
    assert "120 images against 180; digits" in out


def test_a_folder_of_the_same_pixels_scores_the_same(capsys, images, tmp_path):
    from PIL import Image

    for index, image in enumerate(images[:120]):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / "folder" / f"{index:04d}.png")
    array = evaluate(capsys, "--images", "a.npz", "--reference", "b.npz", metrics="fid")["metrics"]["fid"]
    folder = evaluate(capsys, "--images", "folder", "--reference", "b.npz", metrics="fid")["metrics"]["fid"]
    assert folder == pytest.approx(array, rel=1e-4)


@pytest.mark.parametrize(("split", "count"), [("train", 1455), ("val", 162), ("test", 180)])
def test_a_config_gives_the_data_of_its_split(capsys, images, split, count):
    result = evaluate(capsys, "--images", "a.npz", "--reference", "data.yaml", "--split", split, metrics="fid")
    assert result["record"]["reference"]["split"] == split
    assert result["record"]["reference"]["count"] == count


def test_statistics_are_written_and_compared_with(capsys, images):
    direct = evaluate(capsys, "--images", "a.npz", "--reference", "b.npz")
    out = run(capsys, "--images", "b.npz", "--extractor", "digits", "--save_statistics", "b.safetensors")
    assert "wrote b.safetensors" in out
    stored = evaluate(capsys, "--images", "a.npz", "--reference", "b.safetensors")
    assert stored["metrics"] == direct["metrics"]
    assert stored["record"]["reference"]["fingerprint"] == direct["record"]["reference"]["fingerprint"]


def test_statistics_of_another_extractor_or_with_too_little_are_refused(capsys, images):
    run(capsys, "--images", "b.npz", "--extractor", "digits", "--metrics", "fid", "--save_statistics", "b.safetensors")
    error = run(capsys, "--images", "a.npz", "--reference", "b.safetensors", "--extractor", "fashion", code=1)
    assert "of another extractor: extractor ('digits', now 'fashion')" in error
    error = run(capsys, "--images", "a.npz", "--reference", "b.safetensors", "--extractor", "digits", code=1)
    assert "does not hold what kid, kid_se need" in error
    out = run(
        capsys, "--images", "a.npz", "--reference", "b.safetensors", "--extractor", "digits", "--metrics", "fid,is"
    )
    assert "Inception score" in out


def test_the_literatures_statistics_are_compared_with(capsys, images):
    real = moments(images[120:300])
    np.savez("stats.npz", mu=real.mean.numpy(), sigma=real.cov.numpy())
    result = evaluate(capsys, "--images", "a.npz", "--reference", "stats.npz", metrics="fid")
    assert result["metrics"]["fid"] == pytest.approx(frechet_distance(real, moments(images[:120])), rel=1e-6)
    np.savez("stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    error = run(
        capsys, "--images", "a.npz", "--reference", "stats.npz", "--extractor", "digits", "--metrics", "fid", code=1
    )
    assert "must be of 96 features as digits gives, got (5,) and (5, 5)" in error


def test_samples_of_a_checkpoint_are_scored(capsys, images, tmp_path):
    trainer = families.trainer(tmp_path, callbacks=[EMA(half_life=100, ramp_up=10)], max_steps=3)
    trainer.fit(families.build("vae"), families.digits())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    options = ("--ckpt_path", "last.ckpt", "--reference", "data.yaml", "--num", "30")
    averaged = evaluate(capsys, *options)
    assert averaged["record"]["num_samples"] == 30
    assert averaged["record"]["subject"]["model"].endswith("VAE")
    again = evaluate(capsys, *options, "--batch_size", "7")
    assert again["metrics"]["fid"] == pytest.approx(averaged["metrics"]["fid"], rel=1e-4)
    raw = evaluate(capsys, *options, "--no-ema")
    assert raw["metrics"]["fid"] != averaged["metrics"]["fid"]
    assert raw["record"]["subject"]["weights"] == "raw"
    subject = averaged["record"]["subject"]
    assert (subject["weights"], subject["profile"], subject["half_life"]) == ("ema", "ema", 100)
    assert (subject["step"], subject["images"]) == (3, 3 * 256)
    named = evaluate(capsys, *options, "--ema_profile", "ema")
    assert named["metrics"] == averaged["metrics"]
    assert "no average 'slow'" in run(capsys, *options, "--extractor", "digits", "--ema_profile", "slow", code=1)
    other_seed = evaluate(capsys, *options, "--seed", "1")
    assert other_seed["metrics"]["fid"] != averaged["metrics"]["fid"]
    assert other_seed["record"]["seed"] == 1


def test_the_second_time_the_reference_is_not_extracted(capsys, images, monkeypatch):
    passed = []
    forward = DigitsFeatures.forward

    def counting(self, x):
        passed.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(DigitsFeatures, "forward", counting)
    first = evaluate(capsys, "--images", "a.npz", "--reference", "b.npz")
    assert sum(passed) == 300
    passed.clear()
    assert evaluate(capsys, "--images", "a.npz", "--reference", "b.npz")["metrics"] == first["metrics"]
    assert sum(passed) == 120


def test_earlier_scores_are_shown_beside_and_refused_if_measured_otherwise(capsys, images):
    evaluate(capsys, "--images", "a.npz", "--reference", "b.npz")
    same = ("--images", "a.npz", "--extractor", "digits", "--compare", "out.json")
    assert " before " in run(capsys, *same, "--reference", "b.npz")
    error = run(capsys, *same, "--reference", "a.npz", code=1)
    assert "not comparable, since they differ in reference" in error


def test_few_images_are_said_with_the_bias(capsys, images):
    np.savez("few.npz", images=images[:50])
    out = run(capsys, "--images", "few.npz", "--reference", "b.npz", "--extractor", "digits")
    assert "note: 50 images are not more than the 96 dimensions" in out


def test_all_metrics_can_be_asked_for(capsys, images):
    result = evaluate(capsys, "--images", "a.npz", "--reference", "b.npz", metrics="fid,fid_inf,kid,is,prdc,modes")
    assert {"fid_inf", "modes", "mode_kl"} <= set(result["metrics"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "a.npz", "--extractor", "digits"), "--reference is missing"),
        (("--images", "none.npz", "--reference", "b.npz", "--extractor", "digits"), "no file or folder none.npz"),
        (("--images", "a.npz", "--reference", "none", "--extractor", "digits"), "no file or folder none"),
        (("--images", "data.txt", "--reference", "b.npz", "--extractor", "digits"), "must be a folder of images"),
        (("--images", "a.npz", "--reference", "b.npz", "--extractor", "digit"), "Did you mean digits?"),
        (
            ("--images", "a.npz", "--reference", "bad.yaml", "--extractor", "digits"),
            "must hold `data` with a class_path",
        ),
        (("--images", "a.npz", "--reference", "none.safetensors", "--extractor", "digits"), "no file none.safetensors"),
        (("--images", "a.npz", "--save_statistics", "x.npz", "--extractor", "digits"), "must be named .safetensors"),
        (
            ("--images", "a.npz", "--reference", "b.npz", "--extractor", "digits", "--compare", "bad.yaml"),
            "is not what",
        ),
    ],
)
def test_a_wrong_option_is_one_line_that_says_what_to_do(capsys, images, arguments, message):
    with open("data.txt", "w") as file:
        file.write("x")
    with open("bad.yaml", "w") as file:
        file.write("model: {}")
    error = run(capsys, *arguments, code=1)
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metrics", "fid,fidd"), "there is no metric 'fidd'"),
        (("--metrics", ""), "names no metric"),
        (("--num", "1"), "at least 2 samples, got 1"),
        (("--batch_size", "0"), "must be at least 1, got 0"),
        (("--ckpt_path", "x"), "not allowed with argument --images"),
    ],
)
def test_a_wrong_argument_is_refused_by_the_parser(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--images", "a.npz", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
