"""Mask counts and the Halton order of plans and of the reference, against the numbers of the public implementations."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqdeploy.reference import schedules as reference
from vqdeploy.runtime.schedules import SCHEDULES, choice_temperature, halton_order, masked_counts, order_noise

# Codes that google-research/maskgit leaves masked after each step, by (schedule, number of codes).
GOOGLE = [
    ("cosine", 256, "251 236 212 181 142 97 49 1"),
    ("cosine", 256, "253 247 236 221 203 181 155 128 97 66 33 1"),
    ("cosine", 256, "254 251 244 236 225 212 197 181 162 142 120 97 74 49 25 1"),
    ("cosine", 1024, "1015 989 946 886 812 724 623 512 391 265 133 1"),
    ("linear", 256, "224 192 160 128 96 64 32 1"),
    ("square", 256, "252 240 220 192 156 112 60 1"),
    ("cubic", 256, "255 252 242 224 193 148 84 1"),
    ("exp", 256, "254 252 248 240 224 192 128 1"),
    ("log", 256, "96 64 45 32 21 13 6 1"),
]

# Codes that each step of valeoai/Maskgit-pytorch settles.
ARCCOS = [
    (256, "1 18 26 32 38 43 48 50"),
    (256, "1 9 13 17 19 22 24 26 28 30 32 35"),
    (1024, "1 26 38 46 54 61 67 73 79 84 89 94 99 104 109"),
]

# Positions that valeoai/Halton-MaskGIT has drawn after each step.
HALTON = [
    (256, "13 27 41 55 70 85 101 118 138 160 188 256"),
    (
        576,
        "11 22 34 45 57 69 80 92 104 116 128 140 153 166 178 191 205 219 233 247 262 277 294 310 328 347 368 390 415 "
        "445 484 576",
    ),
]

ORDER = {
    16: "(8,5) (4,10) (12,1) (2,7) (10,12) (6,3) (14,8) (1,14) (9,0) (5,5) (13,11) (3,2)",
    24: "(12,8) (6,16) (18,2) (3,10) (15,18) (9,5) (21,13) (1,21) (13,0) (7,8) (19,16) (4,3)",
    32: "(16,10) (8,21) (24,3) (4,14) (20,24) (12,7) (28,17) (2,28) (18,1) (10,11) (26,22) (6,4)",
}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize(("schedule", "unknown", "table"), GOOGLE)
def test_counts_of_google(schedule, unknown, table):
    expected = numbers(table)
    assert masked_counts(schedule, unknown, len(expected)).tolist() == expected
    assert reference.masked_counts(schedule, unknown, len(expected)) == expected


@pytest.mark.parametrize(("unknown", "table"), ARCCOS)
def test_counts_of_valeoai(unknown, table):
    """The last step is left out: what it settles is all the rest."""
    gains = numbers(table)
    assert sum(gains) == unknown
    counts = masked_counts("arccos", unknown, len(gains))[:-1]
    assert (-np.diff(counts, prepend=unknown)).tolist() == gains[:-1]


@pytest.mark.parametrize(("unknown", "table"), HALTON)
def test_counts_of_halton(unknown, table):
    drawn = numbers(table)
    assert drawn[-1] == unknown
    assert (unknown - masked_counts("halton", unknown, len(drawn))[:-1]).tolist() == drawn[:-1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(unknown=st.integers(1, 3000), steps=st.integers(1, 120))
def test_every_step_settles_something_until_one_is_left(schedule, unknown, steps):
    counts = masked_counts(schedule, unknown, steps)
    assert counts.shape == (steps,)
    assert counts.dtype == np.int64
    assert counts.min() >= 1
    before = np.array([unknown, *counts[:-1]])
    assert (counts < before)[before > 1].all()
    assert (counts == 1)[before == 1].all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7])
def test_nothing_or_one_to_find(schedule, steps):
    assert masked_counts(schedule, 0, steps).tolist() == [0] * steps
    assert masked_counts(schedule, 1, steps).tolist() == [1] * steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_more_steps_than_codes_the_last_one_stays_open(schedule):
    assert masked_counts(schedule, 5, 40)[4:].tolist() == [1] * 36


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(unknown=st.integers(1, 3000), steps=st.integers(1, 120))
def test_the_reference_has_the_same_counts(schedule, unknown, steps):
    """`verify` judges by the reference, which shares no code with the samplers of plans."""
    assert masked_counts(schedule, unknown, steps).tolist() == reference.masked_counts(schedule, unknown, steps)


@given(step=st.integers(0, 20), left=st.integers(1, 20))
def test_the_reference_has_the_same_choice_temperature(step, left):
    assert choice_temperature(4.5, step, step + left) == reference.choice_weight(4.5, step, step + left)


@pytest.mark.parametrize("grid", [(1, 1, 1), (4, 4, 4), (3, 8, 2), (16, 16, 1), (17, 31, 1)])
def test_the_reference_has_the_same_order(grid):
    np.testing.assert_array_equal(-order_noise(grid), reference.halton_ranks(grid))


@pytest.mark.parametrize("size", ORDER)
def test_the_halton_order_of_the_public_code(size):
    cells = [tuple(map(int, pair.strip("()").split(","))) for pair in ORDER[size].split()]
    assert [divmod(int(place), size) for place in halton_order(size, size)[: len(cells)]] == cells


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (4, 4), (3, 8), (8, 3), (9, 9), (16, 16), (18, 18), (17, 31), (8, 36)]
)
def test_the_halton_order_visits_every_position_once_and_exactly(shape):
    """In fractions: a place on the edge of two cells belongs to the second."""
    order: dict[int, None] = {}
    index = 0
    while len(order) < shape[0] * shape[1]:
        index += 1
        row, column = (mirrored(index, base) * size for base, size in zip((2, 3), shape, strict=True))
        order.setdefault(int(row) * shape[1] + int(column))
    assert halton_order(*shape).tolist() == list(order)


def mirrored(index: int, base: int) -> Fraction:
    value, digit = Fraction(0), Fraction(1)
    while index:
        index, last = divmod(index, base)
        digit /= base
        value += last * digit
    return value


def test_the_halton_order_is_spread_out():
    """Of the first quarter of the positions, each quadrant has about a quarter."""
    rows, columns = np.divmod(halton_order(16, 16)[:64], 16)
    quadrants = np.bincount(2 * (rows // 8) + columns // 8)
    assert quadrants.min() >= 14
