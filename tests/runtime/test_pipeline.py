"""Requests to a loaded plan, against PyTorch and against each other."""

import json
import logging
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqdeploy.cli.tasks import Job, run
from vqdeploy.engines.build import build
from vqdeploy.errors import VqdeployError
from vqdeploy.models.pixels import channels_first, channels_last, to_range, to_uint8
from vqdeploy.runtime import load
from vqdeploy.runtime.manifest import FILE
from vqdeploy.runtime.noise import gumbel

WHOLE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
LABELS = [0, 1, 2, 1, 0]
GRID, SIZE, SIDE = (4, 4, 4), 64, 16


@pytest.fixture(scope="module", params=["plan", "portable_plan"])
def either(request):
    """A pipeline with ONNX Runtime's bodies, and one with the portable ones."""
    return load(request.getfixturevalue(request.param), threads=1)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def codes():
    return np.random.default_rng(0).integers(0, SIZE, (5, *GRID))


# Against PyTorch


def reference(system, labels, seed=0, first_image=0, temperature=1.0, top_k=SIZE, top_p=1.0):
    """What `system.prior.generate` draws from the same noise."""
    batch, (height, width, depth) = len(labels), GRID
    noise = np.empty((height * width, batch, depth, SIZE), np.float32)
    for position in range(height * width):
        gumbel([(seed, first_image + image, position) for image in range(batch)], noise[position])
    options = [
        torch.as_tensor(np.broadcast_to(np.asarray(value, kind), (batch, depth)).copy())
        for value, kind in ((temperature, np.float32), (top_k, np.int64), (top_p, np.float32))
    ]
    return system.prior.generate(torch.tensor(labels), torch.from_numpy(noise).__getitem__, *options).numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 3, "first_image": 7},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.9},
        {"temperature": [0.5, 1, 2, 3], "top_k": [1, 5, 40, 64], "top_p": [1, 0.5, 0.9, 0.2]},
    ],
)
def test_generate_draws_the_codes_that_pytorch_draws(either, system, options):
    result = either.generate(LABELS, **{**WHOLE, **options})
    np.testing.assert_array_equal(result.codes, reference(system, LABELS, **options))


def test_temperature_0_takes_the_likeliest_codes(either, system):
    result = either.generate(LABELS, seed=9, temperature=0)
    np.testing.assert_array_equal(result.codes, reference(system, LABELS, top_k=1))
    np.testing.assert_array_equal(result.codes, either.generate(LABELS, seed=10, temperature=0).codes)


def test_temperature_0_at_one_depth_only(pipeline, system):
    result = pipeline.generate(LABELS, temperature=[1, 0, 1, 0], top_k=0, top_p=1)
    np.testing.assert_array_equal(result.codes, reference(system, LABELS, top_k=[SIZE, 1, SIZE, 1]))


def test_defaults_come_from_the_checkpoint(pipeline, system):
    result = pipeline.generate(LABELS)
    sampling = system.config.sampling.to_dict()
    assert {name: result.options[name] for name in sampling} == sampling
    np.testing.assert_array_equal(result.codes, reference(system, LABELS, **sampling))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, None])
@torch.no_grad()
def test_decode_sums_the_first_codes(either, system, codes, depth):
    partial = torch.from_numpy(np.where(np.arange(4) < (depth or 4), codes, -1))
    expected = channels_last(to_uint8(system.tokenizer.decode(partial), (-1.0, 1.0))).numpy()
    decoded = either.decode(codes, depth)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_depths_differ(pipeline, codes):
    decoded = [pipeline.decode(codes, depth).astype(int) for depth in (1, 2, 3, 4)]
    for coarse, fine in pairwise(decoded):
        assert np.abs(coarse - fine).max() > 20


@torch.no_grad()
def test_encode_finds_the_codes_of_pytorch(either, system, images):
    expected = system.tokenizer.encode(to_range(channels_first(torch.from_numpy(images)), (-1.0, 1.0))).numpy()
    np.testing.assert_array_equal(either.encode(images), expected)


def test_reconstruct_is_encode_and_decode(pipeline, images):
    expected = pipeline.decode(pipeline.encode(images), 2)
    np.testing.assert_array_equal(pipeline.reconstruct(images, 2), expected)


# The same request in other ways


