"""Wrong names end in one message, wherever names are taken: from Python, the command, the server and exports."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from metr.completion.complete import complete
from metr.conversion.class_heads import told_apart
from metr.conversion.transfer import transfer
from metr.errors import ConfigError
from metr.export.export import export, write_names
from metr.export.request import ExportConfig
from metr.model import METR
from metr.serving.service import Service
from metr.text.encoder import TextEncoder
from metr.text.vocabulary import Vocabulary

from tiny import CommandLine, TinyRun, metr, tiny_run

__all__ = ["metr", "tiny_run"]

Taker = Callable[[METR, TinyRun, Path, Any], object]


async def answered(model: METR, image: Path, names: Any) -> object:
    async with Service(model) as service:
        return await service.answer(image.read_bytes(), names)


DETECTING: dict[str, Taker] = {
    "detect": lambda model, run, out, names: model.detect(run.unseen[0], names),
    "detect many": lambda model, run, out, names: model.detect([run.unseen[0]], names),
    "predictor": lambda model, run, out, names: model.predictor(names),
    "thresholds": lambda model, run, out, names: model.thresholds(names=names),
    "export": lambda model, run, out, names: export(model, out / "out", names, config=ExportConfig()),
    "names": lambda model, run, out, names: write_names(model, out / "names.npz", names),
    "serve": lambda model, run, out, names: asyncio.run(answered(model, run.unseen[0], names)),
}
TAKERS: dict[str, Taker] = {
    **DETECTING,
    "embed": lambda model, run, out, names: model.embed(names),
    "meant": lambda model, run, out, names: model.meant(names),
    "inference": lambda model, run, out, names: model.inference(names=names),
    "untrained": lambda model, run, out, names: model.untrained(names),
    "vocabulary": lambda model, run, out, names: Vocabulary.of(names),
    "encoder": lambda model, run, out, names: TextEncoder(model._encoder_config).embed(names),
    "transfer": lambda model, run, out, names: transfer(model, "deformable_detr", out / "out", names=names),
    "adopt": lambda model, run, out, names: told_apart(names),
    "complete": lambda model, run, out, names: complete(model, run.data, out / "out", only=names),
}


@pytest.fixture(scope="module")
def model(tiny_run: TinyRun) -> METR:
    return METR.from_pretrained(tiny_run.folder)


@pytest.fixture
def _as_users_run_it() -> Iterator[None]:
    """Annotations are not executed: they would refuse the arguments first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_as_users_run_it")
@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("names", [["leaf", 3], ["leaf", None], [b"leaf"], 3, [["leaf"]]])
def test_names_that_are_no_texts(model: METR, tiny_run: TinyRun, tmp_path: Path, taker: str, names: object) -> None:
    with pytest.raises(ConfigError, match=r"expected (texts|a list of names|a Vocabulary), found"):
        TAKERS[taker](model, tiny_run, tmp_path, names)


@pytest.mark.usefixtures("_as_users_run_it")
@pytest.mark.parametrize("phrases", [{"leaf": 3}, {"leaf": ["green", 3]}, {"leaf": "green"}, {3: ["green"]}])
def test_phrases_that_are_no_texts(model: METR, tiny_run: TinyRun, phrases: object) -> None:
    with pytest.raises(ConfigError, match=r"expected (texts|a list of phrases for 'leaf'), found"):
        model.detect(tiny_run.unseen[0], phrases)  # type: ignore[arg-type, call-overload]


@pytest.mark.parametrize("taker", DETECTING)
@pytest.mark.parametrize("names", [["Leaf", "leaf"], ["LEAF", "Leaf"], ["Unicorn", "unicorn"]])
def test_capital_letters_make_no_other_name(
    model: METR, tiny_run: TinyRun, tmp_path: Path, taker: str, names: list[str]
) -> None:
    with pytest.raises(ConfigError, match=f"given twice: '{names[0]}', '{names[1]}'"):
        DETECTING[taker](model, tiny_run, tmp_path, names)


def test_nor_do_they_in_a_command(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    listed, described = tmp_path / "names.txt", tmp_path / "names.yaml"
    listed.write_text("leaf\nLeaf\n")
    described.write_text("leaf: [green]\nLeaf: [brown]\n")
    for asked in (["--categories", "leaf,Leaf"], ["--categories-file", listed], ["--categories-file", described]):
        for more in ([], ["--engine", "ray"]):
            ended = metr("detect", tiny_run.folder, tiny_run.unseen[0], *asked, *more, "-o", tmp_path / "out")
            assert (ended.code, "given twice: 'leaf', 'Leaf'" in ended.err) == (1, True), ended


def test_names_of_datasets_may_differ_in_them_alone(model: METR) -> None:
    assert model.predictor(Vocabulary.of(["Unicorn", "unicorn"])).names == ("Unicorn", "unicorn")
