"""Gumbel noise keyed by seed, image and step."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vqdeploy.runtime import noise
from vqdeploy.runtime.noise import ThreadedNoise, gumbel


def draw(seed, images, step, shape=(4, 64), fill=gumbel):
    out = np.full((len(images), *shape), np.nan, np.float32)
    fill([(seed, image, step) for image in images], out)
    return out


@given(st.integers(0, 2**40), st.lists(st.integers(0, 2**40), min_size=1, max_size=6), st.integers(0, 5000))
def test_an_image_has_its_noise_alone_and_in_any_batch(seed, images, step):
    batch = draw(seed, images, step)
    for row, image in zip(batch, images, strict=True):
        np.testing.assert_array_equal(row, draw(seed, [image], step)[0])


@pytest.mark.parametrize("other", [(1, 5, 3), (0, 6, 3), (0, 5, 4), (5, 0, 3), (0, 3, 5)])
def test_seed_image_and_step_each_matter(other):
    def one(seed, image, step):
        return draw(seed, [image], step)[0].ravel()

    assert np.abs(np.corrcoef(one(0, 5, 3), one(*other))[0, 1]) < 0.25
    assert not set(one(0, 5, 3).tolist()) & set(one(*other)[:50].tolist())


def test_steps_do_not_overlap_however_much_each_draws():
    steps = [draw(0, [0], step, (40_000,))[0, :2000] for step in range(6)]
    for i, first in enumerate(steps):
        for second in steps[i + 1 :]:
            assert abs(stats.pearsonr(first, second)[0]) < 0.1


def test_two_calls_give_the_same():
    np.testing.assert_array_equal(draw(3, [1, 2], 7), draw(3, [1, 2], 7))


def test_values_of_a_release_stay_those_of_the_next():
    """Images of a seed must not change. The numbers are Philox's, so they are the same on every machine."""
    out = draw(1, [2], 3, (4,))[0]
    words = np.random.Philox(key=[1, 2], counter=[0, 0, 0, 3]).random_raw(2)
    uniform = [(int(word) >> shift & 0xFFFFFFFF) >> 8 for word in words for shift in (0, 32)]
    np.testing.assert_allclose(out, -np.log(-np.log(np.array(uniform) / 2**24)), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def many():
    return draw(0, range(20), 0, (16, 1563)).ravel().astype(float)  # half a million


def test_it_is_a_standard_gumbel_distribution(many):
    assert many.mean() == pytest.approx(np.euler_gamma, abs=4 * np.pi / np.sqrt(6 * many.size))
    assert many.var() == pytest.approx(np.pi**2 / 6, rel=0.02)
    assert stats.kstest(many, stats.gumbel_r.cdf).pvalue > 0.01


def test_the_largest_of_many_chooses_with_the_probability_of_the_softmax():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    noise = draw(0, range(40), 0, (1000, 4)).reshape(-1, 4)
    counts = np.bincount((np.log(probabilities) + noise).argmax(1), minlength=4)
    assert stats.chisquare(counts, probabilities * len(noise)).pvalue > 0.01


def test_it_is_never_infinite(many):
    assert np.isfinite(many).all()


@pytest.mark.parametrize("value", [0.0, 2**-24, 0.5, 1 - 2**-24])
def test_not_even_for_the_most_extreme_random_numbers(monkeypatch, value):
    """Of 32 random bits the upper 24 are taken, as a share of 2**24."""
    for lower in (0, 0xFF):
        bits = np.uint32(int(value * 2**24) << 8 | lower)
        monkeypatch.setattr(noise._philox, "raw", lambda key, start, count, bits=bits: np.full(count, bits))
        drawn = draw(0, [0], 0)
        assert np.isfinite(drawn).all()
        np.testing.assert_allclose(drawn, -np.log(-np.log(max(value, 2**-25))), rtol=1e-5)


@given(
    threads=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=5),
    seed=st.integers(0, 2**40),
    worth=st.integers(1, 40),
)
def test_any_number_of_threads_draws_the_same(threads, sizes, seed, worth):
    """Odd sizes too, and rows that threads share."""
    keys = [(seed, image, 7) for image in range(len(sizes))]
    expected, found = ([np.full(size, np.nan, np.float32) for size in sizes] for _ in range(2))
    gumbel(keys, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_WORTH_A_THREAD", worth)
        ThreadedNoise(threads)(keys, found)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(2, 9), st.lists(st.integers(1, 500), min_size=1, max_size=8))
def test_shares_are_equal_to_a_few_blocks_and_cover_each_row(count, sizes):
    rows = [np.zeros(size, np.float32) for size in sizes]
    shares = noise._shares([(0, image, 0) for image in range(len(rows))], rows, count)
    assert len(shares) <= count
    assert max(sum(part.size for _, part, _ in share) for share in shares) <= sum(sizes) / count + 2 * 8
    for (_, image, _), part, start in (part for share in shares for part in share):
        assert start % 8 == 0
        rows[image][start : start + part.size] += 1
    assert all((row == 1).all() for row in rows)


@pytest.mark.parametrize("images", [1, 3, 8])
def test_large_draws_that_use_threads_are_the_same(images):
    shape = (4, 65_537)
    batch = draw(3, range(images), 1, shape, fill=ThreadedNoise(3))
    for row, image in zip(batch, range(images), strict=True):
        np.testing.assert_array_equal(row, draw(3, [image], 1, shape)[0])


@pytest.mark.parametrize(("threads", "size", "used"), [(2, 2**16, 0), (2, 2**18, 1), (1, 2**20, 0), (4, 2**18, 3)])
def test_threads_are_those_allowed_and_none_where_they_do_not_pay(threads, size, used):
    """The thread that asks draws a share itself."""
    names = set()
    original = noise._fill

    def note(*part):
        names.add(threading.current_thread().name)
        original(*part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_fill", note)
        draw(0, [0], 0, (size,), fill=ThreadedNoise(threads))
    assert len(names - {threading.current_thread().name}) <= used
    assert (len(names) > 1) == (used > 0)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (1, 1, 7)])
def test_odd_sizes_are_filled(shape):
    assert np.isfinite(draw(0, [0, 1], 0, shape)).all()
