"""Parallel masked decoding, against a transcription of the public rules in plain numpy, and against itself."""

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqdeploy.errors import VqdeployError
from vqdeploy.models.maskgit import unmask
from vqdeploy.reference import generate, guided_logits
from vqdeploy.runtime import load
from vqdeploy.runtime.noise import gumbel

GRID, CELLS, SIZE, SIDE, NO_LABEL = (4, 4, 4), 64, 32, 16, 3
LABELS = [0, 1, 2, 1, 0]
OPEN = -1
WHOLE = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "steps": 8,
    "schedule": "cosine",
    "guidance_scale": 1.0,
    "choice_temperature": 4.5,
}


@pytest.fixture(scope="module", params=["movq_plan", "movq_portable_plan"])
def either(request):
    """A pipeline with ONNX Runtime's bodies, and one with the portable ones."""
    return load(request.getfixturevalue(request.param), threads=1)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def partly_known():
    """From an image that is known whole to one that is not known at all, and one code that is open."""
    rng = np.random.default_rng(1)
    known = rng.integers(0, SIZE, (5, *GRID))
    for image, share in enumerate((0, 0.3, 0.95, 1)):
        known[image][rng.random(GRID) < share] = OPEN
    known[4, 2, 1, 3] = OPEN
    return known


# The public rules, cell by cell


def counts_of_google(share, total, steps):
    """How many cells the schedule wants masked after each step."""
    return [math.floor(total * min(max(share((t + 1) / steps), 1e-6), 1)) for t in range(steps)]


def counts_of_valeoai(total, steps):
    if steps == 1:
        return [1]
    values = [math.acos(1 - t / (steps - 1)) for t in range(steps)]
    gains = [max(1, round(value / sum(values) * total)) for value in values]
    return [total - sum(gains[: t + 1]) for t in range(steps)]


COUNTS = {
    "cosine": lambda total, steps: counts_of_google(lambda r: math.cos(math.pi * r / 2), total, steps),
    "linear": lambda total, steps: counts_of_google(lambda r: 1 - r, total, steps),
    "arccos": counts_of_valeoai,
}


def draw_code(logits, noise, temperature, top_k, top_p):
    """One code, and its log-probability at the temperature before anything is cut off."""
    scaled = logits.astype(np.float32) / np.float32(temperature)
    kept = scaled >= np.sort(scaled)[::-1][top_k - 1]
    if top_p < 1:
        weights = np.exp(scaled.astype(float) - scaled.max()) * kept
        weights /= weights.sum()
        kept &= [weights[scaled > one].sum() < top_p for one in scaled]
    code = np.where(kept, scaled + noise, -np.inf).argmax()
    exact = scaled.astype(float)
    return code, exact[code] - exact.max() - np.log(np.exp(exact - exact.max()).sum())


def draw_cells(logits, noise, temperature, top_k, top_p):
    """Codes and log-probabilities of all cells of one image; the options are numbers, or one for each channel."""
    depth = logits.shape[-2]
    options = [np.broadcast_to(option, depth) for option in (temperature, top_k, top_p)]
    rows = zip(logits.reshape(-1, SIZE), noise.reshape(-1, SIZE), strict=True)
    drawn = [draw_code(*row, *(option[i % depth] for option in options)) for i, row in enumerate(rows)]
    return np.array([code for code, _ in drawn]), np.array([likelihood for _, likelihood in drawn])


def gumbel_of(seed, image, step, shape):
    out = np.empty((1, *shape), np.float32)
    gumbel([(seed, image, step)], out)
    return out[0]


def maskgit(logits_of, known, seed, first_image, steps, counts, choice_temperature, **options):
    """As google-research/maskgit: the class stands in front, a token that is known."""
    batch, grid = len(known), known.shape[1:]
    tokens = np.concatenate([np.full((batch, 1), 10_000), known.reshape(batch, -1)], 1)
    totals = (tokens == OPEN).sum(1)
    history = []
    for t in range(steps):
        logits = logits_of(tokens[:, 1:].reshape(known.shape))
        drawn = tokens.copy()
        for b in range(batch):
            if not totals[b]:
                continue
            unknown = tokens[b] == OPEN
            noise = gumbel_of(seed, first_image + b, 2 * t, logits.shape[1:])
            codes, likelihoods = draw_cells(logits[b], noise, **options)
            drawn[b, unknown] = codes[unknown[1:]]
            choice = gumbel_of(seed, first_image + b, 2 * t + 1, grid).ravel()
            confidence = likelihoods + choice_temperature * (1 - (t + 1) / steps) * choice
            confidence = np.where(unknown, np.concatenate([[0], confidence]), np.inf)
            cut = np.sort(confidence)[max(1, min(unknown.sum() - 1, counts(totals[b], steps)[t]))]
            tokens[b] = np.where(confidence < cut, OPEN, drawn[b])
        history.append(tokens[:, 1:].reshape(known.shape).copy())
    return drawn[:, 1:].reshape(known.shape), history


