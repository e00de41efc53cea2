import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from lit_generative.finetune.adapters import inject
from lit_generative.finetune.prior import Prior, adapters_off


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": 0.0}, "weight must be positive, got 0.0"),
        ({"source": "class"}, "images or teacher, got 'class'"),
        ({"source": "teacher"}, "needs the class's prompt"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Prior(**wrong)


def test_without_adapters_the_network_is_that_of_before():
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network = copy.deepcopy(base)
    inject("X", network, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(5, 3)
    live = network(x)
    network[1].lora_A.requires_grad_(False)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    with adapters_off(network):
        torch.testing.assert_close(network(x), base(x), rtol=0, atol=0)
    assert not torch.allclose(live, base(x))
    torch.testing.assert_close(network(x), live, rtol=0, atol=0)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == trained


def test_adapters_are_on_again_after_an_error():
    network = nn.Sequential(nn.Linear(3, 4))
    inject("X", network, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(5, 3)
    live = network(x)
    with pytest.raises(RuntimeError), adapters_off(network):
        raise RuntimeError
    torch.testing.assert_close(network(x), live)
