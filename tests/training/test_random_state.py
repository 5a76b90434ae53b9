"""Random numbers: seeded, saved as tensors, put back."""

import random

import numpy as np
import torch

from metr.training.random_state import random_state, restore_random_state, seed_everything, undisturbed_random_state

CPU = torch.device("cpu")


def draw() -> list[float]:
    generator = np.random
    return [random.random(), random.gauss(0, 1), generator.normal(), torch.rand(()).item(), torch.randn(3).sum().item()]


def test_the_state_gives_the_same_numbers_again() -> None:
    seed_everything(3)
    draw()  # leaves half a pair of normal numbers behind in Python's and NumPy's generators
    state = {name: value.clone() for name, value in random_state(CPU).items()}
    first = [draw(), draw()]
    restore_random_state(state, CPU)
    assert [draw(), draw()] == first


def test_seeding_decides_everything() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(now != then for now, then in zip(draw(), first, strict=True))


def test_a_block_leaves_no_trace() -> None:
    seed_everything(1)
    expected = [draw(), draw()]
    seed_everything(1)
    first = draw()
    with undisturbed_random_state(CPU):
        draw()
    assert [first, draw()] == expected


def test_shapes_never_change() -> None:
    before = {name: value.shape for name, value in random_state(CPU).items()}
    draw()
    assert {name: value.shape for name, value in random_state(CPU).items()} == before