def halton(logits_of, known, seed, first_image, steps, **options):
    """As valeoai/Halton-MaskGIT; of a position the channels come one after the other."""
    height, width, depth = known.shape[1:]
    points = [(int(mirror(i, 2) * height), int(mirror(i, 3) * width)) for i in range(1, 500)]
    order = [(*cell, channel) for cell in dict.fromkeys(points) for channel in range(depth)]
    assert len(order) == known[0].size
    codes = known.copy()
    for t in range(steps):
        logits = logits_of(codes)
        for b in range(len(known)):
            unknown = [cell for cell in order if known[b][cell] == OPEN]
            share = 1 - math.acos((t + 1) / steps) / (math.pi / 2)
            revealed = max(t + 1, int(share * len(unknown)))
            if t + 1 < steps:
                revealed = min(revealed, len(unknown) - 1)  # one stays open until the end
            noise = gumbel_of(seed, first_image + b, 2 * t, logits.shape[1:])
            drawn = draw_cells(logits[b], noise, **options)[0].reshape(known.shape[1:])
            for cell in unknown[:revealed] if unknown else ():
                codes[b][cell] = drawn[cell]
    return codes


def mirror(index, base):
    value, digit = 0.0, 1.0
    while index:
        digit /= base
        value += digit * (index % base)
        index //= base
    return value


def step_logits(pipeline, labels, scale=1.0):
    """The logits that the plan gives for partly open codes; the rules above are about what is done with them."""
    step, grid = pipeline.session("step"), pipeline.grid
    batch = len(labels)
    label, guidance = np.array(labels)[:, None], np.full((batch, 1), 1.0, np.float32)
    if scale != 1:
        label = np.concatenate([label, np.full_like(label, NO_LABEL)], 1)
        guidance = np.repeat(np.array([[scale, 1 - scale]], np.float32), batch, 0)

    def logits_of(codes):
        codes = np.where(codes == OPEN, SIZE, codes)
        return step.run(
            codes=codes,
            given=codes,
            label=label,
            guidance=guidance,
            noise=np.zeros((batch, *grid, SIZE), np.float32),
            choice_noise=np.zeros((batch, *grid), np.float32),
            masked=np.zeros(batch, np.int64),
            temperature=np.ones((batch, grid[-1]), np.float32),
            top_k=np.full((batch, grid[-1]), SIZE),
            top_p=np.ones((batch, grid[-1]), np.float32),
            choice_temperature=np.zeros(batch, np.float32),
        )["logits"]

    return logits_of


def transcribed(pipeline, known, labels, seed=0, first_image=0, **options):
    """The codes by the public rules."""
    options = WHOLE | options
    logits_of = step_logits(pipeline, labels, options.pop("guidance_scale"))
    top_k = np.where(np.asarray(options["top_k"]) == 0, SIZE, options["top_k"])
    schedule, steps, choice = (options.pop(name) for name in ("schedule", "steps", "choice_temperature"))
    options["top_k"] = top_k
    if schedule == "halton":
        return halton(logits_of, known, seed, first_image, steps, **options)
    return maskgit(logits_of, known, seed, first_image, steps, COUNTS[schedule], choice, **options)[0]


OPTIONS = [
    {},
    {"seed": 3, "first_image": 7},
    *({"schedule": schedule, "steps": steps} for schedule in COUNTS for steps in (1, 3, 8, 20)),
    {"steps": 90},
    {"choice_temperature": 0},
    {"choice_temperature": 30.0, "steps": 4},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.8},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "schedule": "arccos"},
    {"temperature": [0.5, 1, 2, 3], "top_k": [1, 5, 20, 32], "top_p": [1, 0.5, 0.9, 0.2]},
    {"guidance_scale": 3.0, "steps": 3},
    {"guidance_scale": 0.0, "steps": 3, "schedule": "linear"},
    *({"schedule": "halton", "steps": steps} for steps in (1, 3, 8, 20, 90)),
    {"schedule": "halton", "temperature": 0.8, "top_k": 20, "top_p": 0.9, "guidance_scale": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_codes_are_those_of_the_public_rules(either, options):
    expected = transcribed(either, np.full((2, *GRID), OPEN), [0, 2], **options)
    np.testing.assert_array_equal(either.generate([0, 2], **WHOLE | options).codes, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3},
        {"schedule": "linear", "top_p": 0.9},
        {"schedule": "arccos", "guidance_scale": 2.0},
        {"steps": 70},
        {"schedule": "halton"},
        {"schedule": "halton", "steps": 20},
    ],
    ids=str,
)
def test_codes_are_those_of_the_public_rules_when_some_are_known(either, partly_known, options):
    """Each image has its own number of open codes."""
    expected = transcribed(either, partly_known, LABELS, **options)
    result = either.complete(partly_known, LABELS, **WHOLE | options)
    np.testing.assert_array_equal(result.codes, expected)


