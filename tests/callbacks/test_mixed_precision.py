import contextlib
import copy
import functools
import io
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.plugins.precision import MixedPrecision as Plugin
from torch import nn

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.gradient_clipping import GradientClipping
from lit_generative.callbacks.mixed_precision import MixedPrecision, keep_float32
from lit_generative.training.checkpoint_io import SafeCheckpointIO
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs"


def float16(scale: float = 2.0**10, **options) -> list:
    """Real float16 with a loss scaler, on the CPU."""
    return [SafeCheckpointIO(), Plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, **options))]


class Overflows(L.Callback):
    """Puts an inf into the gradients of the optimizers named, at the batches named."""

    def __init__(self, **batches: list[int]) -> None:
        self.batches = batches

    def on_after_backward(self, trainer, pl_module) -> None:
        for name, batches in self.batches.items():
            if trainer.fit_loop.total_batch_idx in batches:
                for p in pl_module.get_submodule(name).parameters():
                    if p.grad is not None:
                        p.grad.view(-1)[0] = torch.inf


class Probe(L.Callback):
    """Gradients as each optimizer gets them, the weights and what is logged after each batch, and the steps."""

    def __init__(self) -> None:
        self.grads, self.weights, self.logged, self.steps = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.grads.append([p.grad.detach().clone() for p in parameters if p.grad is not None])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights.append(tiny.weights(pl_module))
        self.logged.append(
            {k: float(v) for k, v in trainer.callback_metrics.items() if "loss_scale" in k or "skip" in k}
        )
        self.steps.append(trainer.global_step)


def run(tmp_path, *callbacks, module=None, max_steps=1, **kwargs):
    probe, module = Probe(), module or tiny.gan()
    data = tiny.ring() if hasattr(module, "generator") else tiny.digits()
    tiny.train(tmp_path, module, data, max_steps=max_steps, callbacks=[*callbacks, probe], **kwargs)
    return probe


# regions in float32


@pytest.mark.parametrize("fp16", [False, True], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("build", "names"),
    [(tiny.gan, ["generator", "discriminator"]), (tiny.vae, ["encoder", "decoder"]), (tiny.ddpm, ["network"])],
    ids=["gan", "vae", "ddpm"],
)
def test_networks_kept_in_float32_train_as_without_mixed_precision(tmp_path, build, names, fp16):
    """Forward and backward: a backward pass under autocast would differ."""
    options = {"plugins": float16(growth_interval=1000)} if fp16 else {"precision": "bf16-mixed"}
    whole, kept, plain = build(), build(), build()
    run(tmp_path, module=whole, max_steps=3)
    run(tmp_path, MixedPrecision(float32_modules=names), module=kept, max_steps=3, **options)
    run(tmp_path, module=plain, max_steps=3, **options)
    weights = tiny.weights(whole)
    tiny.assert_same(tiny.weights(kept), weights) if not fp16 else torch.testing.assert_close(
        tiny.weights(kept), weights
    )
    assert any(not torch.equal(value, weights[key]) for key, value in tiny.weights(plain).items())


class Sees(L.Callback):
    """The dtypes that come out of each layer of the module, and go into it, in training and in validation."""

    def __init__(self) -> None:
        self.dtypes: dict[str, set] = {}

    def setup(self, trainer, pl_module, stage) -> None:
        for name, layer in pl_module.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(functools.partial(self.note, name))

    def note(self, name, layer, args, output) -> None:
        self.dtypes.setdefault(name, set()).add((args[0].dtype, output.dtype))


def test_names_and_patterns_choose_the_layers_in_training_and_in_evaluation(tmp_path):
    sees, module = Sees(), tiny.vae()
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    patterns = [linear[0], "decoder.*.2"]
    chosen = {linear[0]} | {name for name in linear if name.startswith("decoder.") and name.endswith(".2")}
    assert 1 < len(chosen) < len(linear)
    run(tmp_path, MixedPrecision(patterns), sees, module=module, precision="bf16-mixed", limit_val_batches=1)
    for name in linear:
        outputs = {out for _, out in sees.dtypes[name]}
        assert outputs == ({torch.float32} if name in chosen else {torch.bfloat16}), name
    assert {given for given, _ in sees.dtypes[max(chosen)]} == {torch.float32}


def test_after_a_run_or_an_exception_the_layers_are_as_before(tmp_path):
    module = tiny.vae()
    run(tmp_path, MixedPrecision(["encoder"]), module=module, precision="bf16-mixed")
    assert not module.encoder._forward_hooks
    assert not module.encoder._forward_pre_hooks

    class Fails(L.Callback):
        def on_train_batch_end(self, *_) -> None:
            assert module.encoder._forward_hooks
            raise KeyError

    with pytest.raises(KeyError):
        run(tmp_path, MixedPrecision(["encoder"]), Fails(), module=module, precision="bf16-mixed")
    assert not module.encoder._forward_hooks