def test_a_request_repeated_gives_the_same_images(either):
    first, second = (either.generate(LABELS, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.images, second.images)


def test_what_was_generated_before_does_not_matter(either):
    """Buffers are reused from call to call."""
    first = either.generate([1, 2], seed=4).codes
    either.generate([0, 0, 0], seed=5)
    either.generate([2, 1], seed=6, temperature=[2, 1, 1, 1])
    np.testing.assert_array_equal(either.generate([1, 2], seed=4).codes, first)


def test_an_image_alone_is_the_image_in_the_batch(either):
    batch = either.generate(LABELS, seed=2).codes
    for i, label in enumerate(LABELS):
        np.testing.assert_array_equal(either.generate([label], seed=2, first_image=i).codes[0], batch[i])


def test_a_request_that_is_split_gives_the_same_codes(pipeline, splitting_pipeline, images, codes):
    whole, split = (p.generate(LABELS, seed=2, first_image=3) for p in (pipeline, splitting_pipeline))
    np.testing.assert_array_equal(whole.codes, split.codes)
    np.testing.assert_array_equal(pipeline.encode(images), splitting_pipeline.encode(images))
    decoded = [p.decode(codes).astype(int) for p in (pipeline, splitting_pipeline)]
    assert np.abs(decoded[0] - decoded[1]).max() <= 1


def test_no_call_is_larger_than_the_plan_allows(splitting_pipeline):
    sizes = []
    splitting_pipeline.generate(LABELS, callback=lambda step: sizes.append(len(step.codes)))
    assert set(sizes) == {2, 1}


def test_seeds_labels_and_images_matter(pipeline):
    results = [
        pipeline.generate([label], seed=seed, first_image=image).codes
        for seed, image, label in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert (first != second).mean() > 0.5


def test_a_plan_loaded_twice_gives_the_same(plan, pipeline):
    np.testing.assert_array_equal(load(plan).generate(LABELS).codes, pipeline.generate(LABELS).codes)


# Completion


def test_completing_nothing_known_is_sampling(either):
    unknown = np.full((5, *GRID), -1)
    np.testing.assert_array_equal(either.complete(unknown, LABELS, seed=3).codes, either.generate(LABELS, seed=3).codes)


@pytest.mark.parametrize("known", [1, 2, 4, 5, 11, 15, 16])
def test_completing_a_prefix_goes_on_as_sampling_would(either, known):
    whole = either.generate(LABELS, seed=3).codes
    start = whole.copy().reshape(5, 16, 4)
    start[:, known:] = -1
    np.testing.assert_array_equal(either.complete(start.reshape(whole.shape), LABELS, seed=3).codes, whole)


@given(st.integers(0, 2**31))
def test_known_codes_are_kept_wherever_they_are(pipeline, seed):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, SIZE, (3, *GRID))
    start[rng.random((3, 4, 4)) < rng.random()] = -1
    before = start.copy()
    result = pipeline.complete(start, [0, 1, 2], seed=seed).codes
    known = start >= 0
    np.testing.assert_array_equal(result[known], start[known])
    assert ((result >= 0) & (result < SIZE)).all()
    np.testing.assert_array_equal(start, before)  # the request is not written to


def test_images_of_a_batch_may_know_different_parts(pipeline):
    start = np.random.default_rng(0).integers(0, SIZE, (3, *GRID))
    start[0, 1:] = start[1, 3:] = -1
    together = pipeline.complete(start, [0, 1, 2], seed=5).codes
    for i in range(3):
        alone = pipeline.complete(start[i : i + 1], [i], seed=5, first_image=i).codes[0]
        np.testing.assert_array_equal(together[i], alone)


def test_a_position_that_is_known_in_part_is_refused(pipeline):
    start = np.zeros((1, *GRID), np.int64)
    start[0, 3, 3] = [5, -1, -1, -1]
    with pytest.raises(VqdeployError, match="only partly known"):
        pipeline.complete(start, [0])


@pytest.mark.parametrize(("ratio", "rows"), [(0, 4), (0.25, 3), (0.5, 2), (0.51, 1), (1, 0)])
def test_inpaint_keeps_the_upper_rows(pipeline, images, ratio, rows):
    result = pipeline.inpaint(images, LABELS, mask_ratio=ratio)
    encoded = pipeline.encode(images)
    np.testing.assert_array_equal(result.codes[:, :rows], encoded[:, :rows])
    assert rows == 4 or (result.codes[:, rows:] != encoded[:, rows:]).mean() > 0.5


def test_inpaint_begins_at_the_first_row_that_the_mask_touches(pipeline, images):
    mask = np.zeros(images.shape[:3], bool)
    mask[0, 15, 3] = mask[1, 4, 0] = mask[2, 3, 0] = True
    result, encoded = pipeline.inpaint(images, LABELS, mask=mask).codes, pipeline.encode(images)
    for image, first in enumerate((3, 1, 0, 4, 4)):
        np.testing.assert_array_equal(result[image, :first], encoded[image, :first])
        assert first == 4 or (result[image, first:] != encoded[image, first:]).any()


@pytest.mark.parametrize("value", [np.nan, 0.5, 2, -1, "no", None])
def test_a_mask_is_of_bool_or_of_0_and_1(pipeline, images, value):
    mask = np.zeros((SIDE, SIDE), object if value is None else np.asarray(value).dtype)
    mask[9] = value
    with pytest.raises(VqdeployError, match="the mask is malformed; expected bool, or numbers 0 and 1"):
        pipeline.inpaint(images, LABELS, mask=mask)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_masks_of_numbers(pipeline, images, dtype):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[9] = True
    expected = pipeline.inpaint(images, LABELS, mask=mask).codes
    np.testing.assert_array_equal(pipeline.inpaint(images, LABELS, mask=mask.astype(dtype)).codes, expected)


def test_one_mask_serves_all_images(pipeline, images):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[9] = True
    expected = pipeline.inpaint(images, LABELS, mask=np.broadcast_to(mask, images.shape[:3])).codes
    np.testing.assert_array_equal(pipeline.inpaint(images, LABELS, mask=mask).codes, expected)


# What a request reports


def test_the_callback_sees_every_step(pipeline):
    seen = []
    result = pipeline.generate(LABELS, callback=seen.append)
    assert [(each.step, each.steps, each.images) for each in seen] == [(i, 16, range(5)) for i in range(1, 17)]
    for each in seen:
        assert each.codes.shape == result.codes.shape
        so_far, whole = each.codes.reshape(5, 16, 4), result.codes.reshape(5, 16, 4)
        np.testing.assert_array_equal(so_far[:, : each.step], whole[:, : each.step])
        assert (so_far[:, each.step :] == -1).all()


def test_the_callback_counts_only_what_is_sampled(pipeline, images):
    seen = []
    pipeline.inpaint(images, LABELS, mask_ratio=0.25, callback=lambda step: seen.append((step.step, step.steps)))
    assert seen == [(i, 4) for i in range(1, 5)]


def test_timings_add_up(pipeline):
    timings = pipeline.generate(LABELS).timings
    assert set(timings) == {"steps_s", "host_s", "decode_s", "total_s"}
    assert min(timings.values()) > 0
    assert timings["steps_s"] + timings["host_s"] + timings["decode_s"] == pytest.approx(timings["total_s"])


def test_options_repeat_the_request(pipeline):
    result = pipeline.generate([2, 0], seed=8, top_k=[1, 2, 3, 4])
    assert result.options == {"seed": 8, "labels": [2, 0], "temperature": 0.9, "top_k": [1, 2, 3, 4], "top_p": 0.95}


def test_labels_and_options_may_be_arrays(pipeline):
    expected = pipeline.generate([2, 0], top_p=[1, 0.5, 0.5, 1])
    result = pipeline.generate(np.array([2, 0]), top_p=np.array([1, 0.5, 0.5, 1]))
    np.testing.assert_array_equal(result.codes, expected.codes)
    assert result.options == expected.options


def test_the_library_does_not_print(pipeline, images, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        pipeline.inpaint(images, LABELS, mask_ratio=0.5)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# What is refused


def refused(call, *args, **kwargs):
    with pytest.raises(VqdeployError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((1, 16, 17, 3), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((1, 16, 16, 4), np.uint8),
        np.zeros((1, 3, 16, 16), np.uint8),
        np.zeros((1, 16, 16, 3), np.float32),
        np.zeros((1, 16, 16, 3), np.int64),
        np.zeros((0, 16, 16, 3), np.uint8),
        None,
        "image",
        [[1], [2, 3]],
    ],
)
@pytest.mark.parametrize("task", ["encode", "reconstruct", "inpaint"])
def test_images_of_another_shape_or_type(pipeline, task, wrong):
    refused(getattr(pipeline, task), wrong, **({"mask_ratio": 0.5, "labels": [0]} if task == "inpaint" else {}))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 4), int),
        np.zeros((1, 4, 4), int),
        np.zeros((1, 4, 4, 3), int),
        np.zeros((1, 4, 4, 4), float),
        np.full((1, 4, 4, 4), SIZE),
        np.full((1, 4, 4, 4), -1),
        np.zeros((0, 4, 4, 4), int),
        None,
    ],
)
def test_codes_of_another_shape_or_out_of_range(pipeline, wrong):
    refused(pipeline.decode, wrong)


