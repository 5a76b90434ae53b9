"""Every tensor is accounted for: what goes nowhere is left over, and nothing else is."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conversion_cases import NAMES, PROJECTING, alike, save_folder, stir, stirred, texts
from torch import Tensor

from metr.conversion.classifier import name_tokens, refined_tokens
from metr.conversion.convert import TransferReport, giving_to_ours
from metr.conversion.export import build, build_spec_for, transfer
from metr.conversion.import_ import adopt, read_published
from metr.conversion.table import Row
from metr.conversion.targets import NAMES as TARGETS
from metr.conversion.targets import find_target
from metr.conversion.targets.base import Context, Derived
from metr.models.config import DetectorConfig, SimilarityConfig

from small import small_config

SINGLE = ("dab_detr", "conditional_detr", "detr")
FOLDERS = ("deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "deimv2", *PROJECTING)
NOWHERE = ("category_extraction.presence.", "category_extraction.shortlist.")


def metr(target: str, token: str, **encoder: object) -> DetectorConfig:
    """A METR with everything that may go nowhere: a shortlist, objectness, denoising queries, features of places."""
    config = small_config(encoder="plain") if target in SINGLE else alike(target, **encoder)
    changes = {
        "similarity": SimilarityConfig(token=token, objectness=True),
        "categories": config.categories.model_copy(update={"shortlist": 4, "self_attention": token == "refined"}),
        "queries": config.queries.model_copy(update={"content": "place"}),
    }
    return config.model_copy(update=changes | ({"width": 32} if target == "deformable_detr" else {}))


def accounted(report: TransferReport, state: Mapping[str, Tensor]) -> None:
    """Each of the giver's tensors is a source or left over under one of its names, and none is both."""
    used = {source for moved in (*report.copied, *report.reshaped) for source in moved.source}
    assert used.isdisjoint(report.left_over)
    assert len(report.left_over) == len(set(report.left_over))
    known = used | set(report.left_over)
    assert known <= set(state)
    places = {state[key].data_ptr() for key in known}
    assert [key for key, tensor in state.items() if key not in known and tensor.data_ptr() not in places] == []


@pytest.mark.parametrize("token", ["refined", "text"])
@pytest.mark.parametrize("target", TARGETS)
def test_all_of_metr_is_accounted_for(target: str, token: str) -> None:
    network = stirred(metr(target, token))
    report = transfer(find_target(target), network, NAMES, texts()).report
    state = network.state_dict()
    accounted(report, state)
    nowhere = {key for key in state if key.startswith(NOWHERE)}
    assert len(nowhere) > 20
    assert nowhere <= set(report.left_over)
    # of a denoising query the content of each label is made, where there are such queries
    assert ("denoising.learned" in report.left_over) == (target in {*SINGLE, *PROJECTING, "deformable_detr"})
    assert ("decoder.similarity.bias" in report.left_over) is False


def test_what_does_not_fit_is_left_over_too() -> None:
    network = stirred(alike("d_fine"))
    report = transfer(find_target("rt_detr"), network, NAMES, texts()).report
    accounted(report, network.state_dict())
    network = stirred(metr("rt_detr", "text").model_copy(update={"width": 64}))
    report = transfer(find_target("deformable_detr"), network, NAMES, texts()).report
    accounted(report, network.state_dict())
    assert any(key.startswith("decoder.similarity") for key in report.left_over)


@pytest.mark.parametrize("name", FOLDERS)
def test_all_of_a_folder_is_accounted_for(name: str, tmp_path: Path) -> None:
    network = stirred(alike(name))
    model = stir(build(find_target(name), network, NAMES, seed=3)).eval()
    if name in ("d_fine", "deimv2"):
        model.config.decoder_n_points = [2, 2, 2]
    save_folder(model, name, network, tmp_path)
    _, report = adopt(read_published(tmp_path), texts())
    accounted(report, model.state_dict())


def test_what_is_derived_is_not_copied_as_well() -> None:
    """A row whose tensor is derived of another: its own source goes nowhere."""
    theirs = {"a": torch.zeros(2), "b": torch.ones(2)}
    derived = {"ours": Derived(tensor=torch.ones(2), how="computed", source=("b",))}
    given = giving_to_ours(theirs, [Row("a", "ours")], derived)
    assert given.left_over == ("a",)
    assert [moved.source for moved in given.moved] == [("b",)]


class Derivation:
    """What a target derives from a METR, again and again."""

    def __init__(self, target: str, config: DetectorConfig) -> None:
        self.target, self.network = find_target(target), stirred(config)
        self.config = self.target.configure(build_spec_for(self.target, self.network, NAMES))

    def __call__(self) -> Mapping[str, Derived]:
        own = self.network
        tokens, contents = name_tokens(own, texts()), refined_tokens(own, texts())
        return self.target.derive(
            Context(network=own, text=texts(), tokens=tokens, contents=contents, config=self.config)
        )


def module_of(key: str) -> str:
    return key.rpartition(".")[0]


@torch.no_grad()
def moved_by(derivation: Derivation, modules: set[str], before: Mapping[str, Tensor]) -> bool:
    """Whether something derived changes with the numbers of some modules, which then are as they were."""
    state = {
        key: tensor
        for key, tensor in derivation.network.state_dict().items()
        if module_of(key) in modules and tensor.is_floating_point()
    }
    kept = {key: tensor.clone() for key, tensor in state.items()}
    for tensor in state.values():
        tensor.add_(torch.rand_like(tensor) * 0.1 + 0.05)
    after = derivation()
    for key, tensor in state.items():
        tensor.copy_(kept[key])
    return any(not torch.equal(after[key].tensor, tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("target", "token", "encoder"),
    [
        ("deformable_detr", "refined", {}),
        ("rt_detr", "refined", {"fusion_blocks": 1, "fusion_expansion": 0.5, "project_memory": False}),
        ("d_fine", "text", {}),
        ("lw_detr", "refined", {}),
        ("dab_detr", "refined", {}),
        ("conditional_detr", "text", {}),
        ("detr", "refined", {}),
    ],
)
def test_sources_are_what_something_is_made_of(target: str, token: str, encoder: dict[str, object]) -> None:
    """The modules that are named each change what is derived, and all others together do not."""
    config = metr(target, token, **encoder)
    # positions that are fitted, where the target has them
    plain = config.decoder.model_copy(update={"positions": "sine"})
    derivation = Derivation(target, config.model_copy(update={"decoder": plain}))
    derived, state = derivation(), derivation.network.state_dict()
    before = {key: one.tensor.clone() for key, one in derived.items()}
    sources = {source for one in derived.values() for source in one.source}
    assert sources <= set(state)
    named = set(map(module_of, sources))
    assert not moved_by(derivation, set(map(module_of, state)) - named, before)
    idle = {module for module in named if not moved_by(derivation, {module}, before)}
    assert not idle