@pytest.mark.parametrize("schedule", [*COUNTS, "halton"])
def test_with_one_channel_it_is_maskgit(adaptive_pipeline, schedule):
    known = np.random.default_rng(2).integers(0, SIZE, (3, 4, 4, 1))
    known[0], known[1, 1:3] = OPEN, OPEN
    options = {"schedule": schedule, "steps": 5, "guidance_scale": 1.5}
    expected = transcribed(adaptive_pipeline, known, [2, 0, 1], **options)
    result = adaptive_pipeline.complete(known, [2, 0, 1], **WHOLE | options)
    np.testing.assert_array_equal(result.codes, expected)
    assert (result.codes[0] != adaptive_pipeline.generate([0], **WHOLE | options).codes[0]).mean() > 0.3


@pytest.mark.parametrize("names", [("movq_pipeline", "movq_system"), ("adaptive_pipeline", "adaptive_system")])
def test_defaults_come_from_the_checkpoint(request, names):
    """And the plan draws what PyTorch draws."""
    pipeline, system = map(request.getfixturevalue, names)

    def noise(draw, shape):
        return torch.from_numpy(np.stack([gumbel_of(5, image, draw, shape[1:]) for image in range(shape[0])]))

    result = pipeline.generate([0, 2], seed=5)
    sampling = system.config.sampling.to_dict()
    assert {name: result.options[name] for name in sampling} == sampling
    expected = generate(system.prior, system.config, torch.tensor([0, 2]), noise)
    np.testing.assert_array_equal(result.codes, expected.numpy())

    by_order = replace(system.config.sampling, schedule="halton", steps=5)
    config = replace(system.config, sampling=by_order)
    expected = generate(system.prior, config, torch.tensor([0, 2]), noise)
    result = pipeline.generate([0, 2], seed=5, schedule="halton", steps=5)
    np.testing.assert_array_equal(result.codes, expected)


# Labels and guidance


def test_the_logits_are_guided_by_the_formula(either, movq_system, partly_known):
    codes, labels = torch.from_numpy(np.where(partly_known < 0, SIZE, partly_known)), torch.tensor(LABELS)
    with torch.no_grad():
        given = movq_system.prior.logits(codes, labels)
        none = movq_system.prior.logits(codes, torch.full_like(labels, NO_LABEL))
        for scale in (1.0, 0.0, 0.5, 3.0):
            guided = none + scale * (given - none)
            actual = step_logits(either, LABELS, scale)(partly_known)
            np.testing.assert_allclose(actual, guided, atol=2e-5)
            torch.testing.assert_close(guided_logits(movq_system.prior, codes, labels, scale), guided)
    assert (given - none).abs().mean() > 0.05


def test_without_labels_there_is_no_class(either, partly_known):
    expected = transcribed(either, partly_known, [NO_LABEL] * 5)
    np.testing.assert_array_equal(either.complete(partly_known, None, **WHOLE).codes, expected)
    # there is nothing to be guided to
    guided = either.complete(partly_known, None, **WHOLE | {"guidance_scale": 0.0}).codes
    np.testing.assert_array_equal(guided, expected)


def test_guidance_of_1_asks_for_one_label_alone(movq_pipeline):
    bound = []
    session = movq_pipeline.session("step")
    bind, session.bind = session.bind, lambda dims, *shared: bound.append(dims) or bind(dims, *shared)
    try:
        for scale in (1, 1.5, 0):
            movq_pipeline.generate([0, 1, 2], **WHOLE | {"guidance_scale": scale})
    finally:
        del session.bind
    assert bound == [{"batch": 3, "conditions": n} for n in (1, 2)]


# Greedy decoding