@pytest.mark.parametrize("depth", [0, 5, -1, "2", 1.5, True])
def test_a_depth_that_is_not_there(pipeline, codes, depth):
    assert "expected 1..4" in refused(pipeline.decode, codes, depth)


@pytest.mark.parametrize("labels", [[3], [-1], [], [0.5], ["cat"], [[0]], None, [2**70], 0, [True], "0", [[1], [2, 0]]])
def test_labels_that_are_not_there(pipeline, labels):
    refused(pipeline.generate, labels)


def test_as_many_labels_as_images(pipeline, images):
    message = refused(pipeline.inpaint, images, [0, 1], mask_ratio=0.5)
    assert "one for each image (5), found [0, 1]" in message
    for labels in (0, "0", [[1], [2, 0]], True):
        refused(pipeline.inpaint, images[:1], labels, mask_ratio=0.5)


numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.floats(), st.integers(-5, 100)), max_size=5),
)


@settings(max_examples=150)
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("temperature", "top_k", "top_p", "seed", "first_image"), numbers))
)
def test_options_are_refused_or_obeyed(pipeline, options):
    try:
        result = pipeline.generate([0], **options)
    except VqdeployError:
        return
    assert ((result.codes >= 0) & (result.codes < SIZE)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is out of range"),
        ({"temperature": float("nan")}, "temperature is out of range"),
        (
            {"temperature": float("inf")},
            "temperature is out of range; expected a finite number of 0 or more, found inf",
        ),
        ({"temperature": "warm"}, "temperature is malformed; expected a number, found warm"),
        ({"temperature": "0.9"}, "temperature is malformed"),
        ({"temperature": [0.9, "1", 1, 1]}, "temperature is malformed"),
        ({"temperature": [[1], [1, 2]]}, "temperature is malformed"),
        ({"top_p": True}, "top_p is malformed"),
        ({"top_k": "5"}, "top_k is malformed"),
        ({"seed": True}, "seed is out of range"),
        ({"num_images": 3}, "labels already give the number of images"),
        ({"temperature": [1, 1]}, "one value or 4, found 2"),
        ({"top_k": -1}, "top_k is out of range"),
        ({"top_k": 65}, "0..64, found 65"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 1.1}, "top_p is out of range"),
        ({"top_p": [1, 1, 1, 2]}, "top_p is out of range"),
        ({"seed": -1}, "seed is out of range"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"first_image": -1}, "first_image is out of range"),
        ({"first_image": 2**64}, "image"),
    ],
)
def test_options_out_of_range(pipeline, options, message):
    assert message in refused(pipeline.generate, [0], **options)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-20, 1e-10])
