"""Samplers that step: images join, leave and are cancelled, and get the codes that they get alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import edited
from support.trials import alone, random_item, takes_guidance, trial

from vqdeploy.engines.build import build
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import load
from vqdeploy.runtime.manifest import Manifest
from vqdeploy.runtime.pipeline import SAMPLERS, _check_sampler
from vqdeploy.runtime.sampler import Item

SYSTEMS = ("", "text", "movq", "adaptive", "vit", "vqgan", "llamagen", "features", "vqvae2", "three", "var", "shared")


def named(system, kind):
    return f"{system}_{kind}".lstrip("_")


@pytest.fixture(scope="module", params=SYSTEMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def any_pipeline(name, request):
    return request.getfixturevalue(named(name, "pipeline"))


@settings(max_examples=3)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_images_that_come_and_go_are_the_images_alone(any_pipeline, data, seed):
    most = any_pipeline._most_slots(takes_guidance(any_pipeline))
    trial(any_pipeline, seed, data.draw(st.integers(1, most), "slots"))


def test_images_that_come_and_go_are_those_of_a_sampler_of_one_slot(any_pipeline):
    trial(any_pipeline, 0, 8, alone=lambda pipeline, item, _slots, _slot, guided: alone(pipeline, item, 1, 0, guided))


def test_trials_hold_many_images_against_themselves(pipeline):
    assert sum(trial(pipeline, seed) for seed in range(3)) >= 12


def item(pipeline, seed=0, label=0, **options):
    known = np.full(pipeline.grid, -1)
    return Item(known, label, seed, 3, pipeline.options(**options))


@pytest.mark.parametrize("portable", [False, True], ids=["own bodies", "portable bodies"])
def test_nan_in_the_caches_does_not_reach_the_next_request(name, portable, request, tmp_path):
    """One request that overflows leaves NaN in the caches of its rows; 0 times NaN is NaN."""
    build(request.getfixturevalue(named(name, "package")), tmp_path / "x.plan", portable=portable)
    pipeline = load(tmp_path / "x.plan", threads=1)
    labels = pipeline.condition.examples(2)
    expected = pipeline.generate(labels, seed=2)
    rest = pipeline.inpaint(expected.images, labels, mask_ratio=0.5, seed=2)
    for poison in (np.nan, np.inf):
        for sampler in pipeline._samplers.values():
            for array in sampler.last.inputs.values():
                if array.dtype.kind == "f":
                    array[...] = poison
        np.testing.assert_array_equal(pipeline.generate(labels, seed=2).codes, expected.codes)
        again = pipeline.inpaint(expected.images, labels, mask_ratio=0.5, seed=2)
        np.testing.assert_array_equal(again.codes, rest.codes)


def test_nan_in_a_row_without_a_label_does_not_reach_the_next_request(artifacts):
    """Calls of guided images write the row of an unguided one between them too."""
    pipeline = artifacts.pipeline("vit", portable=True)
    guided, plain = (item(pipeline, guidance_scale=scale) for scale in (2.0, 1.0))
    with pipeline.sampler(4, guided=True) as sampler:
        sampler.admit(3, guided)
        sampler.admit(1, plain)
        for _ in range(3):
            sampler.step()
        for name in sampler._past:
            sampler._held[name][sampler._rows_of(1)[1]] = np.nan
        sampler.release(1)
        sampler.admit(1, guided)
        while 1 not in sampler.step():
            pass
        codes = sampler.codes(1)
    np.testing.assert_array_equal(codes, alone(pipeline, guided, 4, 1, True))


def test_an_image_whose_codes_are_all_known_takes_no_call(any_pipeline):
    known = np.zeros(any_pipeline.grid, np.int64)
    with any_pipeline.sampler(2) as sampler:
        options = any_pipeline.options(**({"guidance_scale": 1.0} if any_pipeline.sampling.no_label else {}))
        sampler.admit(1, Item(known, any_pipeline.condition.examples(1)[0], 0, 0, options))
        sampler.spent.clear()
        assert sampler.step() == [1]
        assert not sampler.spent
        np.testing.assert_array_equal(sampler.codes(1), known)


class TestAdmit:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"condition": 99},
            {"condition": -1},
            {"condition": 1.0},
            {"condition": "cat"},
            {"condition": None},
            {"condition": [0, 1]},
            {"seed": -5},
            {"seed": 0.5},
            {"seed": 2**70},
            {"image": -1},
            {"known": np.full((4, 4, 3), -1)},
            {"known": np.full((4, 4, 4), 64)},
            {"known": np.full((4, 4, 4), -2)},
            {"known": np.full((4, 4, 4), -1.0)},
            {"known": [[1], [1, 2]]},
            {"options": None},
            {"options": [1.0]},
            {"options": {"temperature": -1.0}},
            {"options": {"top_k": "many"}},
            {"options": {"steps": 3}},
        ],
        ids=str,
    )
    def test_a_malformed_image_is_refused_and_the_others_go_on(self, pipeline, wrong):
        good = item(pipeline)
        expected = alone(pipeline, good, 2, 0, guided=False)
        with pipeline.sampler(2) as sampler:
            sampler.admit(0, good)
            sampler.step()
            with pytest.raises(VqdeployError):
                sampler.admit(1, replace(good, **wrong))
            while not sampler.step():
                pass
            np.testing.assert_array_equal(sampler.codes(0), expected)
            sampler.admit(1, good)

    @pytest.mark.parametrize("slot", [1.5, None, "0", True])
    def test_a_slot_is_a_number(self, pipeline, slot):
        with pipeline.sampler(2) as sampler, pytest.raises(VqdeployError, match="is not free"):
            sampler.admit(slot, item(pipeline))

    def test_lists_and_missing_options_are_completed(self, pipeline):
        good = item(pipeline)
        plain = Item(good.known.tolist(), 0, 0, 3, {})
        np.testing.assert_array_equal(alone(pipeline, plain, 1, 0, False), alone(pipeline, good, 1, 0, False))

    @pytest.mark.parametrize("slots", [0, -1, 1.5, True, 65, 10**9, "2"])
    def test_a_sampler_has_as_many_slots_as_the_plan_has_rows(self, pipeline, slots):
        with pytest.raises(VqdeployError, match="slots is out of range"), pipeline.sampler(slots):
            pass

    def test_a_slot_holds_one_image(self, pipeline):
        with pipeline.sampler(2) as sampler:
            sampler.admit(0, item(pipeline))
            for slot in (0, 2, -1):
                with pytest.raises(VqdeployError, match="is not free"):
                    sampler.admit(slot, item(pipeline))
            sampler.release(0)
            sampler.admit(0, item(pipeline))

    @pytest.mark.parametrize("name_", ["rqvae", "movq", "vit", "llamagen", "vqvae2", "var"])
    def test_a_slot_without_an_image_has_no_codes(self, name_, artifacts):
        pipeline = artifacts.pipeline(name_)
        with pipeline.sampler(2) as sampler:
            sampler.admit(0, item(pipeline, **({"guidance_scale": 1.0} if pipeline.sampling.no_label else {})))
            sampler.step()
            sampler.release(0)
            for ask in (sampler.left, sampler.codes, sampler.drawn):
                for slot in (0, 1, 2, -1, True, "0", None):
                    with pytest.raises(VqdeployError, match="the slot holds no image; expected a slot in use"):
                        ask(slot)

    def test_hierarchies_take_no_image_once_they_run(self, vqvae2_pipeline):
        with vqvae2_pipeline.sampler(2) as sampler:
            sampler.admit(0, item(vqvae2_pipeline))
            sampler.step()
            with pytest.raises(VqdeployError, match="cannot join while others run"):
                sampler.admit(1, item(vqvae2_pipeline))
            sampler.release(0)
            sampler.admit(1, item(vqvae2_pipeline))

    @pytest.mark.parametrize("name_", ["movq", "vit"])
    def test_guidance_needs_a_sampler_for_it(self, name_, request):
        pipeline = request.getfixturevalue(f"{name_}_pipeline")
        with pipeline.sampler(1) as sampler:
            with pytest.raises(VqdeployError, match="takes no guidance"):
                sampler.admit(0, item(pipeline, guidance_scale=2.0))
            sampler.admit(0, item(pipeline, guidance_scale=1.0))

    def test_a_position_is_known_as_a_whole(self, pipeline):
        known = np.full(pipeline.grid, -1)
        known[0, 0, 0] = 1
        with pipeline.sampler(1) as sampler, pytest.raises(VqdeployError, match="only partly known"):
            sampler.admit(0, replace(item(pipeline), known=known))


def test_codes_so_far_grow_and_are_open_where_nothing_is_drawn(any_pipeline):
    chosen = random_item(any_pipeline, np.random.default_rng(1), image=0)
    chosen = replace(chosen, known=np.full(any_pipeline.grid, -1))
    with any_pipeline.sampler(1, guided=any_pipeline.sampling.no_label is not None) as sampler:
        sampler.admit(0, chosen)
        opened = [(sampler.codes(0) < 0).sum()]
        while not sampler.step():
            opened.append((sampler.codes(0) < 0).sum())
        assert sorted(opened, reverse=True) == opened
        assert (sampler.codes(0) >= 0).all()


@pytest.mark.parametrize("name_", ["rqvae", "vit", "movq"])
def test_codes_of_a_finished_image_stay_until_its_slot_is_freed(name_, artifacts):
    pipeline = artifacts.pipeline(name_)
    guided = pipeline.sampling.no_label is not None
    with pipeline.sampler(2, guided) as sampler:
        sampler.admit(0, item(pipeline))
        while not sampler.step():
            pass
        codes = sampler.codes(0)
        for seed in (1, 2):
            sampler.admit(1, item(pipeline, seed))
            while not sampler.step():
                pass
            sampler.release(1)
            np.testing.assert_array_equal(sampler.codes(0), codes)


@pytest.mark.parametrize("name_", ["rqvae", "vit", "movq"])
def test_a_step_computes_the_slots_up_to_the_last_one_that_runs(name_, artifacts):
    pipeline = artifacts.pipeline(name_)
    guided = pipeline.sampling.no_label is not None
    lone = alone(pipeline, item(pipeline), 1, 0, guided)
    with pipeline.sampler(3, guided) as sampler:
        calls = []
        sampler._run = lambda stage, binding, run=sampler._run: (calls.append(binding), run(stage, binding))
        for slot, expected in ((0, 1), (1, 2), (2, 3)):
            sampler.admit(slot, item(pipeline))
            calls.clear()
            while not sampler.step():
                pass
            assert {len(binding.inputs["noise"]) for binding in calls} == {expected}
            np.testing.assert_array_equal(sampler.codes(slot), lone)
        sampler.release(1)
        sampler.admit(1, item(pipeline))
        calls.clear()
        sampler.step()
        assert len(calls[-1].inputs["noise"]) == 2
        for slot in (0, 2):
            np.testing.assert_array_equal(sampler.codes(slot), lone)


def test_a_slot_that_no_image_was_in_does_no_harm(artifacts):
    """Three images in a call of four slots, with guidance."""
    pipeline = artifacts.pipeline("vit")
    with pipeline.sampler(16, guided=True) as sampler:
        for slot in range(3):
            sampler.admit(slot, replace(item(pipeline, seed=5), image=slot))
        while not sampler.step():
            pass
        codes = [sampler.codes(slot) for slot in range(3)]
    np.testing.assert_array_equal(codes, pipeline.generate([0, 0, 0], seed=5).codes)


def test_a_cancelled_image_leaves_the_others_alone(vit_pipeline):
    rng = np.random.default_rng(7)
    items = [replace(random_item(vit_pipeline, rng, i), known=np.full(vit_pipeline.grid, -1)) for i in range(2)]
    items = [replace(each, options=each.options | {"guidance_scale": 2.0}) for each in items]
    with vit_pipeline.sampler(2, guided=True) as sampler:
        for slot, each in enumerate(items):
            sampler.admit(slot, each)
        for _ in range(3):
            sampler.step()
        sampler.release(0)
        while not (done := sampler.step()):
            pass
        assert done == [1]
        codes = sampler.codes(1)
    np.testing.assert_array_equal(codes, alone(vit_pipeline, items[1], 2, 1, guided=True))


def test_what_every_sampler_writes_to_is_an_input_of_the_plan(any_pipeline):
    kind = SAMPLERS[any_pipeline.sampling.kind]
    for stage, inputs in kind.inputs(any_pipeline.tokenizer, any_pipeline.sampling).items():
        assert set(inputs) <= {info.name for info in any_pipeline.manifest.stage(stage).inputs}


@pytest.mark.parametrize(
    ("name_", "lost"), [("rqvae", "temperature"), ("vit", "guidance_scale"), ("movq", "steps"), ("var", "more_smooth")]
)
def test_a_plan_has_the_options_that_its_sampler_needs(name_, lost, artifacts, tmp_path):
    edited(artifacts.plan(name_), tmp_path / "x.plan", lambda manifest: manifest["sampling"]["options"].pop(lost))
    with pytest.raises(ArtifactError, match=rf"sampling\.options of the manifest is wrong; expected .*\b{lost}"):
        load(tmp_path / "x.plan")


def test_guidance_without_a_label_for_it_is_refused(artifacts, tmp_path):
    def edit(manifest):
        manifest["sampling"]["options"]["guidance_scale"] = 2.0

    edited(artifacts.plan("rqvae"), tmp_path / "x.plan", edit)
    with pytest.raises(ArtifactError, match=r"sampling\.options .* and no guidance_scale, found guidance_scale"):
        load(tmp_path / "x.plan")


@pytest.mark.parametrize("name_", ["rqvae", "movq", "vqvae2", "var"])
def test_tensors_without_dimensions_are_refused(name_, artifacts, tmp_path):
    """One after the other, each tensor of the stages of the prior has the shape []."""
    manifest = artifacts.pipeline(name_).manifest
    for stage in manifest.stages:
        for side in ("inputs", "outputs"):
            for number in range(len(getattr(stage, side))):
                data = manifest.to_dict()
                (changed,) = (each for each in data["stages"] if each["name"] == stage.name)
                changed[side][number]["shape"] = []
                with pytest.raises(ArtifactError):
                    _check_sampler(Manifest.from_dict(data))


@pytest.mark.parametrize(("name_", "output", "input_"), [("rqvae", "next_codes", "top_k"), ("movq", "drawn", "codes")])
def test_what_a_sampler_reads_shares_no_buffer_with_an_input(name_, output, input_, artifacts, tmp_path):
    def edit(manifest):
        stage = next(stage for stage in manifest["stages"] if stage["name"] == "step")
        stage["aliases"][output] = input_

    edited(artifacts.plan(name_), tmp_path / "x.plan", edit)
    with pytest.raises(ArtifactError, match=f"does not fit its sampler; expected a buffer of its own for {output}"):
        load(tmp_path / "x.plan")
