"""Groups of queries, and attention inside each: with a mask, or group by group where that is less work."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

# added to similarities with what fills a group up, whose weight then is 0 exactly
_NEVER = -1e9
# Groups of at most so many queries are computed together, filled up to the longest of them; longer ones are, too.
_LIMITS = (12, 48)
# Attention group by group moves the queries first: it is worth that if it compares at most this fraction of all pairs.
_WORTH = 0.5


@dataclass(frozen=True, kw_only=True)
class GroupRows:
    """Groups in rows of one length.

    `queries` are indices of the batch's queries, in which images follow each other; `bias` is 0 at the queries of a
    group and very negative at what fills its row up.
    """

    queries: Int[Tensor, "r g"]
    bias: Float[Tensor, "r 1 1 g"]


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """All groups in rows of few lengths. `cells` is the place of each query of the batch in the rows, end to end."""

    rows: tuple[GroupRows, ...]
    cells: Int[Tensor, "n"]


@dataclass(frozen=True, kw_only=True)
class QueryGroups:
    """Which queries attend to which: those of one group to each other. `layout` is None where a mask is used."""

    numbers: Int[Tensor, "b q"]
    layout: GroupLayout | None

    @property
    def mask(self) -> Bool[Tensor, "b q q"]:
        """True where two queries are of one group."""
        return self.numbers.unsqueeze(2) == self.numbers.unsqueeze(1)


def query_groups(numbers: Int[Tensor, "b q"]) -> QueryGroups:
    """The groups of queries that have these numbers.

    Rows are made on CPUs only: how many there are has to be known on the host, which would wait for a device. Compilers
    and exported graphs could not know it.
    """
    on_host = numbers.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return QueryGroups(numbers=numbers, layout=_layout(numbers) if on_host and numbers.numel() else None)


def _layout(numbers: Int[Tensor, "b q"]) -> GroupLayout | None:
    """The groups of all images, those of similar lengths together; None where that saves too little."""
    count = numbers.shape[1]
    ordered, order = numbers.sort(dim=1, stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    lengths = torch.diff(starts, append=starts.new_tensor([numbers.numel()]))
    queries = (order + torch.arange(len(numbers)).unsqueeze(1) * count).flatten()
    cells, rows, total, pairs = torch.empty_like(queries), list[GroupRows](), 0, 0
    for least, most in pairwise((0, *_LIMITS, count)):
        here = (lengths > least) & (lengths <= most)
        if not here.any():
            continue
        place = torch.arange(int(lengths[here].max()))
        filled = place < lengths[here].unsqueeze(1)
        row = queries[(starts[here].unsqueeze(1) + place).clamp(max=len(queries) - 1)]
        cells[row[filled]] = total + filled.flatten().nonzero().flatten()
        bias = torch.where(filled, 0.0, _NEVER).unsqueeze(1).unsqueeze(1)
        rows.append(GroupRows(queries=row, bias=bias))
        total, pairs = total + row.numel(), pairs + row.numel() * len(place)
    return GroupLayout(rows=tuple(rows), cells=cells) if pairs <= _WORTH * numbers.numel() * count else None


def attend_in_groups(
    queries: Float[Tensor, "b heads q c"],
    keys: Float[Tensor, "b heads q c"],
    values: Float[Tensor, "b heads q e"],
    layout: GroupLayout,
) -> Float[Tensor, "b heads q e"]:
    """Attention inside each group, in float32."""
    with torch.autocast("cpu", enabled=False):
        flat = [rearrange(tokens.float(), "b heads q c -> (b q) heads c") for tokens in (queries, keys, values)]
        seen = []
        for rows in layout.rows:
            query, key, value = (
                rearrange(
                    tokens.index_select(0, rows.queries.flatten()), "(r g) heads c -> r heads g c", r=len(rows.bias)
                )
                for tokens in flat
            )
            weights = softmax_of_few(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2) + rows.bias)
            seen.append(rearrange(weights @ value, "r heads g c -> (r g) heads c"))
        return rearrange(torch.cat(seen).index_select(0, layout.cells), "(b q) heads c -> b heads q c", b=len(queries))


def softmax_of_few(scores: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows k"]:
    """The softmax of many rows of few scores.

    torch takes rows one by one, and on CPUs some ten times as long for rows so short as for whole columns of them.
    """
    if scores.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return scores.softmax(-1)
    columns = rearrange(scores, "... k -> k (...)")
    return columns.softmax(0).t().reshape(scores.shape)