def test_without_mixed_precision_no_layer_is_touched_but_a_wrong_name_is_refused(tmp_path):
    class Untouched(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            assert not any(m._forward_pre_hooks for m in pl_module.modules())

    run(tmp_path, MixedPrecision(["generator"]), Untouched())
    with pytest.raises(
        ValueError, match=r"MixedPrecision: GAN has no sub-module 'generater'. The nearest are: generator"
    ):
        run(tmp_path, MixedPrecision(["generater"]))


class Net(nn.Module):
    """A layer within a layer, which takes keywords and lists and may fail or call itself."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, extra=(), depth=0, fails=False):
        assert all(t.dtype == torch.float32 for t in (x, *extra))
        y = self.inner(self.outer(x))
        assert y.dtype == torch.float32
        if fails and depth == 0:
            raise KeyError
        return self(y.bfloat16(), [y.bfloat16()], depth=depth - 1, fails=fails) if depth else y


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("copied", ["no", "deepcopy", "pickle"])
def test_a_region_ends_after_nesting_recursion_and_errors_and_survives_copies(depth, fails, copied):
    net = Net()
    handles = [*keep_float32(net, "cpu"), *keep_float32(net.inner, "cpu")]
    if copied == "deepcopy":
        net = copy.deepcopy(net)
    elif copied == "pickle":
        file = io.BytesIO()
        torch.save(net, file)
        net = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    half = torch.ones(1, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            with pytest.raises(KeyError) if fails else contextlib.nullcontext():
                assert net(half, extra=[half], depth=depth, fails=fails).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
            assert net.outer(half.float()).dtype == torch.bfloat16
    if copied == "no":
        for handle in handles:
            handle.remove()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert net.inner(half.float()).dtype == torch.bfloat16


def test_a_region_survives_a_hook_that_fails_before_it():
    layer = nn.Linear(2, 2)

    def fails(*_):
        raise KeyError

    handle = layer.register_forward_pre_hook(fails)
    keep_float32(layer, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(KeyError):
            layer(torch.ones(1, 2))
        assert torch.is_autocast_enabled("cpu")
        handle.remove()
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def test_what_other_hooks_compute_belongs_to_the_region():
    layer, seen = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    keep_float32(layer, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.ones(1, 2))
    assert seen == [False]


@pytest.mark.parametrize("fails", [False, True])
def test_the_precision_of_matrix_products_is_set_for_the_run_alone(tmp_path, fails):
    class Sees(L.Callback):
        def on_train_start(self, *_) -> None:
            assert torch.get_float32_matmul_precision() == "high"
            if fails:
                raise KeyError

    before = torch.get_float32_matmul_precision()
    assert before != "high"
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        run(tmp_path, MixedPrecision(matmul_precision="high"), Sees())
    assert torch.get_float32_matmul_precision() == before


# float16: one scaler, several optimizers


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_float16_gives_both_optimizers_the_gradients_of_float32(tmp_path, fused):
    adam = functools.partial(torch.optim.Adam, lr=1e-3, fused=fused)
    build = functools.partial(tiny.gan, generator_optimizer=adam, discriminator_optimizer=adam)
    # The scale doubles after each step: an optimizer that unscales by another scale than its loss had shows it.
    options = {"plugins": float16(growth_interval=1), "max_steps": 4}
    full = run(tmp_path, module=build(), max_steps=4)
    half = run(tmp_path, MixedPrecision(), module=build(), **options)
    assert len(half.grads) == 8
    for a, b in zip(full.grads, half.grads, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(y, x, rtol=0.02, atol=0.01 * float(x.abs().max()))
    assert half.logged[-1]["train/loss_scale"] == 2.0**18


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("clips", [False, True])
def test_an_overflow_of_one_optimizer_skips_its_step_alone_and_is_counted_for_it(tmp_path, fused, clips):
    adam = functools.partial(torch.optim.Adam, lr=1e-3, fused=fused)
    module = tiny.gan(generator_optimizer=adam, discriminator_optimizer=adam)
    clipping = [GradientClipping(max_norm=1.0)] if clips else []
    callbacks = [Overflows(discriminator=[1], generator=[2, 3]), *clipping, MixedPrecision()]
    probe = run(tmp_path, *callbacks, module=module, max_steps=5, plugins=float16())

    def moved(part: str, batch: int) -> bool:
        before, after = probe.weights[batch - 1], probe.weights[batch]
        return any(not torch.equal(before[key], after[key]) for key in after if key.startswith(part))

    assert [moved("discriminator", batch) for batch in (1, 2, 3, 4)] == [False, True, True, True]
    assert [moved("generator", batch) for batch in (1, 2, 3, 4)] == [True, False, False, True]
    assert all(value.isfinite().all() for value in tiny.weights(module).values())
    names = ("discriminator", "generator")
    counts = [tuple(logged[f"train/skipped_steps/{name}"] for name in names) for logged in probe.logged]
    assert counts == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 2)]
    assert [logged["train/loss_scale"] for logged in probe.logged] == [1024, 512, 256, 128, 128]
    assert probe.steps == [1, 2, 3, 4, 5], "skipped float16 steps still count in global_step"


def test_an_overflow_of_the_discriminator_leaves_the_generators_gradients_as_float32_has_them(tmp_path):
    """The discriminator stays where it was, so the generator must meet the one of a run at rate zero."""
    still = functools.partial(torch.optim.Adam, lr=0.0)
    full = run(tmp_path, module=tiny.gan(discriminator_optimizer=still))
    half = run(tmp_path, Overflows(discriminator=[0]), MixedPrecision(), plugins=float16())
    for x, y in zip(full.grads[1], half.grads[1], strict=True):
        torch.testing.assert_close(y, x, rtol=0.02, atol=0.01 * float(x.abs().max()))


def test_skipped_steps_are_counted_in_automatic_optimization_too(tmp_path):
    probe = run(tmp_path, Overflows(encoder=[1]), MixedPrecision(), module=tiny.vae(), max_steps=3, plugins=float16())
    assert [logged["train/skipped_steps/vae"] for logged in probe.logged] == [0, 1, 1]
    assert probe.steps == [1, 2, 3]


class Sometimes(type(tiny.vae())):
    """Returns no loss for the first batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx else None


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_batch_without_a_loss_is_no_skipped_step(tmp_path, fused):
    torch.manual_seed(0)
    built = tiny.vae(optimizer=functools.partial(torch.optim.Adam, lr=1e-3, fused=fused))
    built.__class__ = Sometimes
    probe = run(tmp_path, MixedPrecision(), module=built, max_steps=2, plugins=float16())
    assert probe.logged[-1]["train/skipped_steps/vae"] == 0
    assert any(not torch.equal(value, probe.weights[0][key]) for key, value in probe.weights[-1].items())


def test_it_logs_on_the_steps_that_are_logged_and_not_at_all_if_told_so_or_without_a_scaler(tmp_path):
    some = run(tmp_path, MixedPrecision(), max_steps=4, log_every_n_steps=2, plugins=float16())
    assert [bool(logged) for logged in some.logged] == [False, True, True, True]  # metrics stay until they change
    for callback, options in ((MixedPrecision(log_scale=False), {"plugins": float16()}), (MixedPrecision(), {})):
        assert run(tmp_path, callback, **options).logged == [{}]


# a floor under the scale


def test_training_stops_when_the_scale_falls_below_the_floor_and_says_whose_steps_overflow(tmp_path):
    callbacks = [Overflows(discriminator=[*range(1, 9)], generator=[1]), MixedPrecision(min_scale=200.0)]
    message = (
        r"loss scale must stay at or above min_scale=200, but fell to 128 at step 3: .* lately those of discriminator"
        r"\. Skipped steps so far: discriminator 2, generator 1\. Use Trainer\(precision='bf16-mixed'\)"
    )
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, *callbacks, max_steps=9, plugins=float16())


