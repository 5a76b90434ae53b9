"""Model cards: what they tell is what is known, and a person's words stay."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from metr.checkpoint import Checkpoint, DetectionDefaults, is_untouched
from metr.errors import CheckpointError
from metr.evaluation.results import EvaluationConfig, from_dict
from metr.evaluation.runner import evaluate
from metr.model import METR
from metr.sharing.model_card import CardFacts, find_report, model_card, write_card
from metr.sharing.push import save
from metr.text.vocabulary import Vocabulary
from metr.training.provenance import TrainingFacts

from tiny import NAMES, TinyRun


@pytest.fixture
def model(tiny_run: TinyRun) -> METR:
    return METR.from_pretrained(tiny_run.best, device="cpu")


def facts_of(model: METR, **changes: Any) -> CardFacts:
    """What a card tells of a model whose training told other things."""
    checkpoint = replace(model.checkpoint, training={**model.checkpoint.training, **changes})
    return CardFacts(title="tiny", checkpoint=checkpoint, parameters=1234)


def text_of(facts: CardFacts) -> str:
    return str(write_card(facts))


def report_of(tmp_path: Path, values: dict[str, tuple[float, float]]) -> Path:
    """An evaluation.json with these AP of own names and of the joint vocabulary, by dataset."""

    def part(ap: float) -> dict[str, Any]:
        coco = {"ap": ap, "ap50": ap, "ap75": ap, "ap_small": None, "ap_medium": None, "ap_large": None, "ar100": ap}
        return {"names": 2, "coco": coco | {"images": 3, "objects": 5, "categories": []}, "recall": {"1": 50.0}}

    datasets = [
        {"name": name, "split": "val", "domain": name, "in_mean": True, "images": 3, "missing": 0}
        | {"own": part(own), "joint": part(unified)}
        for name, (own, unified) in values.items()
    ]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"datasets": datasets, "names": 10}))
    return path


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_the_header_is_the_hubs(model: METR, tmp_path: Path) -> None:
    values = {"pond": (12.344, 10.0), "desk": (0.0, 1.5)}
    report = from_dict(json.loads(report_of(tmp_path, values).read_text()))
    data = ModelCard(text_of(replace_report(facts_of(model), report))).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("metr", "object-detection", "unknown")
    assert set(data.datasets) == set(NAMES)
    assert data.metrics == ["map"]
    assert data.model_name == "tiny"
    told = {(one.dataset_name, one.dataset_split, one.metric_name): one.metric_value for one in data.eval_results}
    assert told == {
        (name, "val", f"AP, {kind} (COCO, 0 to 100)"): round(value, 2)
        for name, both in values.items()
        for kind, value in zip(("own names", "joint vocabulary"), both, strict=True)
    }


def replace_report(facts: CardFacts, report: object) -> CardFacts:
    return CardFacts(title=facts.title, checkpoint=facts.checkpoint, parameters=facts.parameters, report=report)  # type: ignore[arg-type]


def test_what_training_leaves_in_a_checkpoint_names_no_place_of_this_machine(model: METR, tiny_run: TinyRun) -> None:
    training = model.checkpoint.training
    assert str(tiny_run.datasets[0].parent) not in json.dumps(training)
    facts = TrainingFacts.of(training)
    assert {name: one.splits["train"] for name, one in facts.data.items()} == {
        name: one.trained_on for name, one in facts.data.items()
    }
    assert {name: one.names for name, one in facts.data.items()} == {name: len(names) for name, names in NAMES.items()}
    assert (facts.seed, facts.batch, facts.step, facts.images) == (0, 2, 3, 6)
    assert facts.software["torch"] == str(torch.__version__)


def test_the_card_tells_what_is_known(model: METR) -> None:
    facts = facts_of(model)
    card = text_of(facts)
    assert "1,234 weights" in card
    for dataset, names in NAMES.items():
        assert f"- **{dataset}**: {', '.join(names)}" in section(card, "What it finds")
        one = facts.training.data[dataset]
        row = next(line for line in section(card, "Data").splitlines() if line.startswith(f"| {dataset} |"))
        assert f"| {one.format} | train {one.splits['train']}" in row
        assert row.endswith("| unknown |")
    told = section(card, "Training")
    assert "3 steps of 2 images, 6 images seen" in told
    assert "seed 0" in told
    assert f"torch {torch.__version__}" in told
    assert "as measured during training" in section(card, "Results").lower()
    limits = section(card, "Limits")
    for expected in ("one seed", "`unannotated = negative`", "Licence not known: ", "Few training images: "):
        assert expected in limits
    # the text encoder of the tiny run is a folder, whose path is nobody's business
    assert "unless the text encoder of training, a folder, is there too" in limits
    assert str(model.checkpoint.text_encoder["source"]) not in card


def test_the_default_names_are_told(model: METR) -> None:
    facts = facts_of(model)
    plain, card = (
        text_of(replace(facts, checkpoint=replace(facts.checkpoint, detection=DetectionDefaults(names=names))))
        for names in ((), ("cup", "leaf"))
    )
    assert "By default" not in plain
    assert 'model.detect("photo.jpg")  # every name below\n' in plain
    assert "By default: cup, leaf. All that it was trained on:" in section(card, "What it finds")
    assert 'model.detect("photo.jpg", model.names)  # every name below\n' in section(card, "Use")
    assert "fish, frog" in section(card, "What it finds")


def test_licences_are_repeated_and_restrictions_said(model: METR) -> None:
    data = json.loads(json.dumps(model.checkpoint.training["data"]))
    data["pond"]["licences"] = [{"text": "MIT", "stated_in": "LICENSE"}]
    data["desk"]["licences"] = [
        {"text": "Attribution-NonCommercial License", "stated_in": "a.json", "images": 3, "url": "https://x.org"}
    ]
    card = text_of(facts_of(model, data=data))
    assert "LICENSE: MIT" in section(card, "Data")
    assert "a.json, 3 images: Attribution-NonCommercial License" in section(card, "Data")
    assert "- Licences that mention non-commercial use: desk." in section(card, "Limits")
    assert "- Licence not known: meadow." in section(card, "Limits")
    assert ModelCard(card).data.license == "unknown"  # the data's licences are not the model's


def test_a_report_is_shown_and_datasets_without_results_are_named(model: METR, tmp_path: Path) -> None:
    report = from_dict(json.loads(report_of(tmp_path, {"pond": (12.3, 10.0)}).read_text()))
    facts = facts_of(model, metrics={})
    card = text_of(replace_report(facts, report))
    assert "| pond | 3 | 5 |" in section(card, "Results")
    assert "| 12.3 |" in section(card, "Results")
    unjudged = next(line for line in section(card, "Limits").splitlines() if line.startswith("- Not evaluated"))
    assert "desk" in unjudged
    assert "pond" not in unjudged


def test_results_on_images_that_training_had_are_called_so(model: METR, tmp_path: Path) -> None:
    report = from_dict(json.loads(report_of(tmp_path, {"pond": (12.3, 10.0)}).read_text()))
    fact = "the checkpoint was trained on 7 images of pond, these 3 images of val among them"
    results = section(text_of(replace_report(facts_of(model), report.with_seen({"pond": fact}))), "Results")
    assert f"\n\n**pond**: {fact}; AP there says how well it knows these" in results
    assert "was trained on" not in section(text_of(replace_report(facts_of(model), report)), "Results")


@pytest.mark.parametrize(("judged", "words"), [(None, "before the weights were"), ("float16", "with the weights")])
def test_whether_the_stored_weights_were_judged_is_told(
    model: METR, tmp_path: Path, judged: str | None, words: str
) -> None:
    report_of(tmp_path, {"ponds": (50.0, 40.0)})
    report = find_report(tmp_path, model.checkpoint)
    assert report is not None
    facts = replace(replace_report(facts_of(model), replace(report, weights=judged)), dtype="float16")
    assert f"Measured {words} stored as float16." in section(text_of(facts), "Results")


def test_stages_of_training_are_told_in_their_order(model: METR) -> None:
    first = dict(model.checkpoint.training)
    second = {"data": {"shop": {"format": "coco", "splits": {"train": 20}, "trained_on": 10, "names": 2}}}
    checkpoint = replace(model.checkpoint, training={**second, "seed": 7, "step": 9, "finetuned_from": first})
    card = text_of(CardFacts(title="tuned", checkpoint=checkpoint, parameters=1))
    told = section(card, "Training")
    assert told.index("- pretraining: 3 steps") < told.index("- fine-tuning: 9 steps")
    assert "| shop (fine-tuning) | coco | train 20 | 10 |" in section(card, "Data")
    assert "| pond (pretraining) |" in section(card, "Data")


def test_nothing_known_is_nothing_said(model: METR, caplog: pytest.LogCaptureFixture) -> None:
    bare = replace(model.checkpoint, training={}, vocabulary=Vocabulary.of(["fish", "| <b>frog</b>\n"]))
    card = text_of(CardFacts(title="bare", checkpoint=bare, parameters=1))
    assert "does not tell what it was trained on" in section(card, "Data")
    assert section(card, "Results").strip() == "Not measured."
    assert "fish, \\| &lt;b>frog&lt;/b>" in section(card, "What it finds")
    assert ModelCard(card).data.eval_results is None
    damaged = replace(bare, training={"step": "many", "data": 3})
    assert section(text_of(CardFacts(title="bare", checkpoint=damaged, parameters=1)), "Data") == section(card, "Data")
    assert "is not understood and left out" in caplog.text


def test_an_untouched_card_is_known_again(model: METR) -> None:
    card = text_of(facts_of(model))
    assert is_untouched(card)
    assert is_untouched(card.replace("\n", "\r\n"))
    for changed in (
        card.replace("# tiny", "# Tiny"),
        card.replace("license: unknown", "license: mit"),
        card + "\nSee also: ponds.\n",
        card.rsplit("<!--", 1)[0],
        "",
    ):
        assert not is_untouched(changed)


def test_saving_writes_the_card_anew_but_never_over_a_persons(model: METR, tmp_path: Path) -> None:
    place = tmp_path / "saved"
    save(model, place)
    card = place / "README.md"
    assert is_untouched(card.read_text())
    assert ModelCard(card.read_text()).data.license == "unknown"
    save(model, place, licence="mit")
    assert ModelCard(card.read_text()).data.license == "mit"
    model.save_pretrained(place)  # the checkpoint alone: a card of other weights would be wrong
    assert not card.exists()
    card.write_text("Mine.\n")
    model.save_pretrained(place)
    save(model, place, licence="mit")
    assert card.read_text() == "Mine.\n"
    # and it goes along wherever the model goes
    save(METR.from_pretrained(place), tmp_path / "further")
    assert (tmp_path / "further/README.md").read_text() == "Mine.\n"


def test_a_card_that_cannot_be_read_is_not_lost(model: METR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(b"M\xe9tr")
    with pytest.raises(CheckpointError, match="is not to be lost"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"M\xe9tr"


def test_a_card_as_an_object_of_the_hubs_library(model: METR, tmp_path: Path) -> None:
    card = model_card(model, repository="user/tiny", licence="mit", dtype=torch.float16)
    assert (card.data.model_name, card.data.license) == ("tiny", "mit")
    assert model_card(model, title="Ponds").data.model_name == "Ponds"
    card.save(tmp_path / "README.md")
    written = (tmp_path / "README.md").read_text()
    assert is_untouched(written)
    assert is_untouched(str(ModelCard(written)))  # read and written by the library, it is the same
    assert 'METR.from_pretrained("user/tiny")' in written
    assert "Weights are stored as float16." in written


def test_results_of_the_run_go_along(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(METR.from_pretrained(tiny_run.best), run / "best")
    evaluate(run, tiny_run.data[:1], run / "evaluation", config=EvaluationConfig(modes=("own",)), device="cpu")
    save(METR.from_pretrained(run), tmp_path / "saved")
    save(METR.from_pretrained(tmp_path / "saved"), tmp_path / "again")
    for place in ("saved", "again"):
        assert "| pond | 3 |" in section((tmp_path / place / "README.md").read_text(), "Results")
    reports = [
        from_dict(json.loads((tmp_path / place / "evaluation.json").read_text())) for place in ("saved", "again")
    ]
    assert reports[0] == reports[1]


def test_results_of_other_weights_are_left_out(model: METR, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "evaluation").mkdir()
    report_of(tmp_path / "evaluation", {"pond": (40.0, 30.0)})

    def found(ap: float) -> bool:
        return find_report(tmp_path / "best", told(model, ap)) is not None

    assert found(40.2)
    assert not caplog.records
    assert not found(12.0)
    assert "is of other weights" in caplog.text
    (tmp_path / "evaluation/evaluation.json").write_text("{")
    assert not found(40.2)
    assert "no results in the model card" in caplog.text


def test_a_small_split_may_move_more_than_the_mean(model: METR, tmp_path: Path) -> None:
    """Rounding to float16 can cost a split of eleven boxes more than a whole AP."""
    (tmp_path / "evaluation").mkdir()
    report_of(tmp_path / "evaluation", {"pond": (40.0, 30.0), "desk": (12.0, 11.0)})
    for desk, found in ((13.6, True), (16.0, False)):
        metrics = {"AP pond": 40.1, "AP desk": desk}
        checkpoint = replace(model.checkpoint, training={"metrics": metrics})
        assert (find_report(tmp_path / "best", checkpoint) is not None) is found


def told(model: METR, ap: float) -> Checkpoint:
    return replace(model.checkpoint, training={"metrics": {"AP": 1.0, "AP pond": ap}})
