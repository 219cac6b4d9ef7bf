"""Sampling a hierarchy of codes: against PyTorch, and requests against each other."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import edited

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.models.ops import sample
from vqdeploy.models.pixels import channels_first, channels_last, to_range, to_uint8
from vqdeploy.runtime import load
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import level_names
from vqdeploy.runtime.noise import gumbel
from vqdeploy.runtime.onnxrt import OnnxrtSession
from vqdeploy.runtime.sampler import Item

LABELS = [0, 2, 1]
WHOLE = {"temperature": 1, "top_k": 0, "top_p": 1}
GRID, TOP, SIZE, SIDE = 45, 9, 32, 24  # codes, those of the top level, codebook, pixels


@pytest.fixture(params=["vqvae2_plan", "vqvae2_portable_plan", "three_plan"])
def any_pipeline(request, pipelines):
    """A pipeline, its system and labels of three images."""
    system = "three" if request.param.startswith("three") else "vqvae2"
    labels = LABELS if system == "vqvae2" else [0] * 3
    return pipelines(request.param), request.getfixturevalue(f"{system}_system"), labels


@pytest.fixture(scope="module")
def pipelines(request):
    """Opens each plan once."""
    opened = {}

    def pipeline(name):
        if name not in opened:
            opened[name] = load(request.getfixturevalue(name), threads=1)
        return opened[name]

    return pipeline


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)


# Against PyTorch


def noise_of(count, seed=0, first_image=0):
    """The plan's own noise for a number of images, by position."""

    def noise(position):
        out = np.empty((count, 1, SIZE), np.float32)
        gumbel([(seed, first_image + image, position) for image in range(count)], out)
        return torch.from_numpy(out)

    return noise


def in_pytorch(system, labels, noise, temperature=1.0, top_k=0, top_p=1.0):
    shape = (len(labels), 1)
    options = torch.full(shape, float(temperature)), torch.full(shape, top_k or SIZE), torch.full(shape, float(top_p))
    return system.prior.generate(torch.tensor(labels), noise, *options).numpy()


@torch.no_grad()
def level_by_level(system, labels, known, noise, temperature, top_k, top_p):
    """As `in_pytorch`, with options of each level and some codes known; -1 where they are not."""
    parts = np.split(known, np.cumsum([level.config.grid[0] ** 2 for level in system.prior.levels])[:-1], 1)
    above, first, found = None, 0, []
    for i, (network, part) in enumerate(zip(system.prior.levels, parts, strict=True)):

        def draw(position, logits, i=i, part=part, first=first):
            options = torch.tensor(temperature[i]), torch.tensor(top_k[i]), torch.tensor(top_p[i])
            drawn = sample(logits, noise(first + position)[:, 0], *(option.expand(len(logits)) for option in options))
            given = torch.from_numpy(part)[:, position]
            return torch.where(given < 0, drawn, given)

        condition = network.embed_condition(torch.tensor(labels), above)
        above = network.generate(len(labels), condition, draw)
        found.append(above.flatten(1).numpy())
        first += part.shape[1]
    return np.concatenate(found, 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_likeliest_codes_are_those_of_pytorch(any_pipeline, batch):
    pipeline, system, labels = any_pipeline
    expected = in_pytorch(system, labels[:batch], lambda _: torch.zeros(batch, 1, SIZE))
    np.testing.assert_array_equal(pipeline.generate(labels[:batch], temperature=0, seed=7).codes, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}])
