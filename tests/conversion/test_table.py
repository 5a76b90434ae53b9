"""Key tables: what moves, what stays, and what cannot."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metr.conversion.published.dino import AUTHORS
from metr.conversion.table import Row, to_ours, to_theirs
from metr.errors import CheckpointError
from metr.layers.attention import Attention

TABLE = (
    Row("enc.{i}.lin.{p}", "layers.{i}.linear.{p}"),
    Row("enc.{i}.in_proj_{p}", tuple(f"layers.{{i}}.{name}.{{p}}" for name in ("query", "key", "value"))),
    Row("embed", "level_embedding"),
)


def theirs(layers: int = 12) -> dict[str, Tensor]:
    state = {"embed": torch.randn(4, 6)}
    for i in range(layers):
        state |= {
            f"enc.{i}.lin.weight": torch.randn(5, 6),
            f"enc.{i}.lin.bias": torch.randn(5),
            f"enc.{i}.in_proj_weight": torch.randn(18, 6),
            f"enc.{i}.in_proj_bias": torch.randn(18),
        }
    return state


def test_every_key_moves_to_its_own_layer() -> None:
    source = theirs()
    moved = to_ours(source, TABLE)
    assert set(moved.used) == set(source)
    assert moved.left_over == ()
    assert len(moved.state) == 1 + 12 * 8
    assert torch.equal(moved.state["level_embedding"], source["embed"])
    for i in (0, 1, 11):
        assert torch.equal(moved.state[f"layers.{i}.linear.weight"], source[f"enc.{i}.lin.weight"])
        stacked = torch.cat([moved.state[f"layers.{i}.{name}.bias"] for name in ("query", "key", "value")])
        assert torch.equal(stacked, source[f"enc.{i}.in_proj_bias"])


def test_there_and_back() -> None:
    source = theirs()
    ours = to_ours(source, TABLE)
    back = to_theirs(ours.state, TABLE)
    assert set(back.used) == set(ours.state)
    assert back.left_over == ()
    assert back.state.keys() == source.keys()
    assert all(torch.equal(back.state[key], source[key]) for key in source)


def test_what_no_row_names_is_left_over() -> None:
    extra = {
        "head.weight": torch.randn(2),
        "enc.0.lin.scale": torch.randn(2),  # neither weight nor bias
        "enc.x.lin.weight": torch.randn(2),  # no number
        "prefix.enc.0.lin.weight": torch.randn(2),
        "encX0.lin.weight": torch.randn(2),  # a dot is a dot
        "enc.0.lin.weight.more": torch.randn(2),
    }
    moved = to_ours(theirs(1) | extra, TABLE)
    assert set(moved.left_over) == set(extra)
    ours = moved.state | {"layers.0.norm.weight": torch.randn(2)}
    assert to_theirs(ours, TABLE).left_over == ("layers.0.norm.weight",)


def test_the_first_row_that_fits_counts() -> None:
    table = (Row("a.0.{p}", "first.{p}"), Row("a.{i}.{p}", "other.{i}.{p}"))
    moved = to_ours({"a.0.weight": torch.zeros(1), "a.1.weight": torch.ones(1)}, table)
    assert set(moved.state) == {"first.weight", "other.1.weight"}


def test_two_keys_of_one_name_are_refused() -> None:
    table = (Row("a.{p}", "c.{p}"), Row("b.{p}", "c.{p}"))
    with pytest.raises(CheckpointError, match=r"two keys become 'c\.weight'") as error:
        to_ours({"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}, table)
    assert error.value.where == "b.weight"


def test_numbers_without_an_axis_move_too() -> None:
    """The batch counts of batch normalisation."""
    table = (Row("bn.count", "norm.count"),)
    moved = to_ours({"bn.count": torch.tensor(7)}, table)
    assert moved.state["norm.count"].item() == 7
    assert to_theirs(moved.state, table).state["bn.count"].item() == 7


def test_a_count_of_batches_is_the_same_for_all_parts_of_a_stack() -> None:
    table = (Row("norm.{n}", ("side.{n}", "main.{n}")),)
    theirs = {"norm.weight": torch.arange(4.0), "norm.num_batches_tracked": torch.tensor(7)}
    moved = to_ours(theirs, table)
    assert moved.state["side.num_batches_tracked"] == moved.state["main.num_batches_tracked"] == 7
    assert moved.state["main.weight"].tolist() == [2, 3]
    back = to_theirs(moved.state, table)
    assert back.left_over == ()
    assert back.state["norm.num_batches_tracked"] == 7
    assert torch.equal(back.state["norm.weight"], theirs["norm.weight"])


def test_a_stack_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="3 equal parts") as error:
        to_ours({"enc.0.in_proj_weight": torch.zeros(16, 6)}, TABLE)
    assert error.value.where == "enc.0.in_proj_weight"
    with pytest.raises(CheckpointError, match="3 equal parts"):
        to_ours({"enc.0.in_proj_weight": torch.zeros(2, 6)}, TABLE)
    with pytest.raises(CheckpointError, match="3 equal parts"):
        to_ours({"enc.0.in_proj_weight": torch.tensor(1.0)}, TABLE)


def test_a_stack_with_a_part_missing_is_refused() -> None:
    state = dict(to_ours(theirs(1), TABLE).state)
    del state["layers.0.key.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.0\.key\.weight") as error:
        to_theirs(state, TABLE)
    assert error.value.where == "enc.0.in_proj_weight"


def test_the_stack_of_pytorchs_attention_gives_the_same_answers() -> None:
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    table = (
        Row("in_proj_{p}", ("query.{p}", "key.{p}", "value.{p}")),
        Row("out_proj.{p}", "out.{p}"),
    )
    ours = Attention(12, 3)
    ours.load_state_dict(to_ours(reference.state_dict(), table).state)
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(tokens, tokens, tokens), reference(tokens, tokens, tokens)[0])


def test_moved_weights_can_be_saved(tmp_path: Path) -> None:
    """safetensors refuses tensors that share a storage, as the parts of a stack would."""
    moved = to_ours(theirs(1), TABLE)
    save_file(moved.state, tmp_path / "ours.safetensors")
    save_file(to_theirs(moved.state, TABLE).state, tmp_path / "theirs.safetensors")


def test_one_of_ours_may_become_several_of_theirs(tmp_path: Path) -> None:
    """Heads that are one module with us, and copies with them."""
    table = (Row("head.0.{p}", "head.{p}"), Row("head.1.{p}", "head.{p}"))
    moved = to_theirs({"head.weight": torch.randn(2, 3)}, table)
    assert set(moved.state) == {"head.0.weight", "head.1.weight"}
    assert moved.used == ("head.weight",)
    save_file(moved.state, tmp_path / "theirs.safetensors")


def test_no_name_of_the_authors_table_is_claimed_twice() -> None:
    ours = [part for row in AUTHORS for part in row.parts]
    assert len(ours) == len(set(ours))
    assert len({row.theirs for row in AUTHORS}) == len(AUTHORS)
