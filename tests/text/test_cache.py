"""The embedding cache: it may lose time, never an answer."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from metr.text.cache import EmbeddingCache, cache_root

PHRASES = ["cat", "dog", "red blood cell"]


def vectors_of(phrases: list[str]) -> torch.Tensor:
    return torch.stack([torch.full((4,), float(len(phrase))) for phrase in phrases])


def filled(root: Path, identity: str = "model") -> EmbeddingCache:
    cache = EmbeddingCache(identity, root)
    cache.put(PHRASES, vectors_of(PHRASES))
    return cache


def test_another_process_finds_what_was_kept(tmp_path: Path) -> None:
    filled(tmp_path)
    found = EmbeddingCache("model", tmp_path).get(["dog", "ant", "cat"])
    assert found.keys() == {"dog", "cat"}
    assert torch.equal(found["dog"], vectors_of(["dog"])[0])
    assert list(tmp_path.rglob("*.part")) == []


def test_encoders_do_not_meet(tmp_path: Path) -> None:
    filled(tmp_path)
    assert EmbeddingCache("another model", tmp_path).get(PHRASES) == {}


def test_thousands_of_names_are_one_file(tmp_path: Path) -> None:
    phrases = [f"name {index}" for index in range(5000)]
    EmbeddingCache("model", tmp_path).put(phrases, torch.rand(5000, 8))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert len(EmbeddingCache("model", tmp_path).get(phrases)) == 5000


@pytest.mark.parametrize("damage", [b"", b"not a tensor", None])
def test_a_damaged_file_is_embedded_again(tmp_path: Path, damage: bytes | None) -> None:
    filled(tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    data = file.read_bytes()
    # A flipped bit of the last number is still a valid file, with a wrong embedding.
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage is None else damage)
    cache = EmbeddingCache("model", tmp_path)
    assert cache.get(PHRASES) == {}
    cache.put(PHRASES, vectors_of(PHRASES))
    assert EmbeddingCache("model", tmp_path).get(PHRASES).keys() == set(PHRASES)


def test_an_unwritable_folder_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        cache = filled(blocked)
        cache.put(["ant"], vectors_of(["ant"]))
    assert cache.get([*PHRASES, "ant"]).keys() == {*PHRASES, "ant"}
    assert len(caplog.records) == 1
    assert "METR_CACHE" in caplog.text


def test_a_vocabulary_is_one_file_and_its_phrases_are_found_in_any(tmp_path: Path) -> None:
    cache = EmbeddingCache("model", tmp_path)
    phrases = [f"name {index}" for index in range(100)]
    for start in range(0, 100, 10):
        cache.put(phrases[start : start + 10], torch.rand(10, 4))
    for _ in range(2):  # the same again is the same file
        cache.put(phrases[:20], torch.stack([cache.get([phrase])[phrase] for phrase in phrases[:20]]))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 11
    again = EmbeddingCache("model", tmp_path).get(phrases)
    assert again.keys() == set(phrases)
    assert all(torch.equal(again[phrase], vector) for phrase, vector in cache.get(phrases).items())


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    def work(worker: int) -> None:
        cache = EmbeddingCache("model", tmp_path)
        for index in range(50):
            phrase = f"{worker} {index}"
            cache.put([phrase], vectors_of([phrase]))
            assert torch.equal(cache.get([phrase])[phrase], vectors_of([phrase])[0])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    phrases = [f"{worker} {index}" for worker in range(4) for index in range(50)]
    assert EmbeddingCache("model", tmp_path).get(phrases).keys() == set(phrases)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    cache = EmbeddingCache("model", tmp_path)
    cache.folder.mkdir(parents=True)
    (cache.folder / "killed.part").write_bytes(b"half")
    cache.put(PHRASES, vectors_of(PHRASES))
    assert sorted(path.suffix for path in cache.folder.iterdir() if path.name != ".lock") == [".safetensors"]


def test_a_full_disk_leaves_nothing_and_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = filled(tmp_path)
    assert cache.get(PHRASES).keys() == {*PHRASES}
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]
    assert "No space left" in caplog.text


def test_the_root_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METR_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert EmbeddingCache("model").folder.parent == tmp_path / "text"
    monkeypatch.delenv("METR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "metr"