def test_generate_draws_the_codes_that_pytorch_draws(any_pipeline, options, batch):
    pipeline, system, labels = any_pipeline
    expected = in_pytorch(system, labels[:batch], noise_of(batch, seed=3, first_image=5), **options)
    result = pipeline.generate(labels[:batch], seed=3, first_image=5, **(WHOLE | options))
    np.testing.assert_array_equal(result.codes, expected)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_logits_are_those_of_the_full_pass(any_pipeline, batch):
    pipeline, system, labels = any_pipeline
    codes = np.random.default_rng(batch).integers(0, SIZE, (batch, *pipeline.grid))
    expected = system.prior.logits(torch.from_numpy(codes), torch.tensor(labels[:batch])).numpy()

    def forced(keys, rows):
        for (_, image, place), row in zip(keys, rows, strict=True):
            row[:] = 0
            row[0, codes[image, place]] = 1e9  # beside which no logit counts

    options, found = pipeline.options(**WHOLE), []
    with pipeline.sampler(batch) as sampler:
        sampler.draw = forced
        for slot, label in enumerate(labels[:batch]):
            sampler.admit(slot, Item(np.full(pipeline.grid, -1), label, 0, slot, options))
        while sampler.left(0):
            sampler.step()
            found.append(sampler.last.outputs["logits"][:, 0].copy())
        np.testing.assert_array_equal([sampler.codes(slot) for slot in range(batch)], codes)
    np.testing.assert_allclose(np.stack(found, 1), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_batch_computes_the_slots_up_to_the_last_one(any_pipeline):
    pipeline, _, labels = any_pipeline
    item = Item(np.full(pipeline.grid, -1), labels[1], 3, 0, pipeline.options(**WHOLE))
    alone = None
    with pipeline.sampler(5) as sampler:
        for slot, rows in ((0, 1), (1, 2), (2, 4), (4, 5), (0, 1)):
            sampler.admit(slot, item)
            while not sampler.step():
                assert len(sampler.last.inputs["noise"]) == rows
            codes = sampler.codes(slot)
            alone = codes if alone is None else alone
            np.testing.assert_array_equal(codes, alone)
            sampler.release(slot)


def test_defaults_come_from_the_checkpoint(vqvae2_pipeline, vqvae2_system):
    expected = in_pytorch(vqvae2_system, LABELS, noise_of(3), temperature=0.9)
    result = vqvae2_pipeline.generate(LABELS)
    np.testing.assert_array_equal(result.codes, expected)
    assert result.options == {"seed": 0, "labels": LABELS, "temperature": 0.9, "top_k": 0, "top_p": 1.0}


def test_options_of_each_level(vqvae2_pipeline, vqvae2_system):
    options = {"temperature": [0.5, 2.0], "top_k": [4, SIZE], "top_p": [1.0, 0.7]}
    unknown = np.full((3, GRID), -1)
    expected = level_by_level(vqvae2_system, LABELS, unknown, noise_of(3), **options)
    np.testing.assert_array_equal(vqvae2_pipeline.generate(LABELS, **options).codes, expected)


def test_a_top_level_that_is_greedy_does_not_depend_on_the_seed(vqvae2_pipeline):
    runs = [vqvae2_pipeline.generate(LABELS, seed=seed, temperature=[0, 1], top_k=0, top_p=1).codes for seed in (1, 2)]
    np.testing.assert_array_equal(runs[0][:, :TOP], runs[1][:, :TOP])
    np.testing.assert_array_equal(runs[0][:, :TOP], vqvae2_pipeline.generate(LABELS, temperature=0).codes[:, :TOP])
    assert (runs[0][:, TOP:] != runs[1][:, TOP:]).mean() > 0.5


def test_images_go_in_and_out_as_in_pytorch(any_pipeline):
    pipeline, system, _ = any_pipeline
    pixels = np.random.default_rng(0).integers(0, 256, (3, *pipeline.image_shape), np.uint8)
    with torch.no_grad():
        codes = system.tokenizer.encode(to_range(channels_first(torch.from_numpy(pixels)), (-1.0, 1.0)))
        decoded = channels_last(to_uint8(system.tokenizer.decode(codes), (-1.0, 1.0))).numpy()
    np.testing.assert_array_equal(pipeline.encode(pixels), codes)
    assert np.abs(pipeline.reconstruct(pixels).astype(int) - decoded).max() <= 1
    assert [level.shape for level in pipeline.maps(codes.numpy())] == [
        (3, *level.config.grid, 1) for level in system.prior.levels
    ]


# The same request in other ways


def test_an_image_is_the_same_alone_and_in_a_batch(any_pipeline):
    pipeline, _, labels = any_pipeline
    batch = pipeline.generate(labels, seed=5).codes
    for i, label in enumerate(labels):
        np.testing.assert_array_equal(pipeline.generate([label], seed=5, first_image=i).codes[0], batch[i])


def test_a_request_that_is_split_gives_the_same_codes(vqvae2_pipeline, vqvae2_splitting_pipeline):
    sizes = []
    whole = vqvae2_pipeline.generate(LABELS, seed=2, first_image=3).codes
    split = vqvae2_splitting_pipeline.generate(
        LABELS, seed=2, first_image=3, callback=lambda step: sizes.append(len(step.codes))
    )
    np.testing.assert_array_equal(split.codes, whole)
    assert sizes == [2] * GRID + [1] * GRID


def test_no_call_takes_more_images_than_memory_allows(vqvae2_pipeline):
    sizes = set()
    vqvae2_pipeline.generate([0] * 17, callback=lambda step: sizes.add(len(step.codes)))
    assert sizes == {16, 1}


def test_what_was_generated_before_does_not_matter(any_pipeline):
    pipeline, _, labels = any_pipeline
    first = pipeline.generate(labels[:2], seed=4).codes
    pipeline.generate(labels, seed=5, temperature=2)
    np.testing.assert_array_equal(pipeline.generate(labels[:2], seed=4).codes, first)


def test_what_is_left_in_the_buffers_does_not_matter(any_pipeline):
    pipeline, _, labels = any_pipeline
    first = pipeline.generate(labels[:2], seed=4).codes
    poisoned = 0
    with pipeline.sampler(2) as sampler:
        for level in sampler._levels:
            _, condition, rows, pixel, _ = level._buffers
            for binding in filter(None, (condition, *rows, pixel)):
                for buffer in (*binding.inputs.values(), *binding.outputs.values()):
                    buffer[:] = np.nan if buffer.dtype == np.float32 else 0
                    poisoned += 1
    assert poisoned > 50
    np.testing.assert_array_equal(pipeline.generate(labels[:2], seed=4).codes, first)


def test_seeds_labels_and_images_matter(vqvae2_pipeline):
    requests = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    results = [
        vqvae2_pipeline.generate([label], seed=seed, first_image=image, **WHOLE).codes
        for seed, image, label in requests
    ]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert (first[:, :TOP] != second[:, :TOP]).any()
            assert (first != second).mean() > 0.2


def test_labels_matter_to_each_level(vqvae2_pipeline):
    """The finer level does not only follow the coarser one."""
    known = np.full((2, GRID), -1)
    known[:, :TOP] = np.arange(TOP)
    codes = vqvae2_pipeline.complete(known, [0, 1], temperature=0).codes
    assert (codes[0] != codes[1]).any()


# Completion


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_known_codes_are_kept_and_the_others_drawn_as_pytorch_draws_them(vqvae2_pipeline, vqvae2_system, seed):
    rng = np.random.default_rng(seed)
    known = rng.integers(0, SIZE, (2, GRID))
    known[rng.random((2, GRID)) < rng.random()] = -1
    before = known.copy()
    result = vqvae2_pipeline.complete(known, [0, 1], seed=seed, **WHOLE).codes
    options = {"temperature": [1.0, 1.0], "top_k": [SIZE, SIZE], "top_p": [1.0, 1.0]}
    np.testing.assert_array_equal(known, before)  # the request is not written to
    np.testing.assert_array_equal(
        result, level_by_level(vqvae2_system, [0, 1], known, noise_of(2, seed=seed), **options)
    )


@pytest.mark.parametrize("known", [1, 4, TOP, TOP + 1, TOP + 20, GRID])
def test_completing_a_prefix_goes_on_as_sampling_would(vqvae2_pipeline, known):
    whole = vqvae2_pipeline.generate(LABELS, seed=3).codes
    start = whole.copy()
    start[:, known:] = -1
    np.testing.assert_array_equal(vqvae2_pipeline.complete(start, LABELS, seed=3).codes, whole)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_resample_keeps_the_coarse_levels(three_pipeline, keep):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    encoded, count = three_pipeline.encode(pixels), (0, 4, 20)[keep]
    result = three_pipeline.resample(pixels, keep=keep, seed=1, **WHOLE)
    np.testing.assert_array_equal(result.codes[:, :count], encoded[:, :count])
    levels = zip(*map(three_pipeline.maps, (result.codes, encoded)), strict=True)
    changed = [(level != old).mean() for level, old in levels]
    assert min(changed[keep:]) > 0.3
    known = np.where(np.arange(84) < count, encoded, -1)
    np.testing.assert_array_equal(result.codes, three_pipeline.complete(known, [0, 0], seed=1, **WHOLE).codes)
    np.testing.assert_array_equal(result.images, three_pipeline.decode(result.codes))


def test_resample_draws_several_of_each_image(vqvae2_pipeline, images):
    encoded = vqvae2_pipeline.encode(images)
    result = vqvae2_pipeline.resample(images, LABELS, completions=2, seed=1, first_image=4)
    np.testing.assert_array_equal(result.codes[:, :TOP], np.tile(encoded[:, :TOP], (2, 1)))
    assert (result.codes[:3, TOP:] != result.codes[3:, TOP:]).mean() > 0.3
    assert result.options["labels"] == LABELS * 2
    known = encoded[1:2].copy()
    known[:, TOP:] = -1
    alone = vqvae2_pipeline.complete(known, [2], seed=1, first_image=4 + 3 + 1).codes
    np.testing.assert_array_equal(alone[0], result.codes[4])


@pytest.mark.parametrize(("ratio", "rows"), [(0, (3, 6)), (0.25, (2, 4)), (0.5, (1, 3)), (1, (0, 0))])
def test_inpaint_keeps_the_upper_rows_of_each_level(vqvae2_pipeline, images, ratio, rows):
    result = vqvae2_pipeline.inpaint(images, LABELS, mask_ratio=ratio, **WHOLE).codes
    levels = zip(vqvae2_pipeline.maps(result), vqvae2_pipeline.maps(vqvae2_pipeline.encode(images)), rows, strict=True)
    for found, encoded, kept in levels:
        np.testing.assert_array_equal(found[:, :kept], encoded[:, :kept])
        assert kept == found.shape[1] or (found[:, kept:] != encoded[:, kept:]).mean() > 0.3


def test_inpaint_begins_at_the_first_row_that_the_mask_touches(vqvae2_pipeline, images):
    """A row of the top level is 8 pixels high, one of the bottom level 4."""
    mask = np.zeros(images.shape[:3], bool)
    mask[0, 23, 3] = mask[1, 12, 0] = True
    result = vqvae2_pipeline.maps(vqvae2_pipeline.inpaint(images, LABELS, mask=mask, **WHOLE).codes)
    encoded = vqvae2_pipeline.maps(vqvae2_pipeline.encode(images))
    for image, rows in enumerate([(2, 5), (1, 3), (3, 6)]):
        for found, old, first in zip(result, encoded, rows, strict=True):
            np.testing.assert_array_equal(found[image, :first], old[image, :first])
            assert first == len(old[image]) or (found[image, first:] != old[image, first:]).any()
    one = np.zeros((SIDE, SIDE), bool)
    one[12, 7] = True
    repeated = vqvae2_pipeline.inpaint(images, LABELS, mask=np.broadcast_to(one, images.shape[:3])).codes
    np.testing.assert_array_equal(vqvae2_pipeline.inpaint(images, LABELS, mask=one).codes, repeated)


# What a request reports


def test_the_callback_sees_every_place(vqvae2_pipeline):
    seen = []
    result = vqvae2_pipeline.generate(LABELS, callback=seen.append)
    assert [(each.step, each.steps, each.images) for each in seen] == [(i, GRID, range(3)) for i in range(1, GRID + 1)]
    for each in seen:
        np.testing.assert_array_equal(each.codes[:, : each.step], result.codes[:, : each.step])
        assert (each.codes[:, each.step :] == -1).all()


def test_a_level_that_is_known_is_not_run(vqvae2_pipeline, images):
    steps, codes = [], vqvae2_pipeline.encode(images)
    vqvae2_pipeline.resample(images, LABELS, callback=lambda step: steps.append((step.step, step.steps)))
    assert steps == [(i, GRID - TOP) for i in range(1, GRID - TOP + 1)]
    known = np.where(np.arange(GRID) < TOP, -1, codes)
    _, seconds = vqvae2_pipeline.sample(known, LABELS)
    assert set(seconds) == {"top_row", "top_pixel"}
    found, seconds = vqvae2_pipeline.sample(codes, LABELS)
    assert seconds == {}
    np.testing.assert_array_equal(found, codes)


def test_timings_add_up(vqvae2_pipeline):
    timings = vqvae2_pipeline.generate(LABELS).timings
    assert min(timings.values()) > 0
    assert timings["steps_s"] + timings["host_s"] + timings["decode_s"] == pytest.approx(timings["total_s"])
    _, seconds = vqvae2_pipeline.sample(np.full((1, GRID), -1), [0])
    assert set(seconds) == {"top_row", "top_pixel", "bottom_condition", "bottom_row", "bottom_pixel"}


@pytest.mark.parametrize(
    ("count", "names"),
    [(1, ["top"]), (2, ["top", "bottom"]), (4, ["top", "middle1", "middle2", "bottom"])],
)
def test_names_of_levels(count, names):
    assert level_names(count) == names


# Caches


PIXELS = [
    ("vqvae2_plan", "top_pixel"),
    ("vqvae2_plan", "bottom_pixel"),
    ("vqvae2_portable_plan", "top_pixel"),
    ("three_plan", "top_pixel"),
]


def filled(session):
    binding = session.bind({"batch": 2})
    rng = np.random.default_rng(0)
    for buffer in binding.inputs.values():
        if buffer.dtype == np.float32:
            buffer[:] = rng.random(buffer.shape) + 0.1
    binding.inputs["top_k"][:] = SIZE
    binding.inputs["row"][:] = binding.inputs["column"][:] = 1
    return binding


@pytest.mark.parametrize(("plan", "stage"), PIXELS)
def test_caches_are_updated_in_place(pipelines, plan, stage):
    session = pipelines(plan).session(stage)
    binding = filled(session)
    before = {name: buffer.copy() for name, buffer in binding.inputs.items()}
    binding.run()
    results = dict(zip([o.name for o in session.stage.outputs], binding._io.get_outputs(), strict=True))
    kinds = {name.split(".")[0] for name in session.stage.aliases.values()}
    assert kinds >= ({"past_key", "past_value"} if stage.startswith("top") else set())
    assert kinds
    for output, name in session.stage.aliases.items():
        cache = binding.inputs[name]
        assert results[output].data_ptr() == cache.ctypes.data
        (place,) = np.flatnonzero((cache != before[name]).any((0, 1, 3)))
        width = 2 if plan.startswith("three") else 3
        assert place == (width if name.startswith(("past_key", "past_value")) else 1)  # place 1, 1 and the one before


@pytest.mark.parametrize(("plan", "stage"), PIXELS)
def test_onnxruntime_makes_no_copy_of_a_cache(request, plan, stage, monkeypatch, capfd):
    """ONNX Runtime warns when TensorScatter has to copy; with a second buffer for the result it does."""
    options = ort.SessionOptions

    def talkative():
        made = options()
        monkeypatch.setattr(type(made), "log_severity_level", property(lambda _: 2, lambda *_: None), raising=False)
        return made

    bundle = Bundle(request.getfixturevalue(plan))
    monkeypatch.setattr(ort, "SessionOptions", talkative)
    session = OnnxrtSession(bundle, bundle.manifest.stage(stage), threads=1)
    binding = filled(session)
    binding.run()
    assert "in-place optimization not activated" not in capfd.readouterr().err
    for output in session.stage.aliases:
        binding._io.bind_output(output, "cpu")
    binding.run()
    assert "in-place optimization not activated" in capfd.readouterr().err


# What is refused


def refused(call, *args, **kwargs):
    with pytest.raises(VqdeployError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_resampling_codes_of_one_level(pipeline):
    one = np.zeros((1, 16, 16, 3), np.uint8)
    assert "one level" in refused(pipeline.resample, one, [0])


@pytest.mark.parametrize("keep", [-1, 2, 1.0, None, "1"])
def test_levels_that_are_not_there(vqvae2_pipeline, images, keep):
    assert "expected 0..1" in refused(vqvae2_pipeline.resample, images, LABELS, keep=keep)


@pytest.mark.parametrize("completions", [-1, 0, 1.5])
@pytest.mark.parametrize(("task", "place"), [("resample", {}), ("inpaint", {"mask_ratio": 0.5})])
def test_impossible_completions_are_refused(vqvae2_pipeline, images, task, place, completions):
    refused(getattr(vqvae2_pipeline, task), images, LABELS, completions=completions, **place)


@pytest.mark.parametrize("task", ["resample", "inpaint"])
@pytest.mark.parametrize("labels", [None, [0], [0, 1, 3], [0, 1, -1], [0.5, 1, 2], LABELS * 2])
def test_labels_that_do_not_fit(vqvae2_pipeline, images, task, labels):
    refused(getattr(vqvae2_pipeline, task), images, labels, **({"mask_ratio": 0.5} if task == "inpaint" else {}))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, GRID - 1), int),
        np.zeros(GRID, int),
        np.zeros((1, GRID, 1), int),
        np.zeros((1, 3, 3, 5), int),
        np.zeros((1, GRID)),
        np.full((1, GRID), SIZE),
        np.full((1, GRID), -2),
        np.zeros((0, GRID), int),
    ],
)
def test_codes_that_do_not_fit(vqvae2_pipeline, wrong):
    refused(vqvae2_pipeline.decode, wrong)
    refused(vqvae2_pipeline.complete, wrong, [0] * len(wrong))


