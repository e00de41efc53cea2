import copy

import pytest
import torch
from torch import nn

from lit_generative.finetune.base_weights import LeavesBaseOut, fingerprint
from tests import tiny


class Holder(LeavesBaseOut):
    """A frozen linear layer and batch norm below a trained head with a batch norm of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.num_left_out = self.leave_base_out("the folder")


HEAD = ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]
STATISTICS = ["head.1.running_mean", "head.1.running_var", "head.1.num_batches_tracked"]


def test_only_what_is_trained_and_its_buffers_are_in_the_state_dict():
    holder = Holder()
    assert sorted(holder.state_dict()) == sorted(["_extra_state", *HEAD, *STATISTICS])
    assert holder.num_left_out == 12 + 4 + 4 + 4 + 4 + 4 + 1
    assert sorted(holder.base.state_dict()) == sorted(
        dict(holder.base.named_parameters()) | dict(holder.base.named_buffers())
    )


@pytest.mark.parametrize("outer", [False, True])
def test_it_loads_strictly_and_the_base_stays(outer):
    def build(seed):
        return nn.ModuleDict({"part": Holder(seed)}) if outer else Holder(seed)

    one, two = build(0), build(0)
    for p in one.parameters():
        p.data += p.requires_grad
    two.load_state_dict(one.state_dict())
    tiny.assert_same(dict(two.named_parameters()), dict(one.named_parameters()))


def test_a_copy_leaves_the_same_out():
    holder = Holder()
    twin = copy.deepcopy(holder)
    twin.head[0].weight.data += 1
    assert twin.state_dict().keys() == holder.state_dict().keys()
    holder.load_state_dict(twin.state_dict())
    tiny.assert_same(holder.head[0].weight, twin.head[0].weight)


def test_weights_of_another_base_are_refused():
    with pytest.raises(ValueError, match="Holder: these weights were trained on top of others than the folder holds"):
        Holder(1).load_state_dict(Holder(0).state_dict())


def test_what_is_missing_of_the_trained_is_still_an_error():
    state = Holder().state_dict()
    del state["head.0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.0\.bias"):
        Holder().load_state_dict(state)


def test_a_module_that_has_not_decided_leaves_nothing_out():
    class Undecided(LeavesBaseOut):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(2, 3).requires_grad_(False)

    one, two = Undecided(), Undecided()
    two.load_state_dict(one.state_dict())
    tiny.assert_same(two.base.weight, one.base.weight)


def test_a_fingerprint_tells_names_shapes_and_values_and_survives_bfloat16():
    state = {"a": torch.randn(5, 7), "b": torch.randn(3)}
    first = fingerprint(state)
    assert (first.shape, first.dtype) == ((32,), torch.uint8)
    torch.testing.assert_close(fingerprint({k: v.bfloat16() for k, v in reversed(state.items())}), first)
    for other in (
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].T, "b": state["b"]},
        {"a": state["a"], "b": state["b"] + 1},
    ):
        assert not torch.equal(fingerprint(other), first)


def test_quantized_weights_are_passed_by():
    state = {"a": torch.randn(5)}
    assert torch.equal(fingerprint(state | {"packed": torch.zeros(4, dtype=torch.uint8)}), fingerprint(state))
