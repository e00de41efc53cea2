import functools
import re

import lightning as L
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.posthoc_ema import FOLDER, PostHocEMA, synthesize
from lit_generative.training.checkpoint_io import load_checkpoint
from lit_generative.training.power_ema import gamma_from_sigma_rel, live_share
from tests import tiny
from tests.test_resume import assert_same
from tests.vae.test_vq_module import vqvae

ADAM = functools.partial(torch.optim.Adam, lr=0.01)
STEPS = 60


def _gan(seed: int = 0):
    return tiny.gan(seed=seed, generator_optimizer=ADAM, discriminator_optimizer=ADAM)


class Direct(L.Callback):
    """Power-function averages of the generator, by hand and in double precision."""

    def __init__(self, *sigma_rels: float) -> None:
        self.gammas = {sigma_rel: gamma_from_sigma_rel(sigma_rel) for sigma_rel in sigma_rels}
        self.averages: dict[float, dict[str, torch.Tensor]] = {}
        self.history: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        live = {k: v.double() for k, v in tiny.weights(pl_module).items() if k.startswith("generator")}
        self.history.append(live)
        for sigma_rel, gamma in self.gammas.items():
            share = live_share(gamma, trainer.global_step)
            old = self.averages.get(sigma_rel, live)
            self.averages[sigma_rel] = {k: share * v + (1 - share) * old[k] for k, v in live.items()}


def _flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[key].double().flatten() for key in sorted(weights)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    post, direct = PostHocEMA(every_n_steps=5), Direct(0.05, 0.07, 0.08, 0.1, 0.12, 0.15)
    callbacks = [post, direct, Checkpoint(dirpath=str(folder))]
    tiny.train(folder, _gan(), tiny.ring(), max_steps=STEPS, callbacks=callbacks)
    return folder, load_checkpoint(folder / "last.ckpt"), direct, post


def test_the_averages_are_those_computed_by_hand(trained):
    _, checkpoint, direct, _ = trained
    state = checkpoint["callbacks"]["PostHocEMA"]
    assert (state["updates"], state["images"]) == (STEPS, 6 * STEPS)
    for sigma_rel in (0.05, 0.1):
        average = {key: value.double() for key, value in state["averages"][str(sigma_rel)].items()}
        torch.testing.assert_close(average, direct.averages[sigma_rel], rtol=1e-4, atol=1e-5)
        assert torch.dist(_flat(average), _flat(direct.history[-1])) > 1e-2


def test_snapshots_are_named_by_update_and_width_and_hold_both(trained):
    folder, *_ = trained
    files = sorted(path.name for path in (folder / FOLDER).iterdir())
    assert len(files) == 2 * STEPS // 5
    assert files[0] == "update_0000005_sigma_0.05.safetensors"
    with safe_open(folder / FOLDER / files[0], framework="pt") as file:
        assert file.metadata() == {"sigma_rel": "0.05", "update": "5"}
    saved = load_file(folder / FOLDER / f"update_{STEPS:07d}_sigma_0.1.safetensors")
    tiny.assert_same(saved, trained[1]["callbacks"]["PostHocEMA"]["averages"]["0.1"])


@pytest.mark.parametrize("sigma_rel", [0.07, 0.08, 0.12, 0.15])
def test_a_synthesized_average_is_near_the_one_computed_in_training(trained, sigma_rel):
    """To about 1 % of the way from the last weights to the average, as the fit of the profiles foretells."""
    folder, checkpoint, direct, _ = trained
    made = synthesize(checkpoint, folder / FOLDER, sigma_rel)
    expected, last = _flat(direct.averages[sigma_rel]), _flat(direct.history[-1])
    error = float(torch.dist(_flat(made.weights), expected) / torch.dist(expected, last))
    assert error < 0.01
    assert made.error < 0.02
    assert made.update == STEPS


def test_without_snapshots_the_two_averages_of_the_end_are_no_match(trained, tmp_path):
    """The measure of the test above: it is the snapshots that make the average."""
    _, checkpoint, direct, _ = trained
    made = synthesize(checkpoint, tmp_path, 0.15)
    expected, last = _flat(direct.averages[0.15]), _flat(direct.history[-1])
    assert float(torch.dist(_flat(made.weights), expected) / torch.dist(expected, last)) > 0.05
    assert made.error > 0.1


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_a_stored_average_is_synthesized_exactly(trained, sigma_rel):
    folder, checkpoint, *_ = trained
    made = synthesize(checkpoint, folder / FOLDER, sigma_rel)
    assert made.error == 0
    tiny.assert_same(made.weights, checkpoint["callbacks"]["PostHocEMA"]["averages"][str(sigma_rel)])
    earlier = synthesize(checkpoint, folder / FOLDER, sigma_rel, update=20)
    assert (earlier.error, earlier.update, earlier.images) == (0, 20, 120)
    tiny.assert_same(earlier.weights, load_file(folder / FOLDER / f"update_0000020_sigma_{sigma_rel}.safetensors"))


