from functools import partial

import pytest
import torch
from torch import nn

from lit_generative.training.parameter_groups import RateScale, build_optimizer


def net():
    return nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 4), "c": nn.Linear(4, 5)})


def built(module, scales, parameters=None):
    return build_optimizer(
        module, "net", parameters or module.parameters(), partial(torch.optim.SGD, lr=0.1), scales
    ).param_groups


def test_without_factors_there_is_one_group():
    module = net()
    module["b"].requires_grad_(False)
    (group,) = built(module, [])
    assert group["name"] == "net"
    assert group["lr"] == 0.1
    assert [id(p) for p in group["params"]] == [id(p) for part in "ac" for p in module[part].parameters()]


def test_each_factor_makes_a_group_and_the_first_that_names_a_parameter_counts():
    module = net()
    groups = built(module, [RateScale(("b", "c.bias"), 0.5), RateScale(("c",), 0.25)])
    assert [group["name"] for group in groups] == ["net", "net-1", "net-2"]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.05, 0.025])
    assert [len(group["params"]) for group in groups] == [2, 3, 1]
    assert groups[2]["params"][0] is module["c"].weight


def test_a_group_without_parameters_is_left_out():
    module = net()
    (group,) = built(module, [RateScale(("b",), 0.5)], list(module["b"].parameters()))
    assert (group["name"], group["lr"]) == ("net", 0.05)
    (group,) = built(module, [RateScale(("b",), 0.5)], list(module["a"].parameters()))
    assert (group["name"], group["lr"]) == ("net", 0.1)


def test_schedules_scale_each_group_from_its_own_rate():
    module = net()
    optimizer = build_optimizer(
        module, "net", module.parameters(), partial(torch.optim.SGD, lr=0.1), [RateScale(("b",), 0.5)]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.005])


def test_a_pattern_of_nothing_is_refused():
    with pytest.raises(ValueError, match="'d'"):
        built(net(), [RateScale(("d",), 0.5)])