@pytest.mark.parametrize("schedule", ["cosine", "halton"])
def test_without_any_noise_the_seed_does_not_matter(either, schedule):
    options = WHOLE | {"temperature": 0, "choice_temperature": 0, "schedule": schedule}
    first, second = (either.generate(LABELS, seed=seed, **options).codes for seed in (0, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[0], first[4])  # the same label
    assert (first[0] != first[1]).any()


def test_choice_temperature_0_keeps_the_likeliest_of_what_was_drawn(either):
    """And the choice noise alone makes a difference."""
    greedy = WHOLE | {"top_k": 1}
    codes = [either.generate([0], seed=0, **greedy | {"choice_temperature": heat}).codes for heat in (0, 4.5)]
    assert (codes[0] != codes[1]).any()


# The same request in other ways


MIXED = WHOLE | {"guidance_scale": 2.0, "top_p": 0.95, "steps": 5}


@pytest.mark.parametrize("schedule", ["cosine", "halton"])
def test_an_image_alone_is_the_image_in_the_batch(either, partly_known, schedule):
    options = MIXED | {"schedule": schedule, "seed": 2}
    batch = either.complete(partly_known, LABELS, **options).codes
    for i, label in enumerate(LABELS):
        alone = either.complete(partly_known[i : i + 1], [label], first_image=i, **options).codes[0]
        np.testing.assert_array_equal(alone, batch[i])


def test_a_request_that_is_split_gives_the_same_codes(movq_pipeline, movq_splitting_pipeline, partly_known, images):
    pipelines, sizes = (movq_pipeline, movq_splitting_pipeline), []
    options = MIXED | {"first_image": 3, "callback": lambda step: sizes.append(len(step.codes))}
    whole, split = (p.complete(partly_known, LABELS, **options).codes for p in pipelines)
    np.testing.assert_array_equal(whole, split)
    assert sizes == [5] * 5 + [2] * 5 + [2] * 5 + [1] * 5
    whole, split = (p.inpaint(images, LABELS, mask_ratio=0.5, **MIXED).codes for p in pipelines)
    np.testing.assert_array_equal(whole, split)


def test_what_was_generated_before_does_not_matter(either, partly_known):
    """Buffers are reused from call to call."""
    first = either.generate([1, 2], seed=4, **MIXED).codes
    either.complete(partly_known, LABELS, **WHOLE)
    either.generate([2, 1], seed=6, **MIXED | {"temperature": [2, 1, 1, 1], "schedule": "halton", "top_k": 3})
    np.testing.assert_array_equal(either.generate([1, 2], seed=4, **MIXED).codes, first)


def test_seeds_labels_and_images_matter(movq_pipeline):
    def draw(label=0, seed=0, image=0):
        return movq_pipeline.generate([label], seed=seed, first_image=image, **WHOLE).codes

    first = draw()
    assert (first != draw(label=1)).any()
    assert (first != draw(seed=1)).mean() > 0.5
    assert (first != draw(image=1)).mean() > 0.5
    assert (draw(seed=1) != draw(image=1)).mean() > 0.5


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), schedule=st.sampled_from(["cosine", "log", "arccos", "halton"]))
def test_known_codes_are_kept_wherever_they_are(movq_pipeline, seed, schedule):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, SIZE, (3, *GRID))
    start[rng.random(start.shape) < rng.random()] = OPEN
    before = start.copy()
    options = WHOLE | {"schedule": schedule, "steps": int(rng.integers(1, 12)), "guidance_scale": rng.integers(1, 3)}
    result = movq_pipeline.complete(start, [0, 1, 2], seed=seed, **options).codes
    np.testing.assert_array_equal(result[start >= 0], start[start >= 0])
    assert ((result >= 0) & (result < SIZE)).all()
    np.testing.assert_array_equal(start, before)  # the request is not written to


@pytest.mark.parametrize("heat", [1e3, 1e10, 1e30, 1e35, 1e300])
def test_known_codes_are_kept_however_hot_the_choice_is(either, partly_known, heat):
    try:
        result = either.complete(partly_known, LABELS, **WHOLE | {"choice_temperature": heat}).codes
    except VqdeployError:
        assert heat > 1e6  # beyond all reason, and refused
        return
    known = partly_known >= 0
    np.testing.assert_array_equal(result[known], partly_known[known])


def test_nothing_to_draw_is_no_engine_call(movq_pipeline, partly_known):
    known, seen = partly_known[:1], []
    result = movq_pipeline.complete(known, [0], callback=seen.append)
    np.testing.assert_array_equal(result.codes, known)
    np.testing.assert_array_equal(result.images, movq_pipeline.decode(known))
    assert (seen, result.timings["steps_s"]) == ([], 0)


# What a request reports


def watched(pipeline, known, labels, **options):
    seen = []
    result = pipeline.complete(known, labels, callback=seen.append, **WHOLE | options)
    assert [(each.step, each.steps) for each in seen] == [(i, len(seen)) for i in range(1, len(seen) + 1)]
    assert {each.images for each in seen} == {range(len(known))}
    return result.codes, [each.codes for each in seen]


