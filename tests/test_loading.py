import enum
import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.diffusion.guidance import Autoguidance
from lit_generative.diffusion.parameterizations import Velocity
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.loading import (
    TRUSTED,
    CheckpointCodec,
    CheckpointNetwork,
    check_trust,
    checkpoint_record,
    load_ema,
    load_module,
)
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.networks.mlp import MLPDenoiser
from lit_generative.tensor_ops import sample_generators
from lit_generative.training.averages import ema_state
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import tiny

ROOT = Path(__file__).parents[1]


def _checkpoint(tmp_path, module, data, *callbacks):
    tiny.train(tmp_path, module, data, callbacks=[*callbacks, Checkpoint(dirpath=str(tmp_path))])
    return tmp_path / "last.ckpt"


def _draw(module):
    return module.sample(3, generator=sample_generators(5, 3))


def _edit(path, **hparams) -> None:
    """Change hyperparameters in the file; None removes one."""
    checkpoint = load_checkpoint(path)
    edited = checkpoint["hyper_parameters"] | hparams
    checkpoint["hyper_parameters"] = {key: value for key, value in edited.items() if value is not None}
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (tiny.gan, tiny.ring),
        (lambda: tiny.image_gan(num_classes=10), tiny.digits),
        (tiny.vae, tiny.digits),
        (tiny.ddpm, tiny.digits),
        (lambda: tiny.point_ddpm(num_classes=4), tiny.ring),
    ],
    ids=["gan", "conditional gan", "vae", "ddpm", "conditional ddpm"],
)
def test_a_loaded_module_draws_the_samples_of_the_trained_one(tmp_path, build, data):
    module = build()
    loaded = load_module(_checkpoint(tmp_path, module, data()))
    assert type(loaded) is type(module)
    assert not loaded.training
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))
    tiny.assert_same(_draw(loaded), _draw(module))


def test_the_average_is_used_if_there_is_one_unless_told_otherwise(tmp_path):
    module = tiny.gan()
    path = _checkpoint(tmp_path, module, tiny.ring(), EMA(half_life=20))
    live, average = tiny.weights(module), ema_state(load_checkpoint(path))
    assert not torch.equal(average["generator.layers.0.weight"], live["generator.layers.0.weight"])
    for ema in (None, True):
        tiny.assert_same(tiny.weights(load_module(path, ema=ema)), live | average)
    tiny.assert_same(tiny.weights(load_module(str(path), ema=False)), live)


def test_without_an_average_the_weights_there_are_are_used(tmp_path):
    module = tiny.gan()
    path = _checkpoint(tmp_path, module, tiny.ring())
    for ema in (None, False):
        tiny.assert_same(tiny.weights(load_module(path, ema=ema)), tiny.weights(module))


def test_asking_for_an_average_that_is_not_there_is_refused(tmp_path):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    with pytest.raises(ValueError, match=r"last.ckpt has no averaged weights: the run had no EMA callback"):
        load_module(path, ema=True)


def test_an_average_may_be_chosen_by_name(tmp_path):
    module = tiny.gan()
    path = _checkpoint(tmp_path, module, tiny.ring(), EMA(half_life={"fast": 10, "slow": 100}, ramp_up=None))
    live, saved = tiny.weights(module), load_checkpoint(path)["callbacks"]["EMA"]["weights"]
    assert not torch.equal(*(saved[name]["generator.layers.0.weight"] for name in ("fast", "slow")))
    for ema, name in ((None, "fast"), (True, "fast"), ("fast", "fast"), ("slow", "slow")):
        tiny.assert_same(tiny.weights(load_module(path, ema=ema)), live | saved[name])
    with pytest.raises(ValueError, match=r"The checkpoint has no average 'ema'. It has: \['fast', 'slow'\]"):
        load_module(path, ema="ema")


def test_the_averaged_weights_alone_can_be_read_by_name(tmp_path):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring(), EMA(half_life={"fast": 10, "slow": 100}, ramp_up=None))
    saved = load_checkpoint(path)["callbacks"]["EMA"]["weights"]
    tiny.assert_same(load_ema(path), saved["fast"])
    tiny.assert_same(load_ema(tmp_path, "slow"), saved["slow"])
    with pytest.raises(ValueError, match=r"no average 'ema'. It has: \['fast', 'slow'\]"):
        load_ema(path, "ema")