def test_the_floor_holds_between_logged_steps_too_and_zero_is_none(tmp_path):
    overflow = Overflows(discriminator=[*range(20)])
    options = {"max_steps": 12, "log_every_n_steps": 1000}
    with pytest.raises(RuntimeError, match=r"fell to 0\.00097.* at step 10"):
        run(tmp_path, overflow, MixedPrecision(log_scale=False), plugins=float16(1.0), **options)
    run(tmp_path, overflow, MixedPrecision(min_scale=0.0), plugins=float16(1.0), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"min_scale": -1.0}, "min_scale must be at least 0, got -1"), ({"matmul_precision": "low"}, "got 'low'")],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"MixedPrecision: .*{message}"):
        MixedPrecision(**arguments)


# resuming, and the command line


@pytest.mark.parametrize("build", [tiny.gan, tiny.vae])
def test_a_resumed_run_and_its_counts_are_those_of_an_uninterrupted_one_bit_for_bit(tmp_path, build):
    part = "generator" if build is tiny.gan else "encoder"

    def train(module, **options):
        watch = MixedPrecision([part])
        callbacks = [Overflows(**{part: [1, 3]}), GradientClipping(max_norm=0.5), watch]
        if options.get("max_steps") == 3:
            callbacks.append(Checkpoint(dirpath=str(tmp_path)))
        run(tmp_path, *callbacks, module=module, plugins=float16(growth_interval=2), log_every_n_steps=50, **options)
        return tiny.weights(module), watch.state_dict()

    weights, counts = train(build(), max_steps=5)
    train(build(), max_steps=3)
    again, recounted = train(build(seed=9), max_steps=5, ckpt_path=tmp_path / "last.ckpt")
    tiny.assert_same(again, weights)
    assert counts == recounted
    assert sum(counts["skipped_steps"].values()) == 2


def test_it_is_built_from_yaml_and_shown_by_print_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"float32_modules": ["*.layers.0"], "matmul_precision": "medium", "log_scale": False, "min_scale": 4.0}
    callback = {"class_path": "lit_generative.callbacks.mixed_precision.MixedPrecision", "init_args": options}
    Path("amp.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    files = ["--config", str(CONFIGS / "vae/vae_digits.yaml"), "--config", "amp.yaml"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *files, "--print_config"])
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]["init_args"] == options