def test_tiny_temperatures_take_the_likeliest_codes(pipeline, temperature):
    expected = pipeline.generate([0, 1], temperature=0).codes
    np.testing.assert_array_equal(pipeline.generate([0, 1], temperature=temperature).codes, expected)


@pytest.mark.parametrize("temperature", [1e20, 2**64, 1e300])
def test_huge_temperatures_leave_only_the_noise(pipeline, temperature):
    options = {"temperature": temperature, "top_k": 0, "top_p": 1}
    first, second = (pipeline.generate([label], **options).codes for label in (0, 1))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mask_ratio": 0.5, "mask": np.ones((16, 16), bool)},
        {"mask_ratio": -0.1},
        {"mask_ratio": 1.1},
        {"mask_ratio": float("nan")},
        {"mask_ratio": "0.5"},
        {"mask_ratio": True},
        {"mask_ratio": [0.5, 0.5]},
        {"mask": [[True], [True, False]]},
        {"mask_ratio": 0.5, "completions": 0},
        {"mask": np.ones((8, 8), bool)},
        {"mask": np.ones((4, 16, 16), bool)},
        {"mask": np.ones((5, 16, 16, 3), bool)},
    ],
)
def test_masks_that_do_not_fit(pipeline, images, arguments):
    refused(pipeline.inpaint, images, LABELS, **arguments)


@pytest.mark.parametrize("known", [None, 5, "codes", [[1], [2, 3]]])
def test_complete_refuses_malformed_codes(pipeline, known):
    refused(pipeline.complete, known, [1])


