import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lit_generative.training.averages import (
    LiveWeights,
    averaged_modules,
    check_strategy,
    images_in,
    replicas,
)
from tests import tiny


class Net(nn.Module):
    """Tied weights, and every kind of buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3, dtype=dtype), nn.Linear(2, 3, bias=False, dtype=dtype)
        self.b.weight = self.a.weight
        self.register_buffer("mean", torch.ones(3, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def _whole_module() -> nn.Module:
    return nn.ModuleDict({"net": Net(), "other": nn.Linear(1, 1)})


def test_parameters_are_followed_and_floating_buffers_of_the_state_dict_if_asked():
    module = _whole_module()
    assert list(LiveWeights(module, ["net"], buffers=False).tensors) == ["net.a.weight", "net.a.bias"]
    assert set(LiveWeights(module, ["net"], buffers=True).tensors) == {"net.mean", "net.a.weight", "net.a.bias"}
    assert set(LiveWeights(module, [""], buffers=False, only=["other.bias"]).tensors) == {"other.bias"}


def test_tied_weights_are_followed_once_and_stored_under_each_name():
    live = LiveWeights(_whole_module(), ["net"], buffers=False)
    stored = live.whole(live.copies())
    assert stored["net.b.weight"] is stored["net.a.weight"]
    live.check("Test", stored, "`modules`")


@pytest.mark.parametrize("change", [{"net.extra": torch.zeros(1)}, {"net.a.bias": None}])
def test_averages_of_other_tensors_are_refused(change):
    live = LiveWeights(_whole_module(), ["net"], buffers=False)
    saved = {key: value for key, value in (live.copies() | change).items() if value is not None}
    with pytest.raises(ValueError, match=r"Test: the checkpoint's average holds other weights .* Use the `modules` it"):
        live.check("Test", saved, "`modules`")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_copies_are_float32_at_least_and_do_not_share_memory(dtype):
    module = Net(dtype)
    live = LiveWeights(module, [""], buffers=True)
    copies = live.copies()
    assert {copy.dtype for copy in copies.values()} == {torch.promote_types(dtype, torch.float32)}
    assert {now.dtype for now in live.now()} == {copy.dtype for copy in copies.values()}
    before = {name: copy.clone() for name, copy in copies.items()}
    with torch.no_grad():
        module.a.weight.add_(1)
    tiny.assert_same(copies, before)
    torch.testing.assert_close(live.now()[list(copies).index("a.weight")], (before["a.weight"] + 1), rtol=1e-2, atol=0)


def test_the_live_tensors_are_not_copied_where_they_need_no_cast():
    module = Net()
    live = LiveWeights(module, [""], buffers=False)
    live.copies()
    assert live.now()[0] is module.a.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exchange_is_undone_by_the_next_bit_for_bit(dtype):
    module = Net(dtype)
    live = LiveWeights(module, [""], buffers=True)
    copies, weights = live.copies(), tiny.weights(module)
    for copy in copies.values():
        copy.add_(1 / 3)
    averages = {name: copy.clone() for name, copy in copies.items()}
    kept: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        live.exchange(copies, kept)
        for name, value in averages.items():
            torch.testing.assert_close(module.state_dict()[name], value.to(dtype), rtol=0, atol=0)
        live.exchange(copies, kept)
    assert not kept
    tiny.assert_same(tiny.weights(module), weights)
    tiny.assert_same(copies, averages)


def test_copies_can_live_on_another_device_than_the_weights():
    module = Net()
    live = LiveWeights(module, [""], buffers=False, device="meta")
    assert {copy.device.type for copy in live.copies().values()} == {"meta"}
    assert {now.device.type for now in live.now()} == {"meta"}


def test_an_optimizer_updates_the_weights_it_owns():
    module = _whole_module()
    live = LiveWeights(module, ["net"], buffers=False)
    assert live.updated_by(torch.optim.SGD(module["net"].parameters(), lr=1))
    assert not live.updated_by(torch.optim.SGD(module["other"].parameters(), lr=1))


def test_modules_are_those_named_or_those_the_module_names():
    assert averaged_modules("Test", tiny.gan(), None) == ["generator"]
    assert averaged_modules("Test", tiny.gan(), ["generator.layers"]) == ["generator.layers"]


def test_fsdp1_is_refused_with_what_to_use():
    trainer = L.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.__class__ = FSDPStrategy  # it cannot be built without an accelerator
    with pytest.raises(ValueError, match=r"Test: FSDPStrategy hides the weights .* Use ddp, or ModelParallelStrategy"):
        check_strategy("Test", trainer)


@pytest.mark.parametrize("batch", [torch.zeros(5, 2), [torch.zeros(5, 2)], ({"a": torch.zeros(5)},)])
def test_images_are_counted_whatever_the_batchs_form(batch):
    assert images_in(batch) == 5


def test_one_process_sees_all_batches():
    assert replicas(L.Trainer(accelerator="cpu", devices=1, logger=False)) == 1
    assert replicas(L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)) == 2