def test_reading_averaged_weights_that_are_not_there_is_refused(tmp_path):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    with pytest.raises(ValueError, match=r"last.ckpt has no averaged weights: the run had no EMA callback"):
        load_ema(path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load_ema(tmp_path / "lost.ckpt")


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_the_module_lies_on_the_device_asked_for(tmp_path, device):
    loaded = load_module(_checkpoint(tmp_path, tiny.gan(), tiny.ring()), device=device)
    available = torch.accelerator.current_accelerator(check_available=True)
    expected = available.type if device == "auto" and available is not None else "cpu"
    assert {p.device.type for p in loaded.parameters()} == {expected}


def test_the_module_can_be_put_on_another_device(tmp_path):
    loaded = load_module(_checkpoint(tmp_path, tiny.gan(), tiny.ring()), device="meta")
    assert {p.device.type for p in loaded.parameters()} == {"meta"}


def test_a_loaded_module_can_be_trained_on_and_its_checkpoint_loaded_again(tmp_path):
    loaded = load_module(_checkpoint(tmp_path, tiny.gan(), tiny.ring()))
    first = dict(loaded.hparams)
    path = _checkpoint(tmp_path / "again", loaded.train(), tiny.ring())
    again = load_module(path)
    tiny.assert_same(tiny.weights(again), tiny.weights(loaded))
    assert dict(again.hparams) == first
    assert again.configure_optimizers()[0]["optimizer"].param_groups[0]["lr"] == 1e-3


# trust


STRANGE = """
from pathlib import Path
Path({marker!r}).touch()
from lit_generative.networks.mlp import MLPGenerator
class Generator(MLPGenerator):
    pass
"""


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """A package that is not ours; its import leaves the file ``imported``."""
    (tmp_path / "packages").mkdir()
    source = STRANGE.format(marker=str(tmp_path / "imported"))
    (tmp_path / "packages" / "strange_networks.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    yield "strange_networks.Generator"
    sys.modules.pop("strange_networks", None)


def _with_generator(tmp_path, generator):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    _edit(path, generator=generator)
    return path


def test_a_class_of_another_package_is_refused_before_it_is_imported(tmp_path, strange):
    arguments = {"latent_dim": 3, "hidden_dim": 5, "num_layers": 1}
    path = _with_generator(tmp_path, {"class_path": strange, "init_args": arguments})
    with pytest.raises(ValueError, match=r"last.ckpt asks for the class strange_networks.Generator.*--trust strange_n"):
        load_module(path)
    assert not (tmp_path / "imported").exists()


def test_a_class_of_a_package_that_is_trusted_is_built(tmp_path, strange):
    arguments = {"latent_dim": 3, "hidden_dim": 5, "num_layers": 1}
    path = _with_generator(tmp_path, {"class_path": strange, "init_args": arguments})
    loaded = load_module(path, trust=["strange_networks"])
    assert type(loaded.generator).__module__ == "strange_networks"
    assert _draw(loaded).shape == (3, 2)


@pytest.mark.parametrize("key", ["generator", "loss", "generator_optimizer"])
def test_a_class_of_another_package_named_by_its_path_alone_is_refused_too(tmp_path, strange, key):
    """The parser takes a bare string for a class as well."""
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    _edit(path, **{key: strange})
    with pytest.raises(ValueError, match="strange_networks"):
        load_module(path)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("key", ["generator", "loss", "generator_optimizer", "generator_scheduler"])
@pytest.mark.parametrize("form", ["json", "yaml", "file", "file in the working directory"])
def test_a_class_of_another_package_hidden_in_a_text_is_refused_too(tmp_path, strange, monkeypatch, key, form):
    """The parser reads a text in place of a class as JSON, as YAML, and as the name of a file of either."""
    config = {"class_path": strange, "init_args": {"latent_dim": 3, "hidden_dim": 5, "num_layers": 1}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "innocent").write_text(json.dumps(config))
    texts = {
        "json": json.dumps(config),
        "yaml": f"class_path: {strange}",
        "file": str(tmp_path / "innocent"),
        "file in the working directory": "innocent",
    }
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    _edit(path, **{key: texts[form]})
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        load_module(path)
    assert not (tmp_path / "imported").exists()


def test_an_untrusted_class_deep_in_the_arguments_is_refused(tmp_path, strange):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    hparams = load_checkpoint(path)["hyper_parameters"]
    loss = dict(hparams["loss"]) | {"init_args": {"parts": [{"class_path": strange}]}}
    _edit(path, loss=loss)
    with pytest.raises(ValueError, match=r"asks for the class strange_networks.Generator"):
        load_module(path)
    assert not (tmp_path / "imported").exists()


def test_an_untrusted_module_class_is_refused(tmp_path, strange):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    _edit(path, _class_path="strange_networks.GAN")
    with pytest.raises(ValueError, match=r"asks for the class strange_networks.GAN"):
        load_module(path)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["lit_generativ", "lit_generative_evil", "torchevil"])
def test_a_package_whose_name_only_starts_like_a_trusted_one_is_refused(tmp_path, name):
    path = _with_generator(tmp_path, {"class_path": f"{name}.Generator"})
    with pytest.raises(ValueError, match=f"asks for the class {name}.Generator"):
        load_module(path)


def test_a_checkpoint_that_names_no_class_is_refused(tmp_path):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    _edit(path, _class_path=None)
    with pytest.raises(ValueError, match=r"last.ckpt does not say which class it holds. It was not written by lit_gen"):
        load_module(path)


def test_a_checkpoint_without_hyperparameters_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign.ckpt does not say which class it holds"):
        load_module(tmp_path / "foreign.ckpt")


def test_a_class_that_cannot_sample_is_refused(tmp_path):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    _edit(path, _class_path="torch.nn.modules.linear.Linear")
    with pytest.raises(ValueError, match="which is no GenerativeModule and cannot sample"):
        load_module(path)


def test_a_function_in_place_of_the_class_is_refused(tmp_path):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    _edit(path, _class_path="torch.hub.load")
    with pytest.raises(ValueError, match=r"torch.hub.load is not a class"):
        load_module(path)


@pytest.mark.parametrize("name", ["lit_generative.gan.module.Gone", "lit_generative.gone.GAN"])
def test_a_class_that_is_no_more_is_a_readable_error(tmp_path, name):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    _edit(path, _class_path=name)
    with pytest.raises(ValueError, match=name):
        load_module(path)


def test_weights_that_do_not_fit_the_hyperparameters_are_an_error(tmp_path):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    generator = load_checkpoint(path)["hyper_parameters"]["generator"]
    _edit(path, generator={**generator, "init_args": {**generator["init_args"], "hidden_dim": 6}})
    with pytest.raises(RuntimeError, match=r"size mismatch for generator.layers.0.weight"):
        load_module(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load_module(tmp_path / "lost.ckpt")


def test_only_packages_we_build_on_are_trusted():
    assert TRUSTED == ("lit_generative", "torch", "lightning", "diffusers", "peft")


class Kind(enum.Enum):
    ONE = "one"


class Texts:
    def __init__(self, names: list[str] | str | None, by_name: dict[str, str], parts: dict[str, nn.Module], kind: Kind):
        """Takes texts in several forms."""


@pytest.mark.parametrize(
    ("cls", "allowed", "refused"),
    [
        (Texts, {"names": ["a"], "by_name": {"a": "b"}, "kind": "one"}, {"parts": {"a": "b"}}),
        (peft.LoraConfig, {"task_type": "CAUSAL_LM", "target_modules": ["to_q"], "bias": "none"}, {"eva_config": "a"}),
    ],
)
def test_texts_are_allowed_where_texts_belong_also_in_lists_and_in_dataclasses(cls, allowed, refused):
    path = f"{cls.__module__}.{cls.__qualname__}"
    trust = [path.partition(".")[0]]
    check_trust("x.ckpt", {"_class_path": path, **allowed}, trust)
    with pytest.raises(ValueError, match="which takes no text"):
        check_trust("x.ckpt", {"_class_path": path, **refused}, trust)


def test_the_record_of_a_checkpoint_says_which_weights_it_gives(tmp_path):
    path = tmp_path / "last.ckpt"
    ema = EMA(half_life={"fast": 10.0, "slow": 100.0})
    trainer = tiny.train(tmp_path, tiny.vae(), tiny.digits(), max_steps=2, callbacks=[ema])
    trainer.save_checkpoint(path)
    common = {"step": 2, "epoch": trainer.current_epoch}
    images = ema.images
    assert (
        checkpoint_record(path) == {"weights": "ema", "profile": "fast", "half_life": 10.0, "images": images} | common
    )
    assert checkpoint_record(path, "slow")["half_life"] == 100.0
    assert checkpoint_record(path, False) == {"weights": "raw"} | common
    with pytest.raises(ValueError, match="no average 'ema'"):
        checkpoint_record(path, "ema")
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), max_steps=2, callbacks=[]).save_checkpoint(path)
    assert checkpoint_record(path)["weights"] == "raw"


