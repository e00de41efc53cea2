import math

import pytest
import torch

from lit_generative.training.lr_schedules import WarmupConstant, WarmupCosine, WarmupLinear, WarmupSchedule

ALL = [WarmupConstant, WarmupLinear, WarmupCosine]


def _optimizer(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def _rates(schedule: WarmupSchedule, num: int) -> list[float]:
    """The rates of the next ``num`` updates."""
    rates = []
    for _ in range(num):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("cls", "factors"),
    [
        # two warm-up steps: 1/3 and 2/3; progress of steps 2 .. 6 is 0, 1/4, 1/2, 3/4, 1
        (WarmupConstant, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        (WarmupLinear, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0, 0]),
        (WarmupCosine, [1 / 3, 2 / 3, 1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5), 0, 0]),
    ],
)
def test_rates_are_those_computed_by_hand_also_after_total_steps(cls, factors):
    assert _rates(cls(_optimizer(0.3), warmup_steps=2, total_steps=6), 8) == pytest.approx([0.3 * f for f in factors])


def test_the_cosine_is_torchs_where_there_is_no_warmup():
    ours = _rates(WarmupCosine(_optimizer(0.2), warmup_steps=0, total_steps=7), 8)
    theirs = _rates(torch.optim.lr_scheduler.CosineAnnealingLR(_optimizer(0.2), T_max=7), 8)
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("cls", ALL)
def test_the_first_update_is_never_wasted_and_the_rate_rises_to_its_full_value(cls):
    rates = _rates(cls(_optimizer(1.0), warmup_steps=4, total_steps=9), 5)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("cls", ALL)
def test_the_rate_never_rises_after_the_warmup(cls):
    rates = _rates(cls(_optimizer(1.0), warmup_steps=3, total_steps=11), 20)[3:]
    assert rates == sorted(rates, reverse=True)


def test_each_parameter_group_keeps_its_own_rate():
    schedule = WarmupLinear(_optimizer(0.4, 0.1), warmup_steps=0, total_steps=4)
    _rates(schedule, 1)
    assert [group["lr"] for group in schedule.optimizer.param_groups] == pytest.approx([0.3, 0.075])


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(-1, 5), (5, 5), (6, 5), (0, 0)])
@pytest.mark.parametrize("cls", ALL)
def test_impossible_lengths_are_refused(cls, warmup_steps, total_steps):
    got = f"got warmup_steps={warmup_steps}, total_steps={total_steps}"
    match = f"{cls.__name__}: need 0 <= warmup_steps < total_steps, {got}"
    with pytest.raises(ValueError, match=match):
        cls(_optimizer(1.0), warmup_steps, total_steps)


def _resume(schedule: WarmupSchedule, total_steps: int) -> WarmupSchedule:
    """As the Trainer does: everything is built anew, then both states are loaded."""
    optimizer = _optimizer(0.5)
    resumed = type(schedule)(optimizer, schedule.warmup_steps, total_steps)
    optimizer.load_state_dict(schedule.optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    return resumed


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("cls", ALL)
def test_a_resumed_schedule_goes_on_with_the_same_rates(cls, steps):
    schedule = cls(_optimizer(0.5), warmup_steps=2, total_steps=8)
    _rates(schedule, steps)
    resumed = _resume(schedule, total_steps=8)
    assert _rates(resumed, 6) == _rates(schedule, 6)


@pytest.mark.parametrize("cls", ALL)
def test_a_resumed_schedule_reports_the_rate_it_was_left_with(cls):
    schedule = cls(_optimizer(0.5), warmup_steps=2, total_steps=8)
    _rates(schedule, 4)
    assert _resume(schedule, total_steps=8).get_last_lr() == schedule.get_last_lr()


def test_a_longer_total_steps_wins_over_the_state_that_is_loaded():
    schedule = WarmupLinear(_optimizer(0.5), warmup_steps=0, total_steps=4)
    _rates(schedule, 3)
    longer = _resume(schedule, total_steps=10)
    _rates(longer, 1)
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.6)
