import torch
from peft import LoraConfig

from lit_generative.finetune.adapted_export import adapted_parts, export_adapted
from lit_generative.finetune.adapters import Adapted
from lit_generative.loading import load_module
from tests import tiny


def adapted_gan():
    module = tiny.gan()
    lora = LoraConfig(r=2, target_modules="all-linear")
    built = tiny.gan(generator=Adapted(module.generator, lora), discriminator=Adapted(module.discriminator, lora))
    torch.manual_seed(1)
    for p in built.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return built.eval()


def test_each_network_with_an_adapter_is_found():
    assert list(adapted_parts(adapted_gan())) == ["generator", "discriminator"]
    assert adapted_parts(tiny.gan()) == {}


def test_each_adapter_gets_a_folder(tmp_path):
    told = export_adapted(adapted_gan(), "peft", tmp_path)
    assert told.count("PeftModel.from_pretrained(") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["discriminator", "generator"]


def test_a_merged_gan_draws_and_judges_as_the_adapted_one(tmp_path):
    module = adapted_gan()
    export_adapted(module, "merged", tmp_path)
    plain = load_module(tmp_path / "merged.ckpt")
    x, z = torch.randn(5, 2), torch.randn(5, 3)
    torch.testing.assert_close(plain.generator(z), module.generator(z), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.discriminator(x), module.discriminator(x), rtol=1e-4, atol=1e-5)