def test_the_callback_sees_codes_settle_for_good(either, partly_known):
    counts = []
    for total in filter(None, (partly_known < 0).reshape(5, -1).sum(1).tolist()):
        opened = accumulate(COUNTS["cosine"](total, 8), lambda left, n: max(1, min(left - 1, n)), initial=total)
        counts.append(list(opened)[1:])
    codes, seen = watched(either, partly_known, LABELS)
    assert len(seen) == 8
    for step, now in enumerate(seen):
        assert ((now >= -SIZE) & (now < SIZE)).all()  # -1 - c stands for code c
        settled = now >= 0
        np.testing.assert_array_equal(now[settled], codes[settled])
        left = (~settled).reshape(5, -1).sum(1)
        assert left.tolist() == [0, *(count[step] if step < 7 else 0 for count in counts)]
    for before, after in pairwise(seen):
        assert ((before < 0) | (after >= 0)).all()
    np.testing.assert_array_equal(seen[-1], codes)


def test_what_the_callback_sees_open_is_what_was_drawn(either, partly_known):
    """The first step draws every code from what is known."""
    codes, seen = watched(either, partly_known, LABELS, steps=3)
    at_once = either.complete(partly_known, LABELS, **WHOLE | {"steps": 1}).codes
    np.testing.assert_array_equal(np.where(seen[0] < 0, -1 - seen[0], seen[0]), at_once)
    assert (at_once != codes).any()


def test_by_order_the_callback_sees_the_order(movq_pipeline):
    codes, seen = watched(movq_pipeline, np.full((1, *GRID), OPEN), [1], steps=5, schedule="halton")
    places = list(dict.fromkeys((int(mirror(i, 2) * 4), int(mirror(i, 3) * 4)) for i in range(1, 100)))
    for step, now in enumerate(seen):
        count = int((1 - math.acos((step + 1) / 5) / (math.pi / 2)) * CELLS)
        settled = [now[0][place][channel] >= 0 for place in places for channel in range(4)]
        assert settled == [True] * count + [False] * (CELLS - count)
    np.testing.assert_array_equal(seen[-1], codes)
    changed = (seen[0] >= 0) & (seen[0] != codes)
    assert changed.any()  # codes found earlier are drawn again


def test_options_repeat_the_request(movq_pipeline):
    result = movq_pipeline.generate([2, 0], seed=8, steps=3, top_k=[1, 2, 3, 4], schedule="log")
    assert result.options == {
        "seed": 8,
        "labels": [2, 0],
        "temperature": 0.9,
        "top_k": [1, 2, 3, 4],
        "top_p": 0.95,
        "steps": 3,
        "schedule": "log",
        "guidance_scale": 1.5,
        "choice_temperature": 3.0,
    }


# Inpainting


def test_inpainting_draws_what_the_mask_touches(either, images):
    mask = np.zeros(images.shape[:3], bool)
    mask[0, 15, 3] = mask[1, 4, 0] = mask[2, 3:5, 7:9] = True
    mask[3] = True
    touched = mask.reshape(5, 4, 4, 4, 4).any((2, 4))
    assert touched.sum((1, 2)).tolist() == [1, 1, 4, 16, 0]
    result, encoded = either.inpaint(images, LABELS, mask=mask, **WHOLE), either.encode(images)
    np.testing.assert_array_equal(result.codes[~touched], encoded[~touched])
    known = np.where(touched[..., None], OPEN, encoded)
    np.testing.assert_array_equal(result.codes, either.complete(known, LABELS, **WHOLE).codes)
    assert (result.codes[touched] != encoded[touched]).mean() > 0.7
    np.testing.assert_array_equal(result.images[~mask], images[~mask])
    np.testing.assert_array_equal(result.images[mask], either.decode(result.codes)[mask])


def test_one_mask_serves_all_images(movq_pipeline, images):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[9] = True
    many, one = (movq_pipeline.inpaint(images, LABELS, mask=m) for m in (np.broadcast_to(mask, images.shape[:3]), mask))
    np.testing.assert_array_equal(one.codes, many.codes)
    np.testing.assert_array_equal(one.images, many.images)
    np.testing.assert_array_equal(one.images[:, ~mask], images[:, ~mask])