# a module of a checkpoint within another


def _guided(path, **options):
    guidance = Autoguidance(CheckpointNetwork(str(path), **options), 2.0, (0.05, 5.0))
    return tiny.point_ddpm(num_classes=4, seed=1, sampler=DDIMSampler(3, guidance=guidance))


def _guide(tmp_path, *callbacks):
    return _checkpoint(tmp_path / "guide", tiny.point_ddpm(num_classes=4), tiny.ring(), *callbacks)


def _latent(tmp_path, **options):
    path = _checkpoint(tmp_path / "codec", tiny.vae(), tiny.digits())
    network = MLPDenoiser(hidden_dim=5, num_layers=1, sample_shape=(3,))
    return tiny.ddpm(network=network, codec=CheckpointCodec(str(path), **options)), path


def test_a_network_is_loaded_with_what_its_prediction_means(tmp_path):
    module = tiny.point_ddpm(num_classes=4)
    path = _checkpoint(tmp_path, module, tiny.ring(), EMA(half_life=20))
    live, average = tiny.weights(module.network), ema_state(load_checkpoint(path))
    part = CheckpointNetwork(str(path))
    assert (part.sample_shape, part.num_classes, part.extra_channels) == ((2,), 4, 0)
    assert part.schedule.num_timesteps == 10
    assert type(part.parameterization) is type(module.parameterization)
    assert not any(layer.training for layer in part.network.modules())
    tiny.assert_same(tiny.weights(part.network), {k.removeprefix("network."): v for k, v in average.items()})
    raw = CheckpointNetwork(str(path), ema=False)
    tiny.assert_same(tiny.weights(raw.network), live)
    x_t, t, y = torch.randn(3, 2), torch.tensor([0, 4, 9]), torch.tensor([0, 1, 3])
    tiny.assert_same(raw(x_t, t, y), module.network(x_t, t, y))


