"""A whole training run in miniature, and the command line inside a test: what tests of the outer layers share."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from metr.cli.main import run as run_command_line
from metr.demo import write_demo_datasets, write_unseen
from metr.training.config import load_recipe
from metr.training.train import train

from small import small_backbone

NAMES = {
    "pond": ("fish", "frog", "leaf", "turtle"),
    "desk": ("book", "cup", "scissors"),
    "meadow": ("butterfly", "leaf", "mushroom", "snail"),
}
_LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz- "]


@dataclass(frozen=True, kw_only=True)
class TinyRun:
    """Three datasets in three formats, images without annotations, a recipe, and what training made of them.

    Everything is shared by many tests: copy what you change.
    """

    datasets: tuple[Path, ...]
    unseen: tuple[Path, ...]
    text_model: Path
    recipe: Path
    folder: Path

    @property
    def data(self) -> list[str]:
        """The datasets as arguments of a command."""
        return [str(path) for path in self.datasets]

    @property
    def best(self) -> Path:
        """Its best checkpoint."""
        return self.folder / "best"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended; `words` is all that it said, in one line of single spaces."""

    code: int
    out: str
    err: str
    words: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", " ".join(f"{self.out} {self.err}".split()))


CommandLine = Callable[..., Ended]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A network of a few thousand weights, trained for three steps."""
    return _trained(tmp_path_factory.getbasetemp() / "tiny")


@cache  # each folder of tests that imports the fixture has one of its own
def _trained(home: Path) -> TinyRun:
    datasets = tuple(one.folder for one in write_demo_datasets(home / "data", 0, 4, 3))
    unseen = tuple(one.path for one in write_unseen(home / "unseen", 0, 4))
    write_text_model(home / "text")
    recipe = write_recipe(home / "tiny.yaml", home / "text")
    train([str(path) for path in datasets], home / "run", load_recipe("nano", recipe))
    return TinyRun(datasets=datasets, unseen=unseen, text_model=home / "text", recipe=recipe, folder=home / "run")


def write_recipe(path: Path, text: Path | str) -> Path:
    """A recipe laid over nano's: the smallest network of its kind, 64 pixels, three steps of two images."""
    tree = {
        "text": {"source": str(text), "templates": ["{}", "a {}"]},
        "model": {
            "width": 32,
            "backbone": small_backbone().model_dump(mode="json"),
            "encoder": {"heads": 4, "feed_forward": 32},
            # so few steps say nothing of what is present
            "categories": {"heads": 4, "feed_forward": 32, "threshold": 0.0},
            "queries": {"number": 24},
            "denoising": {"number": 10},
            "decoder": {"layers": 1, "heads": 4, "feed_forward": 32},
        },
        "augmentation": {"resize": {"size": 64}},
        "loader": {"batch_size": 2, "workers": 0},
        "train": {
            # nano's own, whatever the number of steps is
            "schedule": {"warmup_steps": 200},
            "ema": {"decay": 0.9995, "tau": 300},
            "loop": {
                "device": "cpu",
                "steps": 3,
                "log_every": 1,
                "evaluate_every": 1000,
                "checkpoint_every": 500,
                "curves": False,
                "images": False,
            },
        },
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def write_text_model(folder: Path, seed: int = 0) -> None:
    """A BERT of random weights that reads letters: every name has an embedding of its own."""
    letters = Tokenizer(models.WordLevel({letter: row for row, letter in enumerate(_LETTERS)}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(BertConfig(vocab_size=len(_LETTERS), max_position_embeddings=64, **sizes)).save_pretrained(folder)


@pytest.fixture
def metr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The console script in this process; a traceback would be an exception of the test."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["metr", *map(str, arguments)])
        code: object = 0
        try:
            run_command_line()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return Ended(code=int(str(code or 0)), out=said.out, err=said.err)

    return call


def read_coco(folder: Path) -> tuple[dict[str, list[dict]], list[dict]]:
    """What `metr detect` wrote about images, and what it found."""
    images, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("images", "detections"))
    return images, found


def train_arguments(run: TinyRun, out: Path, *more: object) -> Sequence[object]:
    """`metr train` on the tiny datasets with the tiny recipe."""
    return ["train", *run.data, "-o", out, "--config", run.recipe, *more]


def as_overrides(run: TinyRun) -> tuple[str, ...]:
    """The tiny recipe as `section=value`, to be laid over any other."""
    tree = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    return tuple(f"{section}={json.dumps(values)}" for section, values in tree.items())
