import functools

import jsonargparse
import peft
import pytest
import torch
from torch import nn

from lit_generative.networks.mlp import MLPGenerator
from lit_generative.recipe import Recorded, class_path, describe
from lit_generative.vae.module import VAE
from tests import tiny

HERE = __name__


class Base(Recorded):
    def __init__(self, size: int, scale: float = 2.0) -> None:
        self.size = size
        self.scale = scale

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None


class Leaf(Base):
    def __init__(self, name: str, sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__(size=len(sizes))
        self.name = name
        self.sizes = tuple(sizes)


class SilentLeaf(Base):
    """Has no constructor of its own."""


class Holder(Recorded):
    def __init__(self, part: Base, optimizer: type | None = None, *, table: dict | None = None) -> None:
        self.part = part


class Plain:
    """Built without arguments."""


@pytest.mark.parametrize("build", [lambda: Base(3, 4.0), lambda: Base(3, scale=4.0), lambda: Base(scale=4.0, size=3)])
def test_positional_and_keyword_arguments_are_recorded_by_name(build):
    assert describe(build()) == {"class_path": f"{HERE}.Base", "init_args": {"size": 3, "scale": 4.0}}


def test_defaults_are_recorded_too():
    assert describe(Base(3))["init_args"] == {"size": 3, "scale": 2.0}


def test_a_subclass_is_recorded_as_itself_with_its_own_arguments():
    expected = {"class_path": f"{HERE}.Leaf", "init_args": {"name": "a", "sizes": [4, 5, 6]}}
    assert describe(Leaf("a", (4, 5, 6))) == expected


def test_a_subclass_without_a_constructor_is_recorded_as_itself():
    assert describe(SilentLeaf(3)) == {"class_path": f"{HERE}.SilentLeaf", "init_args": {"size": 3, "scale": 2.0}}


def test_a_constructor_that_fails_says_so_as_it_would_without_a_record():
    with pytest.raises(TypeError, match="missing a required argument: 'size'"):
        Base()


def test_a_network_is_still_a_module_and_records_itself():
    network = MLPGenerator(latent_dim=2, hidden_dim=4)
    assert describe(network)["init_args"] == {"latent_dim": 2, "hidden_dim": 4, "num_layers": 3}
    assert not any("recipe" in key for key in network.state_dict())


@pytest.mark.parametrize("value", [None, True, 3, -2.5, "text", [1, [2, None]], {"a": {"b": [False]}}])
def test_plain_data_stays_as_it_is(value):
    assert describe(value) == value


def test_tuples_become_lists_and_keys_strings():
    assert describe({1: (2, (3,))}) == {"1": [2, [3]]}


def test_a_class_and_a_partial_of_a_class_are_named():
    assert describe(torch.optim.SGD) == {"class_path": "torch.optim.sgd.SGD"}
    partial = functools.partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.9))
    assert describe(partial) == {"class_path": "torch.optim.adam.Adam", "init_args": {"lr": 0.1, "betas": [0.5, 0.9]}}


def test_an_object_that_takes_no_arguments_is_named():
    assert describe(Plain()) == {"class_path": f"{HERE}.Plain"}


def test_nested_objects_are_described_to_the_bottom():
    holder = Holder(Leaf("a"), torch.optim.SGD, table={"x": [Base(1)]})
    assert describe([holder]) == [
        {
            "class_path": f"{HERE}.Holder",
            "init_args": {
                "part": {"class_path": f"{HERE}.Leaf", "init_args": {"name": "a", "sizes": [1, 2]}},
                "optimizer": {"class_path": "torch.optim.sgd.SGD"},
                "table": {"x": [{"class_path": f"{HERE}.Base", "init_args": {"size": 1, "scale": 2.0}}]},
            },
        }
    ]


class WithHyperparameters(nn.Module):
    """As LightningCLI leaves a module."""

    def __init__(self, class_path: str | None) -> None:
        super().__init__()
        path = {} if class_path is None else {"_class_path": class_path, "_instantiator": "somewhere"}
        self.hparams = path | {"size": 3, "part": Base(1)}


def test_a_module_is_described_by_its_hyperparameters():
    part = {"class_path": f"{HERE}.Base", "init_args": {"size": 1, "scale": 2.0}}
    path = f"{HERE}.WithHyperparameters"
    assert describe(WithHyperparameters(path)) == {"class_path": path, "init_args": {"size": 3, "part": part}}


@pytest.mark.parametrize("path", [f"{HERE}.Holder", None])
def test_a_module_with_the_hyperparameters_of_another_class_or_of_none_is_refused(path):
    with pytest.raises(TypeError, match="WithHyperparameters does not say how it was built"):
        describe(WithHyperparameters(path))


def test_the_description_of_a_module_builds_one_with_the_same_settings():
    module = tiny.vae(hidden_dim=7)
    described = describe(module)
    assert described["class_path"] == "lit_generative.vae.module.VAE"
    assert not any(key.startswith("_") for key in described["init_args"])
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--built", type=VAE)
    again = parser.instantiate(parser.parse_object({"built": described})).built
    settings, expected = ({**d["init_args"], "optimizer": None} for d in (describe(again), described))
    assert settings == expected  # but for the optimizer, to which the parser adds torch's defaults
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}


def test_an_object_with_arguments_but_no_record_is_refused():
    with pytest.raises(TypeError, match=r"Linear does not say how it was built.*lit_generative.recipe.Recorded"):
        describe([nn.Linear(2, 3)])


@pytest.mark.parametrize(
    "value",
    [
        lambda params: torch.optim.Adam(params),
        torch.relu,
        functools.partial(lambda params, lr: None, lr=0.1),
        functools.partial(torch.optim.Adam, [nn.Parameter(torch.zeros(1))]),
    ],
    ids=["lambda", "builtin", "partial of a function", "partial with positional arguments"],
)
def test_a_function_is_refused_since_no_config_can_hold_it(value):
    with pytest.raises(TypeError, match=r"does not say how it was built.*functools.partial of one"):
        describe(value)


@pytest.mark.parametrize("value", [torch.ones(2), torch.float16, b"bytes"], ids=["tensor", "dtype", "bytes"])
def test_a_value_whose_class_alone_does_not_build_it_again_is_refused(value):
    with pytest.raises(TypeError, match="does not say how it was built"):
        describe(value)


@pytest.mark.parametrize("built", [Base(3, 0.5), Leaf("a", (7, 8)), SilentLeaf(scale=1.0, size=2)])
def test_a_description_builds_an_equal_object(built):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--built", type=Base)
    again = parser.instantiate(parser.parse_object({"built": describe(built)})).built
    assert again == built
    assert describe(again) == describe(built)


def test_a_config_of_peft_is_described_by_what_differs_from_its_defaults():
    config = peft.LoraConfig(r=2, target_modules=["to_v", "to_q"], task_type=peft.TaskType.CAUSAL_LM)
    described = describe(config)
    assert described["class_path"] == "peft.tuners.lora.config.LoraConfig"
    arguments = described["init_args"]
    assert arguments.pop("peft_version")
    assert arguments == {"r": 2, "target_modules": ["to_q", "to_v"], "task_type": "CAUSAL_LM", "peft_type": "LORA"}
    assert peft.LoraConfig(**arguments) == config


def test_a_class_path_can_be_imported():
    assert class_path(MLPGenerator) == "lit_generative.networks.mlp.MLPGenerator"
    assert class_path(torch.optim.SGD) == "torch.optim.sgd.SGD"
