import json
import math

import pytest
import torch

from lit_generative.training.lr_schedules import (
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupPlateau,
    WarmupSchedule,
)

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


# the plateau


def _plateau(optimizer=None, **options) -> WarmupPlateau:
    return WarmupPlateau(
        optimizer or _optimizer(1.0), **({"monitor": "val/fid", "factor": 0.5, "patience": 0} | options)
    )


def _observed(schedule: WarmupPlateau, scores: list[float]) -> list[float]:
    """The rate after each score."""
    rates = []
    for score in scores:
        schedule.observe(score)
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [group["lr"] for group in schedule.optimizer.param_groups]
    return rates


def test_warmup_and_plateau_give_the_rates_computed_by_hand():
    schedule = _plateau(_optimizer(0.8), warmup_steps=3, patience=1)
    assert _rates(schedule, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    # 5 is the best, one worse is let pass, the second lowers; 4 is better; then two more
    assert _observed(schedule, [5, 6, 5, 4, 7, 4]) == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.4, 0.2])
    assert _rates(schedule, 3) == pytest.approx([0.2, 0.2, 0.2])


def test_scores_count_for_nothing_while_warming_up():
    schedule = _plateau(warmup_steps=2)
    before = schedule.state_dict()["plateau"]
    for _ in range(2):
        assert _observed(schedule, [1, 9, 9]) == [schedule.optimizer.param_groups[0]["lr"]] * 3
        _rates(schedule, 1)
    assert before == {"best": None, "bad": 0, "cooling": 0, "scale": 1.0}
    # If the 1 of the warm-up were remembered, 8 would be no improvement.
    assert _observed(schedule, [8, 7, 7]) == pytest.approx([1.0, 1.0, 0.5])


@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("patience", [0, 3])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_without_warmup_it_does_what_torchs_plateau_does(mode, patience, cooldown, threshold):
    options = {"mode": mode, "factor": 0.7, "patience": patience, "cooldown": cooldown, "threshold": threshold}
    scores = (torch.rand(60, generator=torch.Generator().manual_seed(patience)) + 1).tolist()
    scores[30] = math.nan
    optimizer = _optimizer(0.5, 0.001, 0.1)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=0.01, eps=0.0, **options)
    ours = _plateau(_optimizer(0.5, 0.001, 0.1), min_lr=0.01, **options)
    for score in scores:
        torchs.step(score)
        ours.observe(score)
        assert ours.get_last_lr() == pytest.approx(torchs.get_last_lr())
    assert ours.get_last_lr()[0] < 0.5


def test_improvement_is_measured_against_the_size_of_the_best_also_below_zero():
    # -10 again is no improvement, -10.5 is less than a tenth better, -12 is more.
    assert _observed(_plateau(threshold=0.1), [-10, -10, -10.5, -12]) == [1.0, 0.5, 0.25, 0.25]
    assert _observed(_plateau(threshold=0.1, mode="max"), [-10, -9.5, -8]) == [1.0, 0.5, 0.5]


def test_a_first_score_that_is_no_number_does_not_become_the_best():
    assert _observed(_plateau(patience=1), [math.nan, 3, 4, 4]) == [1.0, 1.0, 1.0, 0.5]


def _restored(schedule: WarmupPlateau, **changes) -> WarmupPlateau:
    names = ("monitor", "warmup_steps", "mode", "factor", "patience", "threshold", "cooldown", "min_lr")
    optimizer = _optimizer(*schedule.base_lrs)
    resumed = WarmupPlateau(optimizer, **({name: getattr(schedule, name) for name in names} | changes))
    optimizer.load_state_dict(schedule.optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    return resumed


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("seen", [1, 2, 3, 4, 5])
def test_a_resumed_plateau_goes_on_with_the_same_rates(updates, seen):
    schedule = _plateau(_optimizer(0.5, 0.2), warmup_steps=2, patience=1, cooldown=1)
    _rates(schedule, updates)
    _observed(schedule, [3, 4, 5, 6, 7][:seen])
    resumed = _restored(schedule)
    assert resumed.get_last_lr() == schedule.get_last_lr()
    later = [8, 9, 1, 9, 9]
    assert _observed(resumed, later) == _observed(schedule, later)
    assert resumed.state_dict() == schedule.state_dict()
    assert _rates(resumed, 3) == _rates(schedule, 3)


def test_changed_settings_win_over_the_state_but_lowered_rates_stay_lowered():
    schedule = _plateau(patience=1)
    _observed(schedule, [3, 4, 5])  # lowered once
    changed = _restored(schedule, factor=0.1, patience=0, min_lr=0.2)
    assert changed.get_last_lr() == [0.5]
    assert _observed(changed, [5, 5]) == [0.2, 0.2]


@pytest.mark.parametrize("change", [{"monitor": "val/kid"}, {"mode": "max"}])
def test_the_best_of_another_score_is_forgotten(change):
    schedule = _plateau()
    _observed(schedule, [3, 4])
    changed = _restored(schedule, **change)
    # The first score of its own is the best, whatever it is; and the rate stays where it was.
    assert _observed(changed, [100]) == [0.5]
    assert changed.state_dict()["plateau"] == {"best": 100.0, "bad": 0, "cooling": 0, "scale": 0.5}


def test_the_state_of_a_plateau_is_plain_data():
    schedule = _plateau()
    _observed(schedule, [torch.tensor(3.0), 4])
    assert json.loads(json.dumps(schedule.state_dict())) == schedule.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"patience": -2}, "patience must be at least 0, got -2"),
        ({"threshold": -0.1}, "threshold must be at least 0, got -0.1"),
        ({"cooldown": -1}, "cooldown must be at least 0, got -1"),
        ({"min_lr": -1e-5}, "min_lr must be at least 0, got -1e-05"),
        ({"factor": 1.0}, "factor must lie between 0 and 1, got 1.0"),
        ({"factor": 0.0}, "factor must lie between 0 and 1, got 0.0"),
        ({"mode": "least"}, "mode must be 'min' or 'max', got 'least'"),
    ],
)
def test_impossible_settings_of_a_plateau_are_refused(options, message):
    with pytest.raises(ValueError, match=f"WarmupPlateau: {message}"):
        _plateau(**options)