def test_codes_have_no_depths_to_leave_out(vqvae2_pipeline, images):
    assert "no depths" in refused(vqvae2_pipeline.reconstruct, images, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": [1, 1, 1]}, "one value or 2, found 3"),
        ({"top_k": [1, SIZE + 1]}, f"0..{SIZE}"),
        ({"guidance_scale": 2}, "no option guidance_scale"),
        ({"steps": 5}, "no option steps"),
    ],
)
def test_options_that_do_not_fit(vqvae2_pipeline, options, message):
    assert message in refused(vqvae2_pipeline.generate, [0], **options)


# Plans that were tampered with


def without(kind):
    """Removes one stage."""
    return lambda data: data.update(stages=[stage for stage in data["stages"] if stage["name"] != kind])


def setting(*path, value):
    def change(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(without(f"{level}_{part}") for level in ("top", "bottom") for part in ("row", "pixel")),
        without("bottom_condition"),
        without("encode"),
        lambda data: data.pop("tokenizer"),
        lambda data: data["tokenizer"].pop("maps"),
        lambda data: data["tokenizer"]["maps"].pop(),
        lambda data: data["tokenizer"]["maps"].reverse(),
        lambda data: data["tokenizer"]["maps"].insert(0, [1, 1, 1]),
        setting("tokenizer", "maps", value=[]),
        setting("tokenizer", "maps", value={}),
        setting("tokenizer", "maps", value=[[3, 3, 1], [4, 9, 1]]),
        setting("tokenizer", "maps", value=[[3, 3, 1], [12, 3, 1]]),
        setting("tokenizer", "maps", value=[[3, 3, 1], [3, 6, 2]]),
        setting("tokenizer", "maps", 0, value=[6, 6, 1]),
        setting("tokenizer", "maps", 1, value=[6]),
        setting("tokenizer", "maps", 1, value=None),
        setting("tokenizer", "maps", 0, 0, value="x"),
        setting("tokenizer", "image", value=[48, 48, 3]),
        setting("tokenizer", "image", 0, value=1e300),
        setting("tokenizer", "codebook_size", value=31),
        setting("sampling", "kind", value="autoregressive"),
        setting("sampling", "kind", value="masked"),
        setting("stages", 3, "inputs", 10, "name", value="above"),
        setting("stages", 3, "inputs", 4, "shape", 1, value=True),
    ],
)
def test_a_plan_whose_parts_do_not_fit(vqvae2_plan, tmp_path, change):
    with pytest.raises(ArtifactError) as caught:
        load(edited(vqvae2_plan, tmp_path / "a.plan", change), threads=1).generate([0])
    assert "\n" not in str(caught.value)


