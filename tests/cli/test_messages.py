import sys

import pytest

from lit_generative.cli.messages import OFFLINE, report, wandb_errors


def test_an_error_is_printed_as_one_line(capsys):
    assert report(ValueError("wrong"), code=3) == 3
    assert capsys.readouterr().err == "litgen: error: wrong\n"


def test_the_frames_are_shown_on_request(monkeypatch):
    monkeypatch.setenv("LITGEN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        report(ValueError("wrong"))


def test_an_error_of_wandb_comes_with_what_to_do(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb.errors.errors", raising=False)
    assert wandb_errors() == ()
    from wandb.errors.errors import UsageError

    monkeypatch.setitem(sys.modules, "wandb.errors.errors", sys.modules[UsageError.__module__])
    assert issubclass(UsageError, wandb_errors())
    report(UsageError("No API key."), hint=OFFLINE)
    assert capsys.readouterr().err.startswith("litgen: error: No API key. W&B: set WANDB_MODE=offline")