def test_a_guided_model_is_rebuilt_with_its_guide_and_keeps_it_out_of_its_weights(tmp_path):
    module = _guided(_guide(tmp_path, EMA(half_life=20)), ema=False)
    path = _checkpoint(tmp_path, module, tiny.ring())
    assert load_checkpoint(path)["state_dict"].keys() == tiny.weights(tiny.point_ddpm(num_classes=4)).keys()
    loaded = load_module(path)
    tiny.assert_same(_draw(loaded), _draw(module))
    guides = [m.sampler.guidance.guide for m in (loaded, module)]
    tiny.assert_same(*(tiny.weights(guide) for guide in guides))
    assert loaded.sampling_settings() == module.sampling_settings()


def test_the_guide_makes_a_difference(tmp_path):
    module = _guided(_guide(tmp_path))
    guided = _draw(module)
    module.sampler.guidance = None
    assert (guided != _draw(module)).any()


def test_a_guide_that_is_gone_is_named(tmp_path):
    guide = _guide(tmp_path)
    path = _checkpoint(tmp_path, _guided(guide), tiny.ring())
    guide.rename(tmp_path / "moved.ckpt")
    with pytest.raises(FileNotFoundError, match=rf"CheckpointNetwork: There is no checkpoint {guide}\. .*needs it"):
        load_module(path)


def test_a_guide_of_another_kind_of_model_is_refused_when_the_checkpoint_is_loaded(tmp_path):
    guide = _guide(tmp_path)
    path = _checkpoint(tmp_path, _guided(guide), tiny.ring())
    _checkpoint(tmp_path / "guide", tiny.point_ddpm(num_classes=4, parameterization=Velocity()), tiny.ring())
    with pytest.raises(ValueError, match="Autoguidance: the guide must have been trained with the model's parameteri"):
        load_module(path)


def test_what_removes_no_noise_is_no_guide(tmp_path):
    with pytest.raises(ValueError, match=r"CheckpointNetwork: .*last.ckpt holds a GAN, which removes no noise"):
        CheckpointNetwork(str(_checkpoint(tmp_path, tiny.gan(), tiny.ring())))


def test_a_folder_is_no_guide(tmp_path):
    with pytest.raises(ValueError, match="checkpoint must be a file, as the newest of a folder changes"):
        CheckpointNetwork(str(_guide(tmp_path).parent))


def test_a_checkpoint_holds_the_codec_that_was_loaded_from_a_file(tmp_path):
    module, codec = _latent(tmp_path)
    path = _checkpoint(tmp_path, module, tiny.digits())
    codec.unlink()
    loaded = load_module(path)
    assert type(loaded.latents.codec) is type(tiny.vae())
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))
    tiny.assert_same(_draw(loaded), _draw(module))
    assert load_checkpoint(path)["hyper_parameters"]["codec"]["class_path"] == "lit_generative.vae.module.VAE"


