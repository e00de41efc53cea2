import argparse
import os
import pickle

import pytest
import torch

from lit_generative.finetune.stylegan2_conversion import convert_stylegan2
from lit_generative.gan.module import GAN
from lit_generative.loading import load_module
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import tiny
from tests.finetune import reference_stylegan2 as reference
from tests.finetune.persistent_pickles import Persistent, persistent_pickle

WIDTHS = [12, 6, 3]
"""At 4x4, 8x8 and 16x16."""
G, G_EMA = (reference.random_generator(WIDTHS, seed=seed) for seed in (0, 1))
D = reference.random_discriminator(WIDTHS[::-1], seed=2)
MEAN = torch.linspace(-1, 1, 6)


def rosinality(path, **parts):
    arguments = argparse.Namespace(size=16, path="data", lr=0.002)
    everything = {"g": G, "d": D, "g_ema": G_EMA, "latent_avg": MEAN, "args": arguments, "ada_aug_p": 0.1} | parts
    torch.save({key: value for key, value in everything.items() if value is not None}, path)
    return path, "stylegan2-rosinality"


def nvlabs(path, protocol=4, frozen=(), group_size=4, **parts):
    parameters, buffers = reference.nvlabs_discriminator(D)
    for name in [name for name in parameters if name.startswith(tuple(frozen))]:
        buffers[name] = parameters.pop(name)
    everything = {
        "G": Persistent("Generator", *reference.nvlabs_generator(G, -MEAN), z_dim=6),
        "D": Persistent("Discriminator", parameters, buffers, **{"b4.mbstd.group_size": group_size}),
        "G_ema": Persistent("Generator", *reference.nvlabs_generator(G_EMA, MEAN), z_dim=6),
        "augment_pipe": None,
        "training_set_kwargs": {"resolution": 16},
    } | parts
    path.write_bytes(persistent_pickle(everything, protocol))
    return path, "stylegan2-nvlabs"


def converted(tmp_path, source, ema=None):
    file, layout = source
    return load_module(convert_stylegan2(file, tmp_path / "converted.ckpt", layout), ema=ema)