def test_snapshots_later_than_the_checkpoint_are_left_out(trained, tmp_path):
    folder, checkpoint, *_ = trained
    tiny.train(tmp_path, _gan(), tiny.ring(), max_steps=20, callbacks=[PostHocEMA(), Checkpoint(dirpath=str(tmp_path))])
    early = load_checkpoint(tmp_path / "last.ckpt")
    made = synthesize(early, folder / FOLDER, 0.08)
    assert made.update == 20
    tiny.assert_same(made.weights, synthesize(checkpoint, folder / FOLDER, 0.08, update=20).weights)


@pytest.mark.parametrize("update", [0, 4, STEPS + 1])
def test_an_update_without_averages_is_refused(trained, update):
    folder, checkpoint, *_ = trained
    with pytest.raises(ValueError, match=rf"The run has averages of updates 5 to {STEPS}, got {update}"):
        synthesize(checkpoint, folder / FOLDER, 0.08, update)


def test_a_run_without_averages_is_refused(tmp_path):
    tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[Checkpoint(dirpath=str(tmp_path))])
    with pytest.raises(ValueError, match="the run had no PostHocEMA callback"):
        synthesize(load_checkpoint(tmp_path / "last.ckpt"), tmp_path, 0.08)


def test_a_damaged_snapshot_is_named(trained, tmp_path):
    (tmp_path / "update_0000005_sigma_0.05.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"update_0000005_sigma_0.05.safetensors is damaged"):
        synthesize(trained[1], tmp_path, 0.08)


@pytest.mark.parametrize(
    ("build", "data", "options"),
    [
        (_gan, tiny.ring, {}),
        (vqvae, tiny.digits, {}),
        (vqvae, tiny.digits, {"buffers": "average"}),
    ],
)
def test_a_resumed_run_has_the_averages_and_snapshots_of_an_uninterrupted_one(tmp_path, build, data, options):
    """Bit for bit."""
    folders, states = [tmp_path / "whole", tmp_path / "stopped"], []
    for folder, stops in zip(folders, [(7,), (4, 7)], strict=True):
        ckpt_path = None
        for seed, stop in enumerate(stops):
            callbacks = [PostHocEMA(every_n_steps=3, **options), Checkpoint(dirpath=str(folder))]
            tiny.train(folder, build(seed=seed), data(), max_steps=stop, callbacks=callbacks, ckpt_path=ckpt_path)
            ckpt_path = folder / "last.ckpt"
        states.append(load_checkpoint(ckpt_path)["callbacks"]["PostHocEMA"])
    assert states[0]["updates"] == 7
    assert_same(states[1], states[0])
    names = [sorted(path.name for path in (folder / FOLDER).iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        tiny.assert_same(*(load_file(folder / FOLDER / name) for folder in folders))


def test_resuming_with_other_widths_is_refused(tmp_path):
    tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[PostHocEMA(), Checkpoint(dirpath=str(tmp_path))])
    match = re.escape("the checkpoint has the sigma_rels ['0.05', '0.1'], the config ['0.07']")
    with pytest.raises(ValueError, match=match):
        tiny.train(
            tmp_path,
            _gan(),
            tiny.ring(),
            max_steps=5,
            callbacks=[PostHocEMA((0.07,))],
            ckpt_path=tmp_path / "last.ckpt",
        )


def test_accumulated_batches_are_one_update(tmp_path):
    post = PostHocEMA()
    vae = tiny.vae()
    tiny.train(tmp_path, vae, tiny.digits(), max_steps=3, accumulate_grad_batches=2, callbacks=[post])
    assert (post.updates, post.images) == (3, 36)


class Codebooks(L.Callback):
    """The codebook after each update."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.quantizer.codebook.clone())


def codebook_run(folder, buffers: str | None) -> tuple[dict, list[torch.Tensor]]:
    """Checkpoint and codebooks of 7 updates, with snapshots of the third and sixth."""
    post = PostHocEMA(every_n_steps=3, **({} if buffers is None else {"buffers": buffers}))
    module, codebooks = vqvae(optimizer=functools.partial(torch.optim.Adam, lr=0.05)), Codebooks()
    callbacks = [post, codebooks, Checkpoint(dirpath=str(folder))]
    tiny.train(folder, module, tiny.digits(), max_steps=7, callbacks=callbacks)
    return load_checkpoint(folder / "last.ckpt"), codebooks.seen


def test_buffers_are_copied_from_the_latest_snapshot_in_the_average_unless_told_else(tmp_path):
    checkpoint, codebooks = codebook_run(tmp_path, None)
    name, state = "quantizer.codebook", checkpoint["callbacks"]["PostHocEMA"]
    buffers = [f"quantizer.{name}" for name in ("codebook", "counts", "sums")]
    assert [name for name in state["copied"] if name.startswith("quantizer")] == buffers
    assert set(state["copied"]) <= {name for name, _ in vqvae().named_buffers()}
    for average in state["averages"].values():
        tiny.assert_same(average[name], codebooks[-1])
        assert not torch.equal(average["encoder.layers.0.weight"], checkpoint["state_dict"]["encoder.layers.0.weight"])
    for update in (3, 6):
        for sigma_rel in (0.05, 0.1):
            saved = load_file(tmp_path / FOLDER / f"update_{update:07d}_sigma_{sigma_rel}.safetensors")
            tiny.assert_same(saved[name], codebooks[update - 1])
    for sigma_rel in (0.08, 0.1):  # made of several snapshots, and a stored one
        for end, update in ((None, 7), (6, 6), (5, 3), (3, 3)):
            made = synthesize(checkpoint, tmp_path / FOLDER, sigma_rel, end).weights
            tiny.assert_same(made[name], codebooks[update - 1])


def test_the_latest_snapshot_is_the_one_that_says_so_whatever_the_files_are_called(tmp_path):
    checkpoint, codebooks = codebook_run(tmp_path, None)
    for path in (tmp_path / FOLDER).iterdir():
        path.rename(path.with_name(path.name.replace("update_0000003", "z")))
    made = synthesize(checkpoint, tmp_path / FOLDER, 0.08, 6).weights
    tiny.assert_same(made["quantizer.codebook"], codebooks[5])


def test_buffers_may_be_averaged_like_weights(tmp_path):
    checkpoint, codebooks = codebook_run(tmp_path, "average")
    state = checkpoint["callbacks"]["PostHocEMA"]
    assert state["copied"] == []
    for key, average in state["averages"].items():
        expected = torch.zeros_like(codebooks[0], dtype=torch.float64)
        for update, codebook in enumerate(codebooks, start=1):
            expected = torch.lerp(expected, codebook.double(), live_share(gamma_from_sigma_rel(float(key)), update))
        torch.testing.assert_close(average["quantizer.codebook"], expected.float())
        assert (expected - codebooks[-1]).abs().max() > 1e-3
    made = synthesize(checkpoint, tmp_path / FOLDER, 0.08).weights["quantizer.codebook"]
    averages = [average["quantizer.codebook"] for average in state["averages"].values()]
    assert all((made - value).abs().max() > 1e-4 for value in (*averages, *codebooks))


def test_a_buffer_under_two_names_is_copied_under_both(tmp_path):
    module = tiny.image_gan()
    module.generator.again = module.generator.layers[1]
    folder = tmp_path
    tiny.train(folder, module, tiny.digits(), callbacks=[PostHocEMA(every_n_steps=2), Checkpoint(dirpath=str(folder))])
    checkpoint = load_checkpoint(folder / "last.ckpt")
    made, live = synthesize(checkpoint, folder / FOLDER, 0.08).weights, checkpoint["state_dict"]
    for name in ("generator.again.running_mean", "generator.layers.1.running_mean"):
        tiny.assert_same(made[name], live[name])


@pytest.mark.parametrize(("before", "after"), [("copy", "average"), ("average", "copy")])
def test_resuming_with_another_policy_for_buffers_is_refused(tmp_path, before, after):
    callbacks = [PostHocEMA(buffers=before), Checkpoint(dirpath=str(tmp_path))]
    tiny.train(tmp_path, tiny.image_gan(), tiny.digits(), callbacks=callbacks)
    message = f"buffers is '{after}', and was '{before}' in the checkpoint. Use buffers='{before}'"
    options = {"max_steps": 5, "ckpt_path": tmp_path / "last.ckpt"}
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path, tiny.image_gan(), tiny.digits(), callbacks=[PostHocEMA(buffers=after)], **options)


def test_without_buffers_the_policy_may_change(tmp_path):
    callbacks = [PostHocEMA(buffers="average"), Checkpoint(dirpath=str(tmp_path))]
    tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=callbacks)
    options = {"max_steps": 5, "ckpt_path": tmp_path / "last.ckpt"}
    tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[PostHocEMA()], **options)


def test_a_state_that_only_passes_through_stays_as_it_was(tmp_path):
    checkpoint, _ = codebook_run(tmp_path, None)
    state, post = checkpoint["callbacks"]["PostHocEMA"], PostHocEMA()
    post.load_state_dict(state)
    assert_same(post.state_dict(), state)


def test_snapshots_may_be_half_precision(tmp_path):
    post = PostHocEMA(every_n_steps=3, dtype="float16", modules=["generator"])
    tiny.train(tmp_path, tiny.image_gan(), tiny.digits(), callbacks=[post])
    saved = load_file(next((tmp_path / FOLDER).glob("*0.05*")))
    assert {value.dtype for value in saved.values()} == {torch.float16}
    assert any("running_var" in key for key in saved)
    assert not any("num_batches" in key for key in saved)


def test_a_snapshot_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    post = PostHocEMA(every_n_steps=3)
    target = tmp_path / FOLDER / "update_0000003_sigma_0.05.safetensors"
    target.mkdir(parents=True)  # a file cannot take a folder's place
    with pytest.raises(OSError, match="could not be written"):
        tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[post])
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sigma_rels": ()}, "sigma_rels must be different numbers"),
        ({"sigma_rels": (0.1, 0.1)}, "sigma_rels must be different numbers"),
        ({"sigma_rels": (0.5,)}, "sigma_rel must lie between"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be float32, float16 or bfloat16, got 'int8'"),
        ({"buffers": "mean"}, "buffers must be copy or average, got 'mean'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        PostHocEMA(**arguments)
