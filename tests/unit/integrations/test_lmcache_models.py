"""The identity of a model is found once, and never on the thread that asks for a task."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hicache_core.integrations.foreign.identity import model_identity
from hicache_core.integrations.lmcache.models import Models

MODULE = "hicache_core.integrations.lmcache.models"


def test_tasks_wait_on_another_thread_until_their_model_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_end, asked, ran = threading.Event(), [], []
    done = threading.Semaphore(0)

    def slowly(name: str) -> str:
        asked.append(name)
        assert may_end.wait(20)
        return name.upper()

    def task() -> None:
        ran.append((models.identity("a"), threading.current_thread().name.split("_")[0]))
        done.release()

    monkeypatch.setattr(f"{MODULE}.model_identity", slowly)
    models = Models()
    models.run(["a"], task)
    models.run(["a"], task)
    assert ran == []
    may_end.set()
    for _ in range(2):
        assert done.acquire(timeout=20)
    models.run(["a"], task)
    here = threading.current_thread().name.split("_")[0]
    assert ran == [("A", "hicache-models")] * 2 + [("A", here)]
    assert asked == ["a"]
    models.close()


def test_a_model_that_cannot_be_read_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(100))
    assert Models().identity(str(tmp_path)) == model_identity(str(tmp_path))

    def unreadable(_: str) -> str:
        raise PermissionError

    monkeypatch.setattr(f"{MODULE}.model_identity", unreadable)
    assert Models().identity("/a/model") == "name:/a/model"
