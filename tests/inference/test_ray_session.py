"""What a command does around ray: a token, a folder of its own, nothing on the screen. Ray itself is not started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metr.inference import ray_session
from metr.inference.ray_session import _require_token, _session_folder, _without_native_messages

WRITER = "import sys, time; file = open(sys.argv[1], 'w'); print('open', flush=True); time.sleep(600)"


def test_sessions_of_killed_commands_are_cleared_with_those_who_still_write_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session, "_SHORT", tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, ours = tmp_path / f"metr-ray-{ended.pid}-abc", tmp_path / f"metr-ray-{os.getpid()}-abc"
    others = tmp_path / "metr-ray-notes-1"
    for folder in (left, ours, others):
        folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", WRITER, left / "log"], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open\n"
        fresh = _session_folder()
        assert writer.wait(timeout=30) < 0
    assert sorted(tmp_path.iterdir()) == sorted([ours, others, fresh])
    # sockets of ray below it have paths of at most 107 characters
    assert len(fresh.relative_to(tmp_path).as_posix()) < 40


def test_a_random_token_keeps_others_out_unless_there_are_rules_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)
    assert environment_after(monkeypatch, {}) == {}, "ray reads it when it is imported"
    monkeypatch.delitem(sys.modules, "ray")
    for rule in ({"RAY_ADDRESS": "auto"}, {"RAY_AUTH_MODE": "disabled"}):
        assert environment_after(monkeypatch, rule) == rule
    first, second = (environment_after(monkeypatch, {}) for _ in range(2))
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def environment_after(monkeypatch: pytest.MonkeyPatch, before: dict[str, str]) -> dict[str, str]:
    environment = dict(before)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", environment)
        _require_token()
    return environment


def test_native_messages_are_kept_off_the_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with _without_native_messages():
            os.write(2, b"native\n")
            raise ValueError("python")

    with pytest.raises(ValueError, match="python"):
        fails()
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "later\n"