def test_caches_that_are_not_updated_in_place(vqvae2_plan, vqvae2_pipeline, tmp_path):
    """A backend may leave a pair of an output and an input apart."""

    def part(data):
        for stage in data["stages"]:
            stage["aliases"] = {}

    apart = load(edited(vqvae2_plan, tmp_path / "a.plan", part), threads=1)
    np.testing.assert_array_equal(apart.generate(LABELS).codes, vqvae2_pipeline.generate(LABELS).codes)


@pytest.mark.parametrize("codes", [np.zeros((2, 44), int), np.zeros(45, int), [[[0] * 45]], None, [[1], [1, 2]]])
def test_maps_of_something_else(vqvae2_pipeline, codes):
    with pytest.raises(VqdeployError, match="codes"):
        vqvae2_pipeline.maps(codes)


def test_an_image_that_leaves_before_the_first_call(vqvae2_pipeline):
    """It was the only one that had to draw the top level."""
    pipeline, options = vqvae2_pipeline, vqvae2_pipeline.options()
    known = np.where(np.arange(GRID) < TOP, 1, -1)
    with pipeline.sampler(2) as sampler:
        sampler.admit(0, Item(np.full(GRID, -1), 0, 0, 0, options))
        sampler.admit(1, Item(known, 1, 0, 1, options))
        assert sampler.left(1) == GRID
        sampler.release(0)
        assert sampler.left(1) == GRID - TOP
        while not sampler.step():
            pass
        assert (sampler.codes(1) >= 0).all()
