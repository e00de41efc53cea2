import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, PromptTuningConfig
from torch import nn

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.diffusion.module import DDPM
from lit_generative.finetune.adapters import Adapted, adapter_layers, inject, merge, merged, save_adapter, unmerge
from lit_generative.gan.module import GAN
from lit_generative.loading import load_ema
from lit_generative.networks.mlp import MLPDenoiser, MLPEncoder
from tests import tiny

CONFIGS = {
    "LoRA": LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]),
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules=["0"]),
    "LoHa": LoHaConfig(r=2, target_modules=["0"]),
    "LoKr": LoKrConfig(r=2, target_modules=["2"]),
    "AdaLoRA": AdaLoraConfig(total_step=10, target_modules=["0", "2"]),
    "IA3": IA3Config(target_modules=["0", "2"], feedforward_modules=[]),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 4))


def shifted(config) -> tuple[nn.Module, object]:
    """A network whose adapter is no longer the identity, and the config as used."""
    network = net()
    used = inject("Test", network, config)
    torch.manual_seed(1)
    for p in network.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return network.eval(), used


@configs
def test_only_the_adapter_is_trained_and_the_output_is_the_same_at_first(config):
    network, x = net(), torch.randn(6, 3)
    before = network(x)
    inject("Test", network, config)
    torch.testing.assert_close(network.eval()(x), before)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained
    assert all("base_layer" not in name for name in trained)
    assert len(list(adapter_layers(network))) == len(config.target_modules)


@configs
def test_merging_changes_no_output_and_unmerging_gives_the_weights_back(config):
    network, _ = shifted(config)
    x = torch.randn(6, 3)
    base = {name: p.clone() for name, p in network.named_parameters() if "base_layer" in name}
    expected = network(x)
    assert (expected - net()(x)).abs().max() > 0.01
    merge(network)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    unmerge(network)
    for name, p in network.named_parameters():
        if name in base:
            torch.testing.assert_close(p, base[name], rtol=1e-5, atol=1e-6)


@configs
def test_a_merged_copy_is_a_plain_network_of_the_same_outputs(config):
    network, _ = shifted(config)
    x = torch.randn(6, 3)
    plain = merged(network)
    torch.testing.assert_close(plain(x), network(x), rtol=1e-5, atol=1e-5)
    assert plain.state_dict().keys() == net().state_dict().keys()
    assert list(adapter_layers(network))


@configs
def test_peft_loads_what_was_saved(tmp_path, config):
    network, used = shifted(config)
    save_adapter(network, used, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(net(), str(tmp_path / "adapter"))
    x = torch.randn(6, 3)
    torch.testing.assert_close(loaded(x), network(x))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir() if path.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_all_linear_layers_are_found_and_the_config_given_is_not_changed():
    config = LoraConfig(r=2, target_modules="all-linear")
    network = net()
    used = inject("Test", network, config)
    assert config.target_modules == "all-linear"
    assert set(used.target_modules) == {"0", "2"}
    assert [name for name, _ in adapter_layers(network)] == ["0", "2"]


def test_targets_that_match_nothing_list_near_names():
    with pytest.raises(ValueError, match=r"Test: target_modules name no layer of the ModuleDict: 'to_qq'.*block\.to_q"):
        inject(
            "Test",
            nn.ModuleDict({"block": nn.ModuleDict({"to_q": nn.Linear(2, 2)})}),
            LoraConfig(target_modules=["to_qq"]),
        )


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="Test: LoraConfig does not fit: Target modules"):
        inject("Test", net(), LoraConfig(target_modules=r".*to_q"))


def test_missing_targets_are_asked_for_by_name():
    with pytest.raises(ValueError, match=r"must say which layers of the Sequential to adapt.*\[0, 2\]"):
        inject("Test", net(), LoraConfig())


def test_a_layer_that_takes_no_adapter_is_refused():
    with pytest.raises(ValueError, match=r"does not fit: .*SiLU"):
        inject("Test", net(), LoraConfig(target_modules=["1"]))


def test_a_second_adapter_is_refused():
    network, _ = shifted(CONFIGS["LoRA"])
    with pytest.raises(ValueError, match="has an adapter already"):
        inject("Test", network, CONFIGS["LoRA"])


def test_prompt_tuning_is_no_adapter_of_layers():
    with pytest.raises(TypeError, match="Test: PromptTuningConfig adds words"):
        inject("Test", net(), PromptTuningConfig(num_virtual_tokens=2))


def adapted_ddpm(seed: int = 0) -> DDPM:
    torch.manual_seed(seed)
    network = MLPDenoiser(hidden_dim=5, num_layers=1)
    return tiny.point_ddpm(network=Adapted(network, LoraConfig(r=2, target_modules="all-linear")))


def adapted_gan() -> GAN:
    module = tiny.gan()
    generator = Adapted(module.generator, LoraConfig(r=2, target_modules="all-linear"))
    return tiny.gan(generator=generator, discriminator=module.discriminator)


@pytest.mark.parametrize("build", [adapted_ddpm, adapted_gan])
def test_a_family_trains_the_adapter_and_saves_nothing_else(tmp_path, build):
    module = build()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    ema = EMA(half_life=10.0)
    tiny.train(tmp_path, module, tiny.ring(), callbacks=[Checkpoint(dirpath=str(tmp_path)), ema])
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    part = "network" if isinstance(module, DDPM) else "generator"
    own = {name for name in moved if name.startswith(part)}
    assert own
    assert all("lora_" in name for name in own)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    kept = [name for name in saved["state_dict"] if name.startswith(part)]
    assert all("lora_" in name or name.endswith("_extra_state") for name in kept)
    assert all("lora_" in name for name in load_ema(tmp_path / "last.ckpt"))


def test_a_resumed_adapter_is_the_uninterrupted_one(tmp_path):
    whole, half, resumed = adapted_ddpm(), adapted_ddpm(), adapted_ddpm()
    tiny.train(tmp_path, whole, tiny.ring(), max_steps=6)
    tiny.train(tmp_path, half, tiny.ring(), max_steps=3, callbacks=[Checkpoint(dirpath=str(tmp_path))])
    tiny.train(tmp_path, resumed, tiny.ring(), max_steps=6, ckpt_path=str(tmp_path / "last.ckpt"))
    tiny.assert_same(tiny.weights(resumed), tiny.weights(whole))


def test_an_adapter_on_another_network_is_refused_on_resume(tmp_path):
    tiny.train(tmp_path, adapted_ddpm(), tiny.ring(), callbacks=[Checkpoint(dirpath=str(tmp_path))])
    with pytest.raises(ValueError, match="trained on top of others than MLPDenoiser holds"):
        tiny.train(tmp_path, adapted_ddpm(seed=1), tiny.ring(), max_steps=6, ckpt_path=str(tmp_path / "last.ckpt"))


def test_what_the_network_says_of_itself_is_said_by_the_adapted_one():
    adapted = Adapted(MLPEncoder((2,), 3, hidden_dim=4, num_layers=1), LoraConfig(target_modules="all-linear"))
    assert adapted.latent_dim == 3
    with pytest.raises(AttributeError, match="nothing_there"):
        adapted.nothing_there  # noqa: B018


def test_layers_that_are_trained_whole_are_in_the_merged_copy():
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    network, _ = shifted(config)
    x = torch.randn(6, 3)
    assert not torch.equal(network[2].modules_to_save.default.weight, network[2].original_module.weight)
    plain = merged(network)
    torch.testing.assert_close(plain(x), network(x), rtol=1e-5, atol=1e-5)
    assert plain.state_dict().keys() == net().state_dict().keys()
