import functools
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.gan.augmentation.adaptive import AdaptiveAugmentation
from lit_generative.gan.penalties import R1
from lit_generative.loading import load_module
from lit_generative.loading_parts import CheckpointPart
from lit_generative.networks.stylegan2_discriminator import StyleGAN2Discriminator
from lit_generative.networks.stylegan2_generator import StyleGAN2Generator
from lit_generative.training.averages import ema_state
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import tiny
from tests.test_resume import assert_same, what_must_be_restored

ROOT = Path(__file__).parents[1]
FREEZE_D = ("from_colours", "blocks.0.conv1")
LOW = ("mapping", "base", "convs.0", "to_colours.0")


def stylegan2(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    networks = {
        "generator": StyleGAN2Generator(8, 1, latent_dim=3, style_dim=4, width=4, num_mapping_layers=1),
        "discriminator": StyleGAN2Discriminator(8, 1, width=3),
    }
    return tiny.gan(**networks | kwargs)


def save(folder, module, data=None, **kwargs):
    callbacks = [EMA(half_life=20), Checkpoint(dirpath=str(folder))]
    tiny.train(folder, module, data or tiny.digits(), **{"callbacks": callbacks} | kwargs)
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained StyleGAN2 with an average of its generator."""
    return str(save(tmp_path_factory.mktemp("base"), stylegan2()))


def transfer(base, freeze=(), freeze_d=(), **kwargs):
    return stylegan2(
        seed=5,
        generator=CheckpointPart(base, freeze=freeze),
        discriminator=CheckpointPart(base, part="discriminator", freeze=freeze_d),
        **kwargs,
    )


def test_the_generator_starts_from_its_average_and_the_discriminator_as_it_was(base):
    source = load_module(base)
    module = transfer(base)
    tiny.assert_same(tiny.weights(module.generator.loaded), tiny.weights(source.generator))
    tiny.assert_same(tiny.weights(module.discriminator.loaded), tiny.weights(source.discriminator))
    average, raw = ema_state(load_checkpoint(base)), load_checkpoint(base)["state_dict"]
    assert torch.equal(module.generator.loaded.base, average["generator.base"])
    assert not torch.equal(average["generator.base"], raw["generator.base"])
    assert torch.equal(CheckpointPart(base, ema=False).loaded.base, raw["generator.base"])
    z, x = torch.randn(2, 3), torch.randn(2, 1, 8, 8)
    tiny.assert_same(module.eval().generator(z), source.generator(z))
    tiny.assert_same(module.discriminator(x), source.discriminator(x))


def test_it_stands_for_the_network_and_is_in_training_mode(base):
    part = CheckpointPart(base)
    assert (part.latent_dim, part.num_classes, part.sample_shape) == (3, None, (1, 8, 8))
    assert all(layer.training for layer in part.modules())


def test_labels_and_a_folder_of_runs_do_as_well(tmp_path):
    save(tmp_path, tiny.image_gan(num_classes=10))
    part = CheckpointPart(str(tmp_path))
    assert part.num_classes == 10
    assert part(torch.randn(2, 3), torch.tensor([4, 7])).shape == (2, 1, 8, 8)


def moved(folder, module):
    before = tiny.weights(module)
    path = save(folder, module)
    after = tiny.weights(module)
    names = [name for name, _ in module.named_parameters()]
    return {name for name in names if not torch.equal(before[name], after[name])}, set(names), path


def test_without_patterns_everything_is_trained(base, tmp_path):
    changed, names, _ = moved(tmp_path, transfer(base))
    assert changed == names


def test_frozen_layers_stay_bit_equal_and_the_others_move(base, tmp_path):
    module = transfer(base, LOW, FREEZE_D)
    changed, names, _ = moved(tmp_path, module)
    below = {f"generator.loaded.{name}" for name in LOW} | {f"discriminator.loaded.{name}" for name in FREEZE_D}
    frozen = {name for name in names if any(f"{name}.".startswith(f"{part}.") for part in below)}
    assert len(frozen) == 16
    assert changed == names - frozen
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == frozen
    optimized = sum(len(g["params"]) for o in module.configure_optimizers() for g in o["optimizer"].param_groups)
    assert optimized == len(changed)


def test_a_discriminator_frozen_up_to_its_head_still_teaches_the_generator(base, tmp_path):
    module = transfer(base)
    module.discriminator = CheckpointPart(base, part="discriminator", train=["head"])
    changed, names, _ = moved(tmp_path, module)
    judging = {name for name in changed if name.startswith("discriminator")}
    assert judging == {"discriminator.loaded.head.weight", "discriminator.loaded.head.bias"}
    assert changed - judging == {name for name in names if name.startswith("generator")}


def test_a_frozen_batch_norm_holds_its_statistics(tmp_path):
    base = str(save(tmp_path, tiny.image_gan()))
    norms = [name for name, layer in CheckpointPart(base).named_modules() if isinstance(layer, nn.BatchNorm2d)]
    part = CheckpointPart(base, freeze=[norms[0].removeprefix("loaded.")])
    part.eval().train()
    layers = dict(part.named_modules())
    assert [layers[name].training for name in norms] == [False] + [True] * (len(norms) - 1)


def test_its_checkpoint_is_built_again_without_the_source_and_still_frozen(base, tmp_path):
    (tmp_path / "base").mkdir()
    source = shutil.copy(base, tmp_path / "base")
    module = transfer(source, LOW, FREEZE_D)
    path = save(tmp_path / "run", module)
    shutil.rmtree(tmp_path / "base")
    loaded = load_module(path, ema=False)
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == trained
    again = load_module(save(tmp_path / "again", loaded.train()))
    assert {name: p.requires_grad for name, p in again.named_parameters()} == trained


def test_a_run_of_a_config_comes_back_without_the_source_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = save(tmp_path / "base", stylegan2())
    config = yaml.safe_load((ROOT / "configs/gan/stylegan2_digits.yaml").read_text())
    for name, freeze in (("generator", LOW), ("discriminator", FREEZE_D)):
        arguments = {"checkpoint": "base/last.ckpt", "part": name, "freeze": list(freeze)}
        part = {"class_path": "lit_generative.loading_parts.CheckpointPart", "init_args": arguments}
        config["model"]["init_args"][name] = part
    config["trainer"] |= {"max_steps": 2, "accelerator": "cpu", "limit_val_batches": 0, "precision": 32}
    config["trainer"]["callbacks"] = [{"class_path": "lit_generative.callbacks.checkpoint.Checkpoint"}]
    config["data"]["init_args"]["image_size"] = 8
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "config.yaml", "--trainer.enable_progress_bar=false"]) == 0
    assert main(["test", "--config", "config.yaml", "--ckpt_path", "last", "--trainer.limit_test_batches=1"]) == 0
    frozen = load_checkpoint(source)["state_dict"]["discriminator.from_colours.weight"]
    shutil.rmtree("base")
    loaded = load_module("runs")
    assert torch.equal(loaded.discriminator.loaded.from_colours.weight, frozen)
    assert not loaded.discriminator.loaded.from_colours.weight.requires_grad
    assert loaded.sample(2).shape == (2, 1, 8, 8)


def test_a_transferred_network_can_be_the_source_of_the_next_which_freezes_anew(base, tmp_path):
    path = str(save(tmp_path, transfer(base, LOW, FREEZE_D)))
    part = CheckpointPart(path, part="discriminator", freeze=["head"])
    assert type(part.loaded) is StyleGAN2Discriminator
    assert [name for name, p in part.loaded.named_parameters() if not p.requires_grad] == ["head.weight", "head.bias"]
    assert all(p.requires_grad for p in CheckpointPart(path).parameters())


# resume


def ada(**kwargs):
    operations = ["translate_integer", "brightness"]
    return AdaptiveAugmentation(initial_p=0.3, interval=2, adjust_images=100, operations=operations, **kwargs)


def final_state(folder, base, stops=()):
    path = None
    for index, stop in enumerate((*stops, 7)):
        torch.manual_seed(index)
        adam = functools.partial(torch.optim.Adam, lr=1e-2, betas=(0.0, 0.99))
        module = transfer(
            base,
            LOW,
            FREEZE_D,
            augmentation=ada(),
            penalties=[R1(0.1, every_n_steps=2)],
            generator_optimizer=adam,
            discriminator_optimizer=adam,
        )
        path = save(folder, module, tiny.digits(batch_size=300), max_steps=stop, ckpt_path=path)
    return load_checkpoint(path)


@pytest.mark.parametrize("stops", [(3,), (2, 5)])
def test_a_resumed_transfer_has_adams_state_p_and_image_counts_of_one_that_never_stopped(
    base, tmp_path, monkeypatch, stops
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    whole, resumed = final_state(tmp_path / "a", base), final_state(tmp_path / "b", base, stops)
    assert_same(what_must_be_restored(whole), what_must_be_restored(resumed))
    state = resumed["state_dict"]
    assert state["augmentation.p"] not in (0.0, 0.3)
    assert int(state["augmentation.images"]) > 0
    assert resumed["global_step"] == 7
    assert resumed["callbacks"]["EMA"]["images"] > 7 * 200
    adam = resumed["optimizer_states"][1]["state"]
    assert all(entry["step"] == 7 and entry["exp_avg_sq"].any() for entry in adam.values())
    frozen = load_checkpoint(base)["state_dict"]["discriminator.from_colours.weight"]
    assert torch.equal(state["discriminator.loaded.from_colours.weight"], frozen)


# refused


def test_a_checkpoint_and_a_network_or_none_of_them_are_refused(base):
    with pytest.raises(ValueError, match="give a checkpoint or a network, got checkpoint=None and no network"):
        CheckpointPart()
    with pytest.raises(ValueError, match=r"got checkpoint='.*' and Linear"):
        CheckpointPart(base, network=nn.Linear(1, 1))


def test_an_unknown_part_or_layer_is_named_with_near_ones(base):
    with pytest.raises(
        ValueError, match=r"CheckpointPart: .*holds a GAN without the part 'descriminator'.*discriminator"
    ):
        CheckpointPart(base, part="descriminator")
    with pytest.raises(ValueError, match=r"StyleGAN2Generator: .*'maping'.* mapping"):
        CheckpointPart(base, freeze=["maping"])


def test_a_checkpoint_that_is_gone_is_named():
    with pytest.raises(FileNotFoundError, match=r"CheckpointPart: There is no checkpoint lost\.ckpt"):
        CheckpointPart("lost.ckpt")
