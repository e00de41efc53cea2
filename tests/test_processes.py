"""Forked processes know their rank and where they are; one that fails is told of, and ends the other."""

from __future__ import annotations

import time

import pytest

from tests import processes


def test_each_has_its_rank_folder_arguments_and_environment(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, sys\nopen(os.environ['LOCAL_RANK'], 'w').write(f'{sys.argv[1]} {os.environ[\"MORE\"]}')"
    )
    processes.run(tmp_path / "script.py", "argument", cwd=tmp_path, env={"MORE": "more"})
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["argument more"] * 2


@pytest.mark.parametrize("ending", ["raise ValueError('broken')", "print('broken'); sys.exit('3')"])
def test_a_failure_ends_the_other_and_shows_what_was_printed(tmp_path, ending):
    (tmp_path / "script.py").write_text(
        f"import os, sys, time\nif os.environ['LOCAL_RANK'] == '1':\n    {ending}\ntime.sleep(100)"
    )
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)script\.py ended with .*broken"):
        processes.run(tmp_path / "script.py")
    assert time.monotonic() - start < 60
