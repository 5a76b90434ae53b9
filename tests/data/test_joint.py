"""From arguments of a command to datasets with one vocabulary."""

from dataclasses import replace
from pathlib import Path

import pytest

from metr.data.config import AugmentationConfig, SubsetConfig
from metr.data.joint import open_joint
from metr.errors import ConfigError, DataError
from metr.text.vocabulary import Vocabulary

from tiny import NAMES, TinyRun


def listing(run: TinyRun, path: Path, **options: str) -> str:
    """A YAML file that lists the tiny datasets, each with what is said of it."""
    lines = [f"  - {{path: {root}, {options.get(root.name, '')}}}" for root in run.datasets]
    path.write_text("\n".join(["datasets:", *lines]), encoding="utf-8")
    return str(path)


def test_names_are_joined_and_remember_their_datasets(tiny_run: TinyRun) -> None:
    joint = open_joint(tiny_run.data)
    assert joint.vocabulary.datasets == NAMES
    assert joint.vocabulary.annotated("pond")[joint.vocabulary.index_of("leaf")]
    assert joint.vocabulary.annotated("meadow")[joint.vocabulary.index_of("leaf")]
    assert {name: len(split) for name, split in joint.evaluation().items()} == dict.fromkeys(NAMES, 3)
    assert {name: len(split) for name, split in joint.evaluation("train").items()} == dict.fromkeys(NAMES, 4)
    assert [len(one) for one in joint.training(AugmentationConfig(), "ignore")] == [4, 4, 4]


@pytest.mark.parametrize(("subset", "wanted"), [({"shots": 1}, "1 shot"), ({"fraction": 0.5}, "a fraction of 0.5")])
def test_a_part_is_told_with_what_stays_whole(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, subset: dict[str, float], wanted: str
) -> None:
    with caplog.at_level("INFO"):
        joint = open_joint(tiny_run.data[:1], SubsetConfig.checked(subset))
    taken = joint.lengths["pond"]
    assert 0 < taken < 4
    told = f"pond: {wanted}, seed 0: {taken} of 4 training images; val stays whole (3 images)"
    assert told in [record.getMessage() for record in caplog.records]


def test_prompts_renames_and_names_of_datasets(tiny_run: TinyRun, tmp_path: Path) -> None:
    options = {"pond": "name: water, renames: {leaf: lily pad}, prompts: {lily pad: leaf of a water lily}"}
    vocabulary = open_joint([listing(tiny_run, tmp_path / "list.yaml", **options)]).vocabulary
    assert vocabulary.datasets["water"] == ("fish", "frog", "lily pad", "turtle")
    assert vocabulary.prompts == {"lily pad": "leaf of a water lily"}


def test_weights_multiply_the_mixture(tiny_run: TinyRun, tmp_path: Path) -> None:
    plain = open_joint(tiny_run.data)
    assert plain.mixture("sqrt") == "sqrt"
    weighted = open_joint([listing(tiny_run, tmp_path / "list.yaml", pond="weight: 3", desk="weight: 0.5")])
    # all three have as many images, so the weights alone decide
    shares = weighted.mixture("sqrt")
    assert isinstance(shares, dict)
    assert [shares[name] / shares["meadow"] for name in NAMES] == pytest.approx([3, 0.5, 1])
    explicit = weighted.mixture({"pond": 0.2, "desk": 0.4, "meadow": 0.4})
    assert isinstance(explicit, dict)
    assert explicit == pytest.approx({"pond": 0.6, "desk": 0.2, "meadow": 0.4})


def test_what_does_not_fit_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'wieght'\n  try: did you mean 'weight'"):
        open_joint([listing(tiny_run, tmp_path / "a.yaml", pond="wieght: 3")])
    twice = listing(tiny_run, tmp_path / "b.yaml", pond="prompts: {leaf: pad}", meadow="prompts: {leaf: autumn leaf}")
    with pytest.raises(DataError, match="'leaf' is 'pad' in pond but 'autumn leaf' in meadow"):
        open_joint([twice])
    with pytest.raises(DataError, match="2 datasets are called 'pond'"):
        open_joint([tiny_run.data[0], tiny_run.data[0]])


def test_names_that_no_dataset_of_the_run_annotates_are_foreign_to_none(tiny_run: TinyRun) -> None:
    joint = open_joint(tiny_run.data)
    wider = replace(joint, vocabulary=Vocabulary.union({"old": ["zebra"], **NAMES}))
    unannotated = wider.unannotated()
    words = wider.vocabulary
    assert set(unannotated) == set(NAMES)
    for name, mask in unannotated.items():
        assert not mask[words.index_of("zebra")], "it would be taught to be absent, and forgotten"
        assert not (mask & words.annotated(name)).any()
        assert mask.sum() == len(words) - 1 - words.annotated(name).sum()