def test_a_codec_may_be_the_newest_of_a_folder_and_has_the_weights_asked_for(tmp_path):
    module = tiny.vae()
    path = _checkpoint(tmp_path, module, tiny.digits(), EMA(half_life=20))
    live, average = tiny.weights(module), ema_state(load_checkpoint(path))
    tiny.assert_same(tiny.weights(CheckpointCodec(str(tmp_path)).loaded), live | average)
    tiny.assert_same(tiny.weights(CheckpointCodec(str(path), ema=False).loaded), live)


def test_what_has_no_latents_is_no_codec(tmp_path):
    with pytest.raises(ValueError, match=r"CheckpointCodec: .*last.ckpt holds a GAN, which has no latent_shape"):
        CheckpointCodec(str(_checkpoint(tmp_path, tiny.gan(), tiny.ring())))


def test_a_codec_that_is_gone_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CheckpointCodec: There is no checkpoint lost.ckpt\. .*needs it"):
        CheckpointCodec("lost.ckpt")


@pytest.mark.parametrize("form", ["class", "text", "deep"])
def test_an_untrusted_class_in_the_arguments_of_a_codec_is_refused(tmp_path, strange, form):
    module, _ = _latent(tmp_path)
    path = _checkpoint(tmp_path, module, tiny.digits())
    codec = load_checkpoint(path)["hyper_parameters"]["codec"]
    deep = {"class_path": "lit_generative.vae.objectives.Elbo", "init_args": {"parts": [{"class_path": strange}]}}
    key, value = {
        "class": ("encoder", {"class_path": strange}),
        "text": ("encoder", strange),
        "deep": ("objective", deep),
    }[form]
    _edit(path, codec={**codec, "init_args": {**codec["init_args"], key: value}})
    with pytest.raises(ValueError, match=r"last\.ckpt .*strange_networks.Generator"):
        load_module(path)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("trust", [[], ["strange_networks"]])
def test_an_untrusted_class_in_the_checkpoint_of_a_guide_is_refused_whatever_the_model_may_build(
    tmp_path, strange, trust
):
    guide = _guide(tmp_path)
    path = _checkpoint(tmp_path, _guided(guide), tiny.ring())
    _edit(guide, network={"class_path": strange})
    with pytest.raises(ValueError, match=r"guide/last\.ckpt asks for the class strange_networks.Generator"):
        load_module(path, trust=trust)
    assert not (tmp_path / "imported").exists()


def test_a_network_that_a_config_took_from_a_folder_comes_back_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"image_size": 8, "channels": 1, "num_classes": 10, "widths": (32, 64), "layers_per_block": 1}
    DiffusersUNet(**settings).unet.save_pretrained("unet")
    options = ["--model.network.init_args.pretrained=unet", "--model.network.init_args.patch_size=1"]
    options += ["--model.network.init_args.image_size=8", "--data.image_size=8", "--trainer.max_steps=1"]
    options += ["--trainer.limit_val_batches=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    saves = [{"class_path": "lit_generative.callbacks.checkpoint.Checkpoint"}]
    config = str(ROOT / "configs/diffusion/ddpm_digits.yaml")
    assert main(["fit", "--config", config, *options, f"--trainer.callbacks={json.dumps(saves)}"]) == 0
    shutil.rmtree("unet")
    assert load_module("runs").network.unet.config.block_out_channels == [32, 64]


def test_a_codec_that_a_config_builds_keeps_its_own_hyperparameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codec = {"class_path": "lit_generative.vae.module.VAE", "init_args": describe_arguments(tiny.vae())}
    network = {"hidden_dim": 8, "num_layers": 1, "sample_shape": [3], "num_classes": 10}
    options = [f"--model.codec={json.dumps(codec)}", "--data.image_size=8", "--trainer.max_steps=1"]
    options += ["--model.network=lit_generative.networks.mlp.MLPDenoiser"]
    options += [f"--model.network.init_args.{name}={value}" for name, value in network.items()]
    options += ["--trainer.limit_val_batches=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    saves = [{"class_path": "lit_generative.callbacks.checkpoint.Checkpoint"}]
    config = str(ROOT / "configs/diffusion/ddpm_digits.yaml")
    assert main(["fit", "--config", config, *options, f"--trainer.callbacks={json.dumps(saves)}"]) == 0
    loaded = load_module("runs")
    assert loaded.codec.hparams["_class_path"] == "lit_generative.vae.module.VAE"
    assert loaded.sample(2).shape == (2, 1, 8, 8)


def describe_arguments(module) -> dict:
    return {name: value for name, value in module.hparams.items() if not name.startswith("_")}