SOURCES = {"rosinality": rosinality, "nvlabs": nvlabs, "nvlabs protocol 3": lambda path: nvlabs(path, 3)}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(("ema", "state"), [(None, G_EMA), (False, G)], ids=["average", "raw"])
def test_images_and_logits_are_those_of_the_source(tmp_path, make, ema, state):
    module = converted(tmp_path, make(tmp_path / "source"), ema)
    z, x = torch.randn(4, 6), torch.randn(4, 3, 16, 16)
    expected = reference.images(state, reference.styles(state, z))
    assert expected.std() > 1
    torch.testing.assert_close(module.generator(z), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.discriminator(x), reference.logits(D, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [rosinality, nvlabs])
def test_truncated_images_are_those_of_the_source(tmp_path, make):
    module = converted(tmp_path, make(tmp_path / "source"))
    module.generator.truncation = 0.7
    z = torch.randn(2, 6)
    w = MEAN + 0.7 * (reference.styles(G_EMA, z) - MEAN)
    torch.testing.assert_close(module.generator(z), reference.images(G_EMA, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("widths", "size"), [([5, 5], 8), ([512, 512, 256], 16)])
def test_sizes_are_read_off_the_weights(tmp_path, widths, size):
    if widths == [5, 5]:  # 10 at 4x4 would be due
        with pytest.raises(ValueError, match=r"the file .*must double with every halving of the size, up to 512"):
            converted(tmp_path, rosinality(tmp_path / "s", g=None, g_ema=reference.random_generator(widths)))
        return
    average = reference.random_generator(widths, style_dim=4, layers=3, channels=1)
    judge = reference.random_discriminator(widths[::-1], channels=1)
    module = converted(tmp_path, rosinality(tmp_path / "s", g=None, g_ema=average, d=judge, latent_avg=None))
    assert module.generator.sample_shape == module.discriminator.sample_shape == (1, size, size)
    assert (module.latent_dim, len(module.generator.mapping.layers)) == (4, 3)


def test_a_file_without_raw_generator_has_its_average_twice(tmp_path):
    module = converted(tmp_path, rosinality(tmp_path / "s", g=None), ema=False)
    torch.testing.assert_close(module.generator.base, G_EMA["input.input"][0])


def test_a_mean_style_that_the_file_lacks_is_measured(tmp_path):
    generator = converted(tmp_path, rosinality(tmp_path / "s", latent_avg=None)).generator
    expected = reference.styles(G_EMA, torch.randn(20_000, 6))
    torch.testing.assert_close(generator.w_avg, expected.mean(dim=0), rtol=0, atol=0.05)
    again = converted(tmp_path, rosinality(tmp_path / "s", latent_avg=None)).generator
    assert torch.equal(again.w_avg, generator.w_avg)


def test_noise_that_an_early_file_lacks_is_drawn_the_same_each_time(tmp_path):
    early = {key: value for key, value in G_EMA.items() if not key.startswith("noises")}
    first, again = (converted(tmp_path, rosinality(tmp_path / "s", g_ema=early)).generator for _ in range(2))
    assert 0.8 < first.convs[4].noise.std() < 1.2
    tiny.assert_same(tiny.weights(first), tiny.weights(again))


def test_the_random_state_of_the_caller_is_left_alone(tmp_path):
    torch.manual_seed(3)
    source = rosinality(tmp_path / "s", latent_avg=None)
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    convert_stylegan2(source[0], tmp_path / "out", source[1])
    assert torch.equal(torch.randn(2), expected)


def test_frozen_layers_that_a_pickle_holds_as_buffers_are_read(tmp_path):
    module = converted(tmp_path, nvlabs(tmp_path / "s", frozen=["b16", "b8.conv0"]))
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(module.discriminator(x), reference.logits(D, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "expected"), [(2, 2), (None, 2**30)])
def test_a_pickle_says_how_many_examples_minibatch_deviation_compares(tmp_path, size, expected):
    assert (
        converted(tmp_path, nvlabs(tmp_path / "s", group_size=size)).discriminator.minibatch_std.group_size == expected
    )


def test_a_discriminator_without_minibatch_deviation_has_none_here(tmp_path):
    judge = D | {"final_conv.0.weight": D["final_conv.0.weight"][:, :-1]}
    parameters, buffers = reference.nvlabs_discriminator(judge)
    module = converted(tmp_path, nvlabs(tmp_path / "s", D=Persistent("D", parameters, buffers)))
    assert isinstance(module.discriminator.minibatch_std, torch.nn.Identity)


def test_lightning_loads_the_checkpoint_too(tmp_path):
    out = convert_stylegan2(rosinality(tmp_path / "s")[0], tmp_path / "a.ckpt", "stylegan2-rosinality")
    module = GAN.load_from_checkpoint(out)
    torch.testing.assert_close(module.generator.base, G["input.input"][0])
    assert load_checkpoint(out)["hyper_parameters"]["generator"]["init_args"]["width"] == 3


def test_the_converted_gan_trains_on(tmp_path):
    module = converted(tmp_path, rosinality(tmp_path / "s", **grey()))
    before = tiny.weights(module)
    tiny.train(tmp_path, module.train(), tiny.digits(image_size=16))
    after = tiny.weights(module)
    assert all(not torch.equal(before[part], after[part]) for part in ("generator.base", "discriminator.conv.weight"))


def grey():
    average = reference.random_generator(WIDTHS, channels=1)
    return {"g": None, "g_ema": average, "d": reference.random_discriminator(WIDTHS[::-1], channels=1)}


# refused


class Command:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("place", ["top", "field"])
@pytest.mark.parametrize("layout", ["stylegan2-rosinality", "stylegan2-nvlabs"])
def test_a_file_that_would_run_a_command_is_refused_and_nothing_runs(tmp_path, monkeypatch, layout, place):
    monkeypatch.chdir(tmp_path)
    value = Command() if place == "top" else {"g_ema": G, "d": D, "G_ema": Command(), "D": 0}
    if layout == "stylegan2-rosinality":
        torch.save(value, "source")
    else:
        (tmp_path / "source").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=r"source .*was refused"):
        convert_stylegan2("source", "out.ckpt", layout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def with_entry(state, **entries):
    return {key: value for key, value in (state | entries).items() if value is not None}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"d": None}, r"\['d'\] are missing; it holds .*take the file that training saved"),
        ({"d": with_entry(D, **{"final_linear.1.bias": None})}, "1 are missing, 0 unknown, final_linear.1.bias"),
        ({"d": with_entry(D, extra=MEAN)}, "s, d: .* 0 are missing, 1 unknown, extra among"),
        ({"d": with_entry(D, **{"convs.1.skip.0.kernel": torch.ones(4, 4)})}, "filter convs.1.skip.0.kernel must be"),
        ({"d": with_entry(D, **{"convs.1.skip.0.kernel": torch.ones(2, 2)})}, "filter convs.1.skip.0.kernel must be"),
        ({"g_ema": [1]}, "g_ema must be a state dict of tensors"),
        ({"g_ema": {"a": 1}}, "g_ema must be a state dict of tensors"),
        ({"g": reference.random_generator(WIDTHS, layers=1)}, r"differ in size.*: mapping\.layers\.1\.bias is"),
        (
            {"g": reference.random_generator(WIDTHS, layers=3)},
            r"differ in size from each other: mapping\.layers\.2\.bias is",
        ),
    ],
)
def test_other_networks_are_refused(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, rosinality(tmp_path / "s", **parts))


def test_a_pickle_of_other_things_is_refused(tmp_path):
    with pytest.raises(ValueError, match="G_ema: it must be a persistent module, got a dict"):
        converted(tmp_path, nvlabs(tmp_path / "s", G_ema={"a": 1}))
    with pytest.raises(ValueError, match=r"needs the networks \['G_ema', 'D'\]"):
        converted(tmp_path, _list(tmp_path))
    parameters, buffers = reference.nvlabs_discriminator(D)
    classes = Persistent("D", parameters | {"mapping.embed.weight": MEAN}, buffers)
    with pytest.raises(ValueError, match=r"no classes.*mapping.embed.weight among them"):
        converted(tmp_path, nvlabs(tmp_path / "s", D=classes))


def _list(tmp_path):
    (tmp_path / "s").write_bytes(pickle.dumps([1]))
    return tmp_path / "s", "stylegan2-nvlabs"


def test_a_file_that_is_not_there_or_damaged_and_an_unknown_layout_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*lost"):
        convert_stylegan2(tmp_path / "lost", tmp_path / "out", "stylegan2-rosinality")
    (tmp_path / "s").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"s cannot be read as a file of torch|was refused"):
        convert_stylegan2(tmp_path / "s", tmp_path / "out", "stylegan2-rosinality")
    with pytest.raises(ValueError, match="layout must be one of"):
        convert_stylegan2(tmp_path / "s", tmp_path / "out", "stylegan3")