@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.95, 1.0])
def test_a_share_of_the_codes_is_drawn(movq_pipeline, images, ratio):
    unknown = movq_pipeline.unknown(5, mask_ratio=ratio, seed=6, first_image=2)
    assert unknown.shape == (5, *GRID)
    assert unknown.reshape(5, -1).sum(1).tolist() == [round(ratio * CELLS)] * 5
    encoded = movq_pipeline.encode(images)
    options = WHOLE | {"seed": 6, "first_image": 2}
    result = movq_pipeline.inpaint(images, LABELS, mask_ratio=ratio, **options)
    known = np.where(unknown, OPEN, encoded)
    np.testing.assert_array_equal(result.codes, movq_pipeline.complete(known, LABELS, **options).codes)
    np.testing.assert_array_equal(result.images, movq_pipeline.decode(result.codes))
    if ratio == 1:
        np.testing.assert_array_equal(result.codes, movq_pipeline.generate(LABELS, **options).codes)


def test_which_codes_are_drawn_depends_on_seed_and_image_alone(movq_pipeline):
    first = movq_pipeline.unknown(40, mask_ratio=0.5, seed=1)
    np.testing.assert_array_equal(first, movq_pipeline.unknown(40, mask_ratio=0.5, seed=1))
    np.testing.assert_array_equal(first[7:9], movq_pipeline.unknown(2, mask_ratio=0.5, seed=1, first_image=7))
    assert (first != movq_pipeline.unknown(40, mask_ratio=0.5, seed=2)).any((1, 2, 3)).all()
    assert len({row.tobytes() for row in first}) == 40
    assert (first.any(3) & ~first.all(3)).any()  # a position may be known in part
    assert np.abs(first.mean(0) - 0.5).max() < 0.4  # any code may be chosen
    more = movq_pipeline.unknown(40, mask_ratio=0.75, seed=1)
    assert (more | ~first).all()  # a larger share adds to a smaller one


def test_completions_of_the_same_images_differ(movq_pipeline, images):
    mask = np.zeros((2, SIDE, SIDE), bool)
    mask[0, :8], mask[1, 3:9, 5:7] = True, True
    options = WHOLE | {"seed": 1}
    result = movq_pipeline.inpaint(images[:2], [0, 2], mask=mask, first_image=4, completions=3, **options)
    unknown = movq_pipeline.unknown(2, mask=mask)
    known = np.where(unknown, OPEN, movq_pipeline.encode(images[:2]))
    codes, pictures = result.codes.reshape(3, 2, *GRID), result.images.reshape(3, 2, SIDE, SIDE, 3)
    for completion in range(3):
        expected = movq_pipeline.complete(known, [0, 2], first_image=4 + 2 * completion, **options).codes
        np.testing.assert_array_equal(codes[completion], expected)
        np.testing.assert_array_equal(pictures[completion][~mask], images[:2][~mask])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (codes[first] != codes[second])[unknown].mean() > 0.5


def test_completions_share_the_codes_that_are_kept(movq_pipeline, images):
    result = movq_pipeline.inpaint(images[:2], None, mask_ratio=0.5, completions=2, seed=1)
    kept = ~movq_pipeline.unknown(2, mask_ratio=0.5, seed=1)
    for codes in result.codes.reshape(2, 2, *GRID):
        np.testing.assert_array_equal(codes[kept], movq_pipeline.encode(images[:2])[kept])


# What is refused


def refused(call, *args, **kwargs):
    with pytest.raises(VqdeployError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is out of range"),
        ({"steps": -1}, "steps is out of range"),
        ({"steps": 1.5}, "steps is malformed"),
        ({"steps": 10_001}, "steps is out of range"),
        ({"steps": [8, 8]}, "one value, found 2"),
        ({"steps": "many"}, "steps is malformed"),
        ({"schedule": "cosin"}, "expected cosine or linear"),
        ({"schedule": 3}, "no such schedule"),
        ({"schedule": ["cosine"]}, "no such schedule"),
        ({"schedule": np.full((2, 2), "cosine")}, "no such schedule"),
        ({"guidance_scale": -0.5}, "guidance_scale is out of range"),
        ({"guidance_scale": float("nan")}, "guidance_scale is out of range"),
        ({"guidance_scale": [1, 1, 1, 1]}, "one value, found 4"),
        ({"guidance_scale": True}, "guidance_scale is malformed"),
        ({"choice_temperature": -1}, "choice_temperature is out of range"),
        ({"choice_temperature": float("inf")}, "choice_temperature is out of range"),
        ({"top_k": 33}, "0..32, found 33"),
        ({"temperature": [1, 1]}, "one value or 4, found 2"),
        ({"guidance": 2.0}, "no option guidance"),
    ],
)
def test_options_out_of_range(movq_pipeline, options, message):
    assert message in refused(movq_pipeline.generate, [0], **options)


@pytest.mark.parametrize("name", ["steps", "schedule", "guidance_scale", "choice_temperature"])
def test_an_autoregressive_system_has_no_options_of_masked_ones(pipeline, name):
    assert f"no option {name}; expected temperature, top_k, top_p" in refused(pipeline.generate, [0], **{name: 1})


numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 5),
    st.floats(0),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.floats(), st.integers(0, 4)), max_size=4),
)
names = ("temperature", "top_k", "top_p", "steps", "guidance_scale", "choice_temperature", "schedule")


@settings(max_examples=200)
@given(options=st.fixed_dictionaries({}, optional=dict.fromkeys(names, numbers)))
def test_options_are_refused_or_obeyed(movq_pipeline, options):
    known = np.full((1, *GRID), OPEN)
    known[0, 1] = 7
    try:
        result = movq_pipeline.complete(known, [0], **{"steps": 2} | options)
    except VqdeployError:
        return
    assert ((result.codes >= 0) & (result.codes < SIZE)).all()
    assert (result.codes[0, 1] == 7).all()


@pytest.mark.parametrize("steps", [3.0, [3], np.int32(3), np.array(3)])
def test_a_whole_number_of_steps_in_any_form(movq_pipeline, steps):
    expected = movq_pipeline.generate([0], steps=3).codes
    np.testing.assert_array_equal(movq_pipeline.generate([0], steps=steps).codes, expected)


@pytest.mark.parametrize("name", ["guidance_scale", "choice_temperature"])
def test_one_number_in_a_list(movq_pipeline, name):
    expected = movq_pipeline.generate([0], **{name: 2.5}).codes
    np.testing.assert_array_equal(movq_pipeline.generate([0], **{name: [2.5]}).codes, expected)


@pytest.mark.parametrize("scale", [100, 1000])
def test_strong_guidance_leaves_no_room_for_the_noise(movq_pipeline, scale):
    options = WHOLE | {"guidance_scale": scale, "steps": 1, "temperature": 1e-3}
    first, second = (movq_pipeline.generate([0], seed=seed, **options).codes for seed in (0, 1))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first)) > 10


@pytest.mark.parametrize("scale", [1001, 1e40, 1e300])
def test_guidance_beyond_fp16_is_refused(movq_pipeline, scale):
    with pytest.raises(VqdeployError, match="guidance_scale is out of range"):
        movq_pipeline.generate([0], guidance_scale=scale)


def test_every_step_settles_codes_although_confidences_tie(either):
    """At a low temperature the probability of most draws is 1 to the last bit, and ties at the cut are kept."""
    opened = []
    options = {"steps": 12, "temperature": 1e-4, "choice_temperature": 0, "schedule": "cosine"}
    either.generate([0], **WHOLE | options, callback=lambda step: opened.append(int((step.codes < 0).sum())))
    assert opened[0] < np.floor(64 * np.cos(np.pi / 24))  # there were ties
    assert all(after < max(before, 2) for before, after in pairwise(opened))


def test_no_label_needs_no_guidance(movq_pipeline):
    """Both rows would be the same."""
    known, calls = np.full((2, *movq_pipeline.grid), -1), []
    bind = movq_pipeline.session("step").bind
    plain = movq_pipeline.complete(known, None, **WHOLE).codes
    movq_pipeline._samplers.clear()
    movq_pipeline.session("step").bind = lambda dims, *shared: calls.append(dims) or bind(dims, *shared)
    try:
        guided = movq_pipeline.complete(known, None, **WHOLE | {"guidance_scale": 3}).codes
    finally:
        del movq_pipeline.session("step").bind
    np.testing.assert_array_equal(guided, plain)
    assert [dims["conditions"] for dims in calls] == [1]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mask_ratio": 0.5, "mask": np.ones((16, 16), bool)},
        {"mask_ratio": -0.1},
        {"mask_ratio": 1.1},
        {"mask_ratio": float("nan")},
        {"mask": np.ones((8, 8), bool)},
        {"mask": np.ones((4, 16, 16), bool)},
        {"mask": np.ones((5, 16, 16, 3), bool)},
        {"mask_ratio": 0.5, "seed": -1},
        {"mask_ratio": 0.5, "first_image": -1},
        {"mask_ratio": 0.5, "steps": 0},
        {"mask_ratio": 0.5, "completions": 0},
        {"mask_ratio": 0.5, "completions": 1.5},
    ],
)
def test_masks_that_do_not_fit(movq_pipeline, images, arguments):
    refused(movq_pipeline.inpaint, images, LABELS, **arguments)


def test_codes_have_no_depths_to_leave_out(movq_pipeline, images):
    assert "no depths" in refused(movq_pipeline.reconstruct, images, 2)
    assert "no depths" in refused(movq_pipeline.decode, np.zeros((1, *GRID), int), 4)