def test_generating_nothing(pipeline):
    assert "the request has no images; expected at least one image" in refused(pipeline.generate, [])


@pytest.mark.parametrize(("name", "label"), [("cat", 0), ("eel", 2), ("0", 0), ("2", 2), (2, 2), (np.int64(1), 1)])
def test_labels_by_name_or_number(pipeline, name, label):
    assert pipeline.label(name) == label


@pytest.fixture(scope="module")
def numbered_plan(package, tmp_path_factory):
    """Its classes are named by numbers that are not their own."""
    folder = shutil.copytree(package, tmp_path_factory.mktemp("numbered") / "package")
    manifest = json.loads((folder / FILE).read_text())
    manifest["labels"] = ["7", "42", "0"]
    (folder / FILE).write_text(json.dumps(manifest))
    build(folder, folder.with_name("a.plan"), portable=True)
    return folder.with_name("a.plan")


def test_classes_that_are_named_by_numbers(numbered_plan):
    """Text is then a name and nothing else, and an int is an index and nothing else."""
    pipeline = load(numbered_plan, threads=1)
    assert [pipeline.label(name) for name in ("7", "42", "0", 0, 1, 2)] == [0, 1, 2, 0, 1, 2]
    for name in ("1", "2", "07", "00", "cat", 7, 42, 3):
        assert f"found {name}" in refused(pipeline.label, name)


def test_the_rows_of_classes_that_are_named_by_numbers(numbered_plan, tmp_path):
    result = run(Job(numbered_plan, num_images=1, output=tmp_path / "a.png", options={"seed": 0}))
    assert result["options"]["labels"] == [0, 1, 2]
    result = run(Job(numbered_plan, labels=["42", "0"], num_images=1, output=tmp_path / "a.png", options={"seed": 0}))
    assert result["options"]["labels"] == [1, 2]


@pytest.mark.parametrize("name", ["3", "-1", "Cat", "", "1.0", "²", 3, -1, True, 1.0, None, [0]])
def test_unknown_label_names(pipeline, name):
    assert "0..2 or one of cat, dog, eel" in refused(pipeline.label, name)


def test_the_session_of_an_unknown_stage(pipeline):
    with pytest.raises(VqdeployError, match="expected encode, decode, step"):
        pipeline.session("pixel")


@pytest.mark.parametrize("count", [np.zeros((1, 8, 8, 4)), -1, 1.5, None, 2**40])
def test_a_number_of_masks_is_a_number(pipeline, count):
    with pytest.raises(VqdeployError, match="count is out of range"):
        pipeline.unknown(count, mask=np.zeros(pipeline.image_shape[:2]))


class _Failing:
    def __init__(self, error):
        self._error = error

    def __array__(self, *_: object, **__: object):
        raise self._error


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), TypeError("x"), MemoryError()])
def test_objects_that_are_no_arrays(pipeline, error):
    odd = _Failing(error)
    for call in (pipeline.generate, pipeline.encode, pipeline.decode, pipeline.preview):
        with pytest.raises(VqdeployError):
            call(odd)
    with pytest.raises(VqdeployError, match="temperature is malformed"):
        pipeline.generate([0], temperature=odd)


@pytest.mark.parametrize("codes", [[[1]], None, "x", np.zeros((1, 4, 4, 4), "M8[s]"), np.full((1, 4, 4, 4), 64)])
def test_previews_of_what_are_no_codes(pipeline, codes):
    with pytest.raises(VqdeployError, match="codes"):
        pipeline.preview(codes)


def test_more_completions_than_anybody_wants(pipeline):
    with pytest.raises(VqdeployError, match="completions is out of range"):
        pipeline.inpaint(np.zeros((1, 16, 16, 3), np.uint8), [0], mask_ratio=0.5, completions=2**40)


class _Mute:
    def __repr__(self):
        raise RuntimeError

    __fspath__ = __str__ = __repr__


def test_names_that_are_none(plan, pipeline):
    with pytest.raises(VqdeployError, match="is not supported"):
        load(plan, device=np.zeros(2))
    for odd in (_Mute(), 10**5000, np.zeros(1, [("a", int)])[0]):
        with pytest.raises(VqdeployError, match="the name of a stage is a string"):
            pipeline.run(odd)
        with pytest.raises(VqdeployError, match="is not supported"):
            load(plan, device=odd)
        with pytest.raises(VqdeployError, match="the plan is not a path"):
            load(odd)
    load(os.fsencode(plan)).close()
