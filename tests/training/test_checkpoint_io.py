import os
import pickle
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lit_generative.training.checkpoint_io import SafeCheckpointIO, load_checkpoint
from tests.tiny import assert_same

STATE = {"state_dict": {"weight": torch.arange(600.0).reshape(20, 30)}, "global_step": 7, "names": ["a", None, True]}


@pytest.fixture
def path(tmp_path):
    SafeCheckpointIO().save_checkpoint(STATE, tmp_path / "runs" / "last.ckpt")
    return tmp_path / "runs" / "last.ckpt"


def _refusal(path, error=ValueError) -> str:
    """The one line that says why ``path`` was refused, by the function and by the plugin."""
    with pytest.raises(error) as info:
        load_checkpoint(path)
    with pytest.raises(error):
        SafeCheckpointIO().load_checkpoint(path)
    message = str(info.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_what_is_saved_is_loaded_and_nothing_else_is_left(path):
    for loaded in (load_checkpoint(path), SafeCheckpointIO().load_checkpoint(path), load_checkpoint(str(path))):
        assert_same(loaded["state_dict"], STATE["state_dict"])
        assert (loaded["global_step"], loaded["names"]) == (7, ["a", None, True])
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_map_location_moves_the_weights(path):
    assert load_checkpoint(path, map_location="meta")["state_dict"]["weight"].device.type == "meta"


def test_a_second_save_replaces_the_first(path):
    SafeCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 8}, path)
    assert load_checkpoint(path)["global_step"] == 8
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_checkpoint_has_the_permissions_of_any_new_file(path):
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] unexpected pos"), OSError(28, "No space left on device")]
)
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(path, monkeypatch, error):
    def fail(checkpoint, file):
        file.write(b"half of a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"last.ckpt could not be written \(\d+ MiB free there\).*untouched") as info:
        SafeCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    assert info.value.__cause__ is error
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert load_checkpoint(path)["global_step"] == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt, pickle.PicklingError])
def test_any_other_interruption_of_a_save_leaves_the_earlier_file_and_nothing_else(path, monkeypatch, error):
    def fail(checkpoint, file):
        file.write(b"half of a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(error):
        SafeCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert load_checkpoint(path)["global_step"] == 7


def test_a_kill_in_the_middle_of_a_save_leaves_the_earlier_file_and_the_next_save_sweeps_up(path, monkeypatch):
    def die(checkpoint, file):
        file.write(b"half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(torch, "save", die)
        SafeCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(os.listdir(path.parent)) == 2
    assert load_checkpoint(path)["global_step"] == 7
    SafeCheckpointIO().save_checkpoint(STATE, path)
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_leftovers_of_a_dead_process_are_swept_and_those_of_a_live_one_or_another_file_are_not(path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, other, foreign = (
        path.parent / name
        for name in (f".last.ckpt.{os.getpid()}.x.tmp", f".best.ckpt.{dead.pid}.x.tmp", ".last.ckpt.notes.tmp")
    )
    orphan = path.parent / f".last.ckpt.{dead.pid}.x.tmp"
    for file in (mine, other, foreign, orphan):
        file.write_text("half")
    SafeCheckpointIO().save_checkpoint(STATE, path)
    assert not orphan.exists()
    assert mine.exists()
    assert other.exists()
    assert foreign.exists()


def test_leftovers_of_a_process_of_another_user_are_not_swept(path, monkeypatch):
    def forbidden(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    theirs = path.parent / ".last.ckpt.1.x.tmp"
    theirs.write_text("half")
    SafeCheckpointIO().save_checkpoint(STATE, path)
    assert theirs.exists()


def test_storage_options_are_refused(path):
    with pytest.raises(TypeError, match="takes no storage_options: it writes to local folders"):
        SafeCheckpointIO().save_checkpoint(STATE, path, storage_options={})


def test_a_missing_file_names_the_checkpoints_beside_it(path):
    message = _refusal(path.with_name("lost.ckpt"), FileNotFoundError)
    assert message == f"There is no checkpoint {path.with_name('lost.ckpt')}. There are: {path}."


def test_a_missing_file_in_a_missing_folder_is_a_readable_error(tmp_path):
    assert _refusal(tmp_path / "no" / "last.ckpt", FileNotFoundError).endswith("last.ckpt.")


def test_a_folder_is_no_checkpoint(tmp_path):
    _refusal(tmp_path, FileNotFoundError)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert f"is not a complete checkpoint ({int(share * len(content))} bytes)" in _refusal(path)


def test_text_is_refused(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is not a complete checkpoint" in _refusal(path)


def test_one_flipped_bit_in_a_weight_is_found(path):
    content = bytearray(path.read_bytes())
    at = content.index(STATE["state_dict"]["weight"].numpy().tobytes()) + 1001
    content[at] ^= 1
    path.write_bytes(content)
    assert "is damaged: the checksum of" in _refusal(path)


def test_a_flipped_byte_anywhere_is_harmless_or_a_readable_error(path):
    content = path.read_bytes()
    draw = random.Random(0)
    # The tail holds the archive's table of contents, where an error has the most ways to show.
    positions = draw.sample(range(len(content)), 100) + list(range(len(content) - 700, len(content), 3))
    wrong = {}
    for at in positions:
        damaged = bytearray(content)
        damaged[at] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        if outcome := _outcome(path):
            wrong[at] = outcome
    assert wrong == {}


def _outcome(path) -> str | None:
    """What is wrong with how ``path`` is read: an unreadable error, or other weights."""
    try:
        loaded = load_checkpoint(path)
    except ValueError as error:
        return None if str(path) in str(error) else f"does not name the file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if torch.equal(loaded["state_dict"]["weight"], STATE["state_dict"]["weight"]) else "other weights"


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_code_in_a_checkpoint_is_refused_and_does_not_run(path):
    victim = path.parent / "victim"
    torch.save({"state_dict": {}, "extra": _Payload(victim)}, path)
    assert "it could run code" in _refusal(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists()  # the payload works where nobody looks


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, [1, 2], torch.zeros(3)])
def test_weights_without_a_state_dict_are_refused(path, content):
    torch.save(content, path)
    assert "holds weights, not a training checkpoint" in _refusal(path)


def test_another_zip_archive_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    _refusal(path)


def test_weights_that_processes_hand_back_are_read_and_checked_as_safely(path):
    handed = path.with_name(".temp.ckpt")
    torch.save(STATE["state_dict"], handed)
    assert_same(SafeCheckpointIO().load_checkpoint(handed), STATE["state_dict"])
    torch.save({"weight": random.Random()}, handed)
    with pytest.raises(ValueError, match="holds Python objects beside tensors"):
        SafeCheckpointIO().load_checkpoint(handed)
