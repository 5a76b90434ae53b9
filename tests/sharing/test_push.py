"""Sharing through the hub: what is sent, what comes back, and what is said when the hub does not give it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from hub_stand_in import TOKEN, Hub, Repository, hub, point_to
from metr.errors import CheckpointError, ConfigError, ModelError
from metr.model import METR
from metr.sharing.push import push

from tiny import CommandLine, TinyRun

__all__ = ["hub"]

SENT = {"config.json", "model.safetensors", "text_embeddings.safetensors", "vocabulary.json", "README.md"}
NAME = "user/detector"
# what the hub's library itself does when it uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's cache or token, and no path here that looks like a name on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def model(tiny_run: TinyRun) -> METR:
    return METR.from_pretrained(tiny_run.best, device="cpu")


@pytest.fixture
def shared_model(model: METR, hub: Hub) -> Repository:
    """The model, pushed."""
    push(model, NAME, token=TOKEN)
    return hub.repositories[NAME]


def checkpoint_files(run: TinyRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.best.iterdir()}


def same_weights(first: METR, second: METR) -> bool:
    ours, theirs = first.network.state_dict(), second.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def nudged(model: METR) -> METR:
    """The same model with one weight changed."""
    with torch.no_grad():
        next(model.network.parameters()).add_(1.0)
    return model


def test_what_is_pushed_comes_back(model: METR, shared_model: Repository, hub: Hub, tiny_run: TinyRun) -> None:
    again = METR.from_pretrained(NAME)
    assert same_weights(again, model)
    assert again.vocabulary == model.vocabulary
    assert again.checkpoint.training == model.checkpoint.training
    ours, theirs = (one.detect(tiny_run.unseen[0], threshold=0.0) for one in (model, again))
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(getattr(theirs, key), getattr(ours, key), rtol=0, atol=0)
    new = (one.detect(tiny_run.unseen[0], ["zebra"], threshold=0.0).scores for one in (model, again))
    torch.testing.assert_close(*new, rtol=0, atol=0)


def test_only_safetensors_json_and_the_card_are_sent(shared_model: Repository, hub: Hub) -> None:
    assert set(shared_model.files) == SENT | {".gitattributes"}
    assert len(hub.objects) == 2  # weights and embeddings went as large files
    assert f'METR.from_pretrained("{NAME}")' in shared_model.files["README.md"].decode()
    assert set(hub.cards) == {shared_model.files["README.md"].decode()}  # the hub was asked whether its header is right


def test_pushing_the_same_again_sends_no_weights(model: METR, shared_model: Repository, hub: Hub) -> None:
    hub.asked.clear()
    push(model, NAME, token=TOKEN)
    assert not [path for how, path in hub.asked if how == "PUT"]


def test_half_precision(model: METR, hub: Hub, tmp_path: Path) -> None:
    push(model, NAME, token=TOKEN, dtype=torch.float16, licence="apache-2.0")
    files = hub.repositories[NAME].files
    (tmp_path / "half.safetensors").write_bytes(files["model.safetensors"])
    stored = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    card = files["README.md"].decode()
    assert "stored as float16" in card
    assert "license: apache-2.0" in card
    assert model.network.state_dict().keys() == stored.keys()


def test_a_revision_is_a_commit_a_branch_or_a_tag(model: METR, shared_model: Repository) -> None:
    first = shared_model.refs["v1"] = shared_model.refs["main"]
    before = METR.from_pretrained(NAME)
    push(nudged(model), NAME, token=TOKEN)
    assert same_weights(METR.from_pretrained(NAME), model)
    for revision in (first, "v1"):
        old = METR.from_pretrained(NAME, revision=revision)
        assert same_weights(old, before)
        assert not same_weights(old, model)


def test_a_branch_is_made_if_it_is_missing(model: METR, shared_model: Repository) -> None:
    before = METR.from_pretrained(NAME)
    for _ in range(2):  # made, and then there already
        push(nudged(model), NAME, token=TOKEN, branch="trial")
        assert same_weights(METR.from_pretrained(NAME, revision="trial"), model)
    assert same_weights(METR.from_pretrained(NAME), before)


def test_a_branch_of_a_repository_that_is_new(model: METR, hub: Hub) -> None:
    push(model, "user/fresh", token=TOKEN, branch="trial")
    assert same_weights(METR.from_pretrained("user/fresh", revision="trial"), model)


def test_what_was_fetched_needs_no_hub(
    shared_model: Repository, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "mine"
    first = METR.from_pretrained(NAME, cache_dir=place)
    assert {path.name for path in place.rglob("*.safetensors")} == {name for name in SENT if name.endswith("tensors")}
    hub.asked.clear()
    assert same_weights(METR.from_pretrained(NAME, cache_dir=place, local_files_only=True), first)
    assert hub.asked == []
    with pytest.raises(CheckpointError, match=r"(?s)user/detector: not among what was fetched.*try: leave --offline"):
        METR.from_pretrained(NAME, cache_dir=tmp_path / "other", local_files_only=True)
    point_to(f"http://127.0.0.1:{free_port()}", monkeypatch)
    assert same_weights(METR.from_pretrained(NAME, cache_dir=place), first)  # out of reach: what is here serves
    with pytest.raises(CheckpointError, match=r"(?s)user/other: the hub cannot be reached.*try: check the connection"):
        METR.from_pretrained("user/other")
    with pytest.raises(CheckpointError, match=r"(?s)user/other: the hub cannot be reached.*try: check the connection"):
        push(first, "user/other", token=TOKEN)


def test_nothing_is_fetched_twice_unless_that_is_asked_for(shared_model: Repository, hub: Hub) -> None:
    METR.from_pretrained(NAME)
    assert sorted(hub.got()) == sorted(SENT)
    METR.from_pretrained(NAME)
    assert sorted(hub.got()) == sorted(SENT)
    METR.from_pretrained(NAME, force_download=True)
    assert hub.got().count("model.safetensors") == 2


def test_a_private_model_wants_a_token(model: METR, hub: Hub) -> None:
    push(model, NAME, token=TOKEN, private=True)
    assert hub.repositories[NAME].private
    assert same_weights(METR.from_pretrained(NAME, token=TOKEN), model)
    with pytest.raises(
        CheckpointError, match=r"(?s)user/detector: .*a model on the hub that may be seen.*hf auth login"
    ):
        METR.from_pretrained(NAME, token=False, force_download=True, cache_dir="elsewhere")


def test_what_the_hub_does_not_give(model: METR, shared_model: Repository, hub: Hub, tiny_run: TinyRun) -> None:
    hub.repositories["user/gated"] = gated = Repository(gated=True)
    gated.commit(checkpoint_files(tiny_run))
    for name, revision, told in (
        ("user/nothing", None, r"user/nothing: neither a folder here nor a model on the hub"),
        (NAME, "v7", r"user/detector: no revision 'v7'"),
        ("user/gated", None, r"(?s)user/gated: its owner grants access.*ask for access on its page"),
        ("user/bad name", None, r"(?s)user/bad name: not a name on the hub.*try: user/name"),
    ):
        with pytest.raises(CheckpointError, match=told):
            METR.from_pretrained(name, revision=revision)
    assert same_weights(METR.from_pretrained("user/gated", token=TOKEN), model)


def test_pushing_without_leave(model: METR, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)user/detector: the hub does not allow this.*hf auth login"):
        push(model, NAME, token="hf_reads_only")
    with pytest.raises(ConfigError, match="repository: expected user/name, found 'detector'"):
        push(model, "detector", token=TOKEN)
    assert hub.repositories == {}


def test_other_repositories_are_recognised_before_their_weights_are_fetched(hub: Hub) -> None:
    hub.repositories["user/yolos"], hub.repositories["user/empty"] = Repository(), Repository()
    hub.repositories["user/yolos"].commit({"config.json": b'{"model_type": "yolos"}', "model.safetensors": b"large"})
    hub.repositories["user/empty"].commit({"README.md": b"# soon"})
    with pytest.raises(ModelError, match=r"(?s)user/yolos: METR takes no weights from a yolos.*try: one of .*rt_detr"):
        METR.from_pretrained("user/yolos")
    with pytest.raises(CheckpointError, match=r"user/empty: this repository holds no METR checkpoint and no detector"):
        METR.from_pretrained("user/empty")
    assert set(hub.got()) == {"config.json"}


def test_no_pickle_is_fetched_even_if_there_is_nothing_else(hub: Hub, tiny_run: TinyRun) -> None:
    files = checkpoint_files(tiny_run)
    weights = files.pop("model.safetensors")
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({**files, "pytorch_model.bin": weights, "last/model.safetensors": weights})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        METR.from_pretrained(NAME)
    assert "model.safetensors" not in hub.got()
    assert not [name for name in hub.got() if name.endswith((".bin", ".pkl"))]


def test_a_persons_card_on_the_hub_stays(model: METR, shared_model: Repository) -> None:
    ours = shared_model.files["README.md"]
    shared_model.commit({**shared_model.files, "README.md": ours.replace(b"## Use", b"## How we use it")})
    push(nudged(model), NAME, token=TOKEN)
    assert b"## How we use it" in shared_model.files["README.md"]
    assert same_weights(METR.from_pretrained(NAME), model)
    # as METR wrote it, it is written anew
    shared_model.commit({**shared_model.files, "README.md": ours})
    push(model, NAME, token=TOKEN, licence="mit")
    assert b"license: mit" in shared_model.files["README.md"]


def test_the_verb(hub: Hub, metr: CommandLine, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ended = metr("push", tiny_run.folder, NAME, "--half", "--licence", "apache-2.0")
    assert ended.code == 0, ended.err
    assert f"{NAME} is shared: {hub.url}/{NAME}/commit/" in ended.words
    assert set(hub.repositories[NAME].files) == SENT | {".gitattributes"}
    refused = metr("push", tiny_run.folder, "detector")
    assert refused.code == 1
    assert "expected user/name, found 'detector' try: put your name before it" in refused.words


@pytest.mark.slow
def test_in_processes_of_their_own_by_the_librarys_settings(hub: Hub, tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    calls = (
        ["push", str(tiny_run.folder), NAME],
        ["detect", NAME, str(tiny_run.unseen[0]), "-o", str(tmp_path / "found"), "--threshold", "0"],
    )
    for arguments in calls:
        done = subprocess.run(
            [sys.executable, "-c", "from metr.cli.main import run; run()", *arguments],
            cwd=tmp_path,
            env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found/detections.json").read_text())
    shutil.rmtree(tmp_path / "home")


def free_port() -> int:
    """One where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
