"""Classifiers of a fixed list of classes become METR's classifiers of names (`similarity.form: classifier`)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from metr.conversion.classifier import Linear
from metr.conversion.targets.base import Adopted, Derived
from metr.text.vocabulary import listed_names

# Singular values below this fraction of the largest count as zero: names that say the same cannot be told apart.
_NEGLIGIBLE = 1e-6

# what a label is called that stands for no category, also if several are told apart: N/A, N/A 2
_NONE = re.compile(r"N/A( \d+)?")


def stands_for_none(name: str) -> bool:
    """Whether a label's name says that the label has no category."""
    return _NONE.fullmatch(name.strip()) is not None


def told_apart(names: Sequence[str]) -> list[str]:
    """The names, with repeated names of labels without a category counted: N/A, N/A 2, ..."""
    found, told = 0, list[str]()
    for name in listed_names(names):
        found += stands_for_none(name)
        told.append(f"N/A {found}" if stands_for_none(name) and found > 1 else name)
    return told


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassHeads:
    """The class heads of a detector, one row a label.

    Attributes:
        names: The labels' names; empty where the detector does not say them.
        heads: By the prefix of METR's head (`proposals.classifier`): logits of all labels from a feature.
        sources: By the same prefix, the detector's keys.
        assumed: The detector does not say the names; they are those that its number of labels suggests.
        rivals: By the same prefix, the logits of everything that the detector's softmax compares, labels first.
        numbers: The label of each row of `heads`.
    """

    names: tuple[str, ...]
    heads: Mapping[str, Linear]
    sources: Mapping[str, tuple[str, ...]]
    assumed: bool = False
    rivals: Mapping[str, Linear] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()

    @property
    def labels(self) -> int:
        """How many labels there are."""
        return len(next(iter(self.heads.values())).bias)

    def named(self, names: Sequence[str]) -> "ClassHeads":
        """The heads of labels with these names, without those that stand for no category."""
        kept = [row for row, name in enumerate(names) if not stands_for_none(name)]
        heads = {prefix: Linear(weight=head.weight[kept], bias=head.bias[kept]) for prefix, head in self.heads.items()}
        numbers = tuple(self.numbers[row] for row in kept)
        return replace(self, names=tuple(names[row] for row in kept), heads=heads, numbers=numbers)


def class_heads(
    state: Mapping[str, Tensor],
    adopted: Adopted,
    rows: Sequence[int] | slice,
    names: Sequence[str],
    assumed: bool = False,
) -> ClassHeads | None:
    """The class heads that METR's are to follow; None where there are none.

    Args:
        state: The detector's weights.
        adopted: Which of the detector's linear layers is which of METR's heads.
        rows: The labels that count, or those that have a name.
        names: Their names; empty where the detector does not say them.
        assumed: As in `ClassHeads`.
    """
    if not adopted.class_heads:
        return None
    heads, rivals, sources = dict[str, Linear](), dict[str, Linear](), dict[str, tuple[str, ...]]()
    numbers = tuple[int, ...]()
    for ours, theirs in adopted.class_heads.items():
        weight, bias = state[f"{theirs}.weight"], state[f"{theirs}.bias"]
        head = Linear(weight=weight[rows], bias=bias[rows])
        if ours in adopted.first_label:
            head = Linear(weight=weight[:1].expand_as(head.weight), bias=bias[:1].expand_as(head.bias))
        heads[ours], numbers = head, tuple(range(len(bias))[rows] if isinstance(rows, slice) else rows)
        if ours in adopted.softmax:
            rivals[ours] = Linear(weight=weight, bias=bias)
        sources[ours] = tuple(key for key, tensor in state.items() if tensor is weight or tensor is bias)
    return ClassHeads(names=tuple(names), heads=heads, sources=sources, assumed=assumed, rivals=rivals, numbers=numbers)


@dataclass(frozen=True, kw_only=True, eq=False)
class SolvedHeads:
    """METR's class heads, and how far they are from the detector's.

    Attributes:
        derived: METR's tensors.
        error: The largest difference of a logit, for features whose numbers are about 1.
        rank: How many directions the names' embeddings have.
    """

    derived: Mapping[str, Derived]
    error: float
    rank: int


@torch.no_grad()
def solve(given: ClassHeads, text: Float[Tensor, "n t"]) -> SolvedHeads:
    """Weights with which METR's class heads give each of the detector's names the logits that the detector gives it.

    A classifier's weight and bias are an affine function of the name's embedding, the one of smallest size that meets
    all labels: so a name between others gets a classifier between theirs, and a name unlike all gets about their mean.
    Up to as many labels as an embedding has numbers are met exactly; more in the sense of least squares.

    Args:
        given: The detector's heads.
        text: One embedding a label.
    """
    centre = text.double().mean(0)
    offsets = text.double() - centre
    left, sizes, right = torch.linalg.svd(offsets, full_matrices=False)
    kept = sizes > _NEGLIGIBLE * sizes.max().clamp(min=1e-12)
    inverse = (right[kept].T / sizes[kept]) @ left[:, kept].T
    derived, errors = dict[str, Derived](), [0.0]
    for prefix, head in given.heads.items():
        wanted = torch.cat([head.weight, head.bias.unsqueeze(1)], dim=1).double()
        mean = wanted.mean(0)
        slope = (inverse @ (wanted - mean)).T
        start = mean - slope @ centre
        tensors = {
            "weight.weight": slope[:-1],
            "weight.bias": start[:-1],
            "bias.weight": slope[-1:],
            "bias.bias": start[-1:],
        }
        for name, tensor in tensors.items():
            derived[f"{prefix}.{name}"] = Derived(
                tensor=tensor.to(head.weight), how="solved: class head and names", source=given.sources[prefix]
            )
        if rivals := given.rivals.get(prefix):
            derived |= _rivals(prefix, rivals, text, given)
        missed = (text.double() @ slope.T + start - wanted).square().sum(1).sqrt()
        errors.append(float(missed.max()))
    return SolvedHeads(derived=derived, error=max(errors), rank=int(kept.sum()) + 1)


def _rivals(prefix: str, rivals: Linear, text: Float[Tensor, "n t"], given: ClassHeads) -> dict[str, Derived]:
    """What every name competes with: all labels of the detector, those with a name under its text embedding."""
    texts = text.new_zeros(len(rivals.bias), text.shape[1])
    texts[list(given.numbers)] = text
    source = given.sources[prefix]
    return {
        f"{prefix}.rivals.logits.weight": Derived(tensor=rivals.weight, how="", source=source),
        f"{prefix}.rivals.logits.bias": Derived(tensor=rivals.bias, how="", source=source),
        f"{prefix}.rivals.text": Derived(tensor=texts, how="names of the labels", source=source),
    }
