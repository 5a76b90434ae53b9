"""The checkpoint that comes with the project: small enough, honest in its card, and it finds what it says."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from safetensors import safe_open

from metr.checkpoint import is_untouched, load_checkpoint
from metr.data.datasets_file import DatasetConfig, open_dataset
from metr.evaluation.seen import seen_in_training
from metr.model import METR
from metr.training.provenance import TrainingFacts

FOLDER = Path(__file__).resolve().parents[1] / "checkpoints" / "metr-nano"
# images of splits that neither training nor the card's results have seen, and what is in each
UNSEEN = {
    "aquarium": (
        "aquarium/test/images/*.jpg",
        {"fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"},
    ),
    "chess_pieces": ("chess_pieces/test/*.jpg", {"white-", "black-"}),
    "bccd": ("bccd/ImageSets/Main/test.txt", {"RBC", "WBC", "Platelets"}),
}


@pytest.fixture(scope="module")
def model() -> METR:
    return METR.from_pretrained(FOLDER, device="cpu")


def test_it_is_small_and_of_half_precision() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16e6
    with safe_open(FOLDER / "model.safetensors", "pt") as tensors:
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118  # no mapping
    assert "F16" in kinds
    assert "F32" not in kinds


def test_its_card_tells_data_licences_and_results() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert is_untouched(card)
    data = TrainingFacts.of(load_checkpoint(FOLDER).training).data
    assert len(data) == 25
    assert set(data) >= {*UNSEEN, "coco_mini", "doc_tables", "playing_cards", "turkish_road", "wagon_defects"}
    assert all(facts.licences for facts in data.values()), "each says under which licence it may be used"
    assert "NonCommercial" not in card
    report = json.loads((FOLDER / "evaluation.json").read_text(encoding="utf-8"))
    assert report["weights"] == "float16"
    assert f"| **mean of 24** |  |  |  | {report['mean']['own']['ap']:.1f} |" in card


@pytest.mark.trains
@pytest.mark.parametrize("dataset", UNSEEN)
def test_it_finds_its_things_in_images_it_has_never_seen(model: METR, shared: Path, dataset: str) -> None:
    pattern, names = UNSEEN[dataset]
    images = sorted((shared / "data").glob(pattern))
    if dataset == "bccd":
        stems = images[0].read_text().split()
        images = [shared / "data/bccd/JPEGImages" / f"{stem}.jpg" for stem in stems]
    found = [model.detect(image, threshold=0.5) for image in islice(images, 8)]
    labels = [[one.names[label] for label in one.labels.tolist()] for one in found]
    own = [sum(label.startswith(tuple(names)) for label in image) for image in labels]
    assert sum(map(bool, own)) >= 6, "there is something in every image"
    assert sum(own) >= 0.8 * sum(map(len, labels)), "hardly a thing is called by another dataset's name"


def test_detecting_trained_names_imports_no_transformers() -> None:
    """It takes seconds to import, and only other backbones and untrained names need it."""
    code = (
        "import sys, numpy, metr\n"
        f"model = metr.METR.from_pretrained({str(FOLDER)!r}, device='cpu')\n"
        "model.detect(numpy.zeros((64, 64, 3), dtype=numpy.uint8))\n"
        "print(sorted({'transformers', 'accelerate', 'pyarrow'} & {*sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "[]"


def test_it_has_seen_what_is_held_out_of_playing_cards(shared: Path) -> None:
    """Its training took the dataset's test split as val, and so all images of train."""
    checkpoint = load_checkpoint(FOLDER)
    source = open_dataset(DatasetConfig(name="playing_cards", path=shared / "data/playing_cards"))
    seen = seen_in_training(checkpoint.training, source, "val", checkpoint.vocabulary)
    assert seen is not None
    assert "trained on 212 images of playing_cards, these 42 images of val among them" in seen.fact
    assert seen.untouched == 47
    assert seen_in_training(checkpoint.training, source, "test", checkpoint.vocabulary) is None