@pytest.mark.parametrize("value", [-2, SIZE])
def test_codes_out_of_range(movq_pipeline, value):
    known = np.zeros((1, *GRID), np.int64)
    known[0, 0, 0, 0] = value
    assert "codes are out of range" in refused(movq_pipeline.complete, known, [0])


@pytest.mark.parametrize("labels", [[NO_LABEL], [-1], None])
def test_labels_that_are_not_there(movq_pipeline, labels):
    refused(movq_pipeline.generate, labels)


# One step


def one_step(logits, given, noise, choice_noise, masked, temperature=1.0, top_k=SIZE, top_p=1.0, heat=0.0):
    """`unmask` of images [B, h, w, Q, K] with options that are numbers or one for each image and channel."""
    batch, depth = given.shape[0], given.shape[-1]
    options = [
        torch.as_tensor(np.broadcast_to(np.asarray(value, kind), (batch, depth)).copy())
        for value, kind in ((temperature, np.float32), (top_k, np.int64), (top_p, np.float32))
    ]
    tensors = [torch.as_tensor(x) for x in (logits, given, noise, choice_noise, masked)]
    heats = torch.as_tensor(np.broadcast_to(np.asarray(heat, np.float32), batch).copy())
    return [x.numpy() for x in unmask(*tensors, *options, heats)]


@pytest.mark.parametrize(("masked", "left"), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (5, 5)])
def test_ties_at_the_cut_are_kept(masked, left):
    """One code of little confidence, three that are equal, one of more, one of most."""
    logits = np.zeros((1, 6, 1, 1, SIZE), np.float32)
    logits[0, :, 0, 0, 5] = [4, 4, 2, 4, 8, 9]
    none = np.zeros((1, 6, 1, 1), np.float32)
    given = np.full((1, 6, 1, 1), SIZE)
    drawn, remaining = one_step(logits, given, np.zeros_like(logits), none, np.array([masked]))
    assert (drawn == 5).all()
    assert (remaining == SIZE).sum() == left
    assert set(np.unique(remaining)) <= {5, SIZE}
    if left == 1:
        assert remaining[0, 2] == SIZE


def test_a_step_settles_a_code_whatever_the_schedule_wants():
    logits, given = np.zeros((1, 4, 1, 1, SIZE), np.float32), np.array([3, SIZE, 4, SIZE]).reshape(1, 4, 1, 1)
    choice = np.array([-1e6, 5, -1e6, 6], np.float32).reshape(1, 4, 1, 1)
    for masked, expected in ((1, [3, SIZE, 4, 0]), (2, [3, SIZE, 4, 0]), (3, [3, SIZE, 4, 0])):
        drawn, remaining = one_step(logits, given, np.zeros_like(logits), choice, np.array([masked]), heat=100.0)
        assert drawn.ravel().tolist() == [3, 0, 4, 0]
        assert remaining.ravel().tolist() == expected


@settings(max_examples=60)
@given(data=st.data())
def test_one_step_follows_the_rules(data):
    batch, depth = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 3), "depth")
    height, width = data.draw(st.integers(1, 3), "height"), data.draw(st.integers(1, 3), "width")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31), "seed"))
    shape, cells = (batch, height, width, depth), height * width * depth
    logits = rng.normal(size=(*shape, SIZE)).astype(np.float32) * rng.integers(1, 4)
    noise, choice = rng.gumbel(size=(*shape, SIZE)).astype(np.float32), rng.gumbel(size=shape).astype(np.float32)
    given = np.where(rng.random(shape) < rng.random(), rng.integers(0, SIZE, shape), SIZE)
    masked = rng.integers(0, cells, batch)
    temperature = rng.choice(np.array([0.5, 1, 2], np.float32), (batch, depth))
    top_k = rng.choice([1, 3, SIZE], (batch, depth))
    top_p = rng.choice(np.array([1, 0.9, 0.3], np.float32), (batch, depth))
    heat = rng.choice(np.array([0, 0.5, 4.5], np.float32), batch)
    result = one_step(logits, given, noise, choice, masked, temperature, top_k, top_p, heat)
    for b in range(batch):
        codes, likelihoods = draw_cells(logits[b], noise[b], temperature[b], top_k[b], top_p[b])
        known = given[b].ravel() < SIZE
        drawn = np.where(known, given[b].ravel(), codes)
        confidence = np.where(known, np.inf, likelihoods + float(heat[b]) * choice[b].ravel())
        left = min(max(1, min((~known).sum() - 1, masked[b])), cells - 1)
        remaining = np.where(confidence < np.sort(confidence)[left], SIZE, drawn)
        np.testing.assert_array_equal(result[0][b].ravel(), drawn)
        np.testing.assert_array_equal(result[1][b].ravel(), remaining)
