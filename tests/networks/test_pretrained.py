import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import load_file, save_file

from lit_generative.networks.mlp import MLPGenerator
from lit_generative.networks.pretrained import (
    Source,
    build_from_text,
    forget_source,
    load_pretrained,
    read_settings,
    settings_of,
)
from lit_generative.recipe import Recorded, describe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def unet(**settings) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    defaults = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "in_channels": 1}
    return UNet2DModel(**blocks | defaults | settings)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    unet(dropout=0.25).half().save_pretrained(folder)
    unet(act_fn="relu").save_pretrained(folder / "inner")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def test_settings_are_the_files_and_defaults_where_it_says_nothing(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["downsample_padding"]
    (folder / "config.json").write_text(json.dumps(config))
    settings = read_settings("Network", UNet2DModel, Source(str(folder)))
    assert settings["block_out_channels"] == [4, 8]
    assert settings["dropout"] == 0.25
    assert settings["downsample_padding"] == 1
    assert not [name for name in settings if name.startswith("_")]


def test_weights_come_in_float32_ready_to_train_and_settings_can_be_replaced(folder):
    net = load_pretrained("Network", UNet2DModel, Source(str(folder)), dropout=0.5)
    saved = load_file(folder / WEIGHTS)
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(dict(net.state_dict()), {key: value.float() for key, value in saved.items()})
    assert net.config.dropout == 0.5
    assert all(module.training for module in net.modules())


def test_a_subfolder_is_read(folder):
    source = Source(str(folder), "inner")
    assert read_settings("Network", UNet2DModel, source)["act_fn"] == "relu"
    assert load_pretrained("Network", UNet2DModel, source).config.act_fn == "relu"


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    load_pretrained("Network", UNet2DModel, Source(str(folder)))
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_a_text_builds_the_same_architecture_without_a_file(folder):
    net = load_pretrained("Network", UNet2DModel, Source(str(folder)))
    again = build_from_text("Network", UNet2DModel, json.dumps(settings_of(net)), sample_size=8)
    again.load_state_dict(net.state_dict())
    assert settings_of(again) == {**settings_of(net), "sample_size": 8}


@pytest.mark.parametrize(
    "text", ["no JSON", "[1]", '"owner/name"', '{"block_out_channels": [4, 8, 8]}', '{"norm_num_groups": "x"}']
)
def test_a_text_that_describes_nothing_is_refused(text):
    with pytest.raises(ValueError, match="Network: config must be a JSON object of UNet2DModel's arguments, got"):
        build_from_text("Network", UNet2DModel, text)


# ---- what is not to be had


def refused(message: str, pretrained, model_class=UNet2DModel, **place):
    source = Source(str(pretrained), **place)
    with pytest.raises(ValueError, match=message):
        _ = read_settings("Network", model_class, source) and load_pretrained("Network", model_class, source)


@pytest.mark.parametrize("path", ["/no/such/folder", "runs/no/such", "../up", "nothing", ""])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(UNet2DModel, "load_config", None)
    refused(f"Network: there is no folder '{path}', and names on the hub read owner/name", path)


def test_a_file_is_no_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    refused("there is no folder 'copy/config.json'", "copy/config.json")


def test_a_name_on_the_hub_without_a_network_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(r"Network: 'nobody/nothing' could not be loaded: .*Without a network only folders work", "nobody/nothing")


def test_another_class_is_refused(folder):
    refused(r"must hold weights of AutoencoderKL, but its config.json says UNet2DModel", folder, AutoencoderKL)
    refused(r"\(subfolder 'inner'\) must hold weights of Auto", folder, AutoencoderKL, subfolder="inner")


def test_a_pipelines_folder_asks_for_a_subfolder(folder):
    (folder / "config.json").unlink()
    refused(r"could not be loaded: .*config.json.* subfolder if it is a pipeline's", folder)


def test_pickled_weights_are_never_read(folder):
    (folder / WEIGHTS).unlink()
    unet().save_pretrained(folder, safe_serialization=False)
    assert list(folder.glob("*.bin"))
    refused(r"could not be loaded: .*pickled weights \(.bin\) are never read", folder)


def test_damaged_weights_are_refused(folder):
    (folder / WEIGHTS).write_bytes(b"nonsense" * 20)
    refused("could not be loaded: Unable to load weights", folder)


def test_weights_of_another_width_are_refused(folder):
    unet(block_out_channels=(8, 8)).save_config(folder)
    refused("could not be loaded: ", folder)


@pytest.mark.parametrize(
    "change", [lambda state: state.pop("conv_in.bias"), lambda state: state.update(x=torch.ones(1))]
)
def test_missing_weights_are_not_replaced_by_random_ones_nor_too_many_left_out(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    refused(r"are not those of its own config.json: 1 are missing or too many, (conv_in.bias|x) among them", folder)


# ---- recipes


class Loaded(Recorded, torch.nn.Module):
    def __init__(self, size, pretrained=None, subfolder=None, revision=None, config=None):
        super().__init__()


class Derived(Loaded):
    def __init__(self, size):
        super().__init__(size, "a/b")


def test_a_recipe_names_the_architecture_instead_of_the_folder():
    module, net = Loaded(3, "a/b", "c", "d"), unet()
    forget_source(module, net)
    arguments = describe(module)["init_args"]
    assert json.loads(arguments.pop("config")) == settings_of(net)
    assert arguments == {"size": 3, "pretrained": None, "subfolder": None, "revision": None}


@pytest.mark.parametrize("module", [Derived(3), MLPGenerator()])
def test_a_recipe_without_such_arguments_stays_as_it_is(module):
    before = describe(module)
    forget_source(module, unet())
    assert describe(module) == before
