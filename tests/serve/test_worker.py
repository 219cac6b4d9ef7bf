"""Continuous batching: whatever else runs, an image gets the codes that it gets alone."""

import threading
import time

import numpy as np
import pytest
from support.serving import until
from support.trials import random_item

from vqdeploy.runtime import load
from vqdeploy.runtime.autoregressive import AutoregressiveSampler
from vqdeploy.runtime.sampler import Item
from vqdeploy.serve import Metrics
from vqdeploy.serve.worker import EngineError, Worker

SECONDS = 60


@pytest.fixture
def make(artifacts):
    """Makes workers of small plans, and closes them."""
    made = []

    def make(name, slots=4, **options):
        plan = artifacts.plan(name, **options)
        made.append(Worker(name, lambda: load(plan, threads=1), slots, Metrics()))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.fixture
def gate(monkeypatch):
    """Holds the steps of workers until it is set, and lists the slots of each; `error` is raised by the next one."""
    gate, real = threading.Event(), AutoregressiveSampler._call
    gate.error, gate.steps = None, []

    def call(sampler):
        if threading.current_thread().name.startswith("worker"):
            gate.steps.append(sorted(sampler._running))
            assert gate.wait(SECONDS)
            if gate.error:
                error, gate.error = gate.error, None
                raise error
        real(sampler)

    monkeypatch.setattr(AutoregressiveSampler, "_call", call)
    return gate


def items(pipeline, labels, seed=0, **options):
    unknown = np.full(pipeline.grid, -1)
    return [Item(unknown, label, seed, i, pipeline.options(**options)) for i, label in enumerate(labels)]


def codes_of(future):
    return np.stack([drawn.codes for drawn in future.result(SECONDS)])


def complete(pipeline, item):
    """The codes of an image alone."""
    condition = np.asarray(item.condition)[None]
    return pipeline.sample(item.known[None], condition, item.seed, item.image, item.options)[0][0]


@pytest.mark.parametrize("name", ["rqvae", "movq", "vit", "vqvae2", "text", "features", "var"])
def test_requests_that_come_and_go_at_random(make, artifacts, name):
    pipeline, worker, rng = artifacts.pipeline(name), make(name), np.random.default_rng(0)
    asked = []
    for request in range(12):
        wanted = [random_item(pipeline, rng, image) for image in range(rng.integers(1, 4))]
        asked.append((wanted, worker.sample(wanted)))
        assert worker.sample(wanted).cancel()
        if request % 3 == 0:
            time.sleep(rng.random() * 0.02)
            images = rng.integers(0, 256, (2, *pipeline.image_shape), np.uint8)
            np.testing.assert_array_equal(worker.encode(images).result(SECONDS), pipeline.encode(images))
    for wanted, future in asked:
        for codes, item in zip(codes_of(future), wanted, strict=True):
            np.testing.assert_array_equal(codes, complete(pipeline, item))


def test_images_join_at_the_next_step_in_the_lowest_free_slots(make, pipeline, gate):
    worker = make("rqvae", slots=3)
    first = worker.sample(items(pipeline, [0]))
    until(lambda: gate.steps == [[0]])
    second, third = worker.sample(items(pipeline, [1, 2])), worker.sample(items(pipeline, [2], seed=1))
    gate.set()
    for future, labels, seed in ((first, [0], 0), (second, [1, 2], 0), (third, [2], 1)):
        np.testing.assert_array_equal(codes_of(future), pipeline.generate(labels, seed=seed).codes)
    assert gate.steps == [[0]] + [[0, 1, 2]] * 15 + [[0, 1, 2]] + [[0]] * 15


def test_cancelled_images_leave_at_the_next_step(make, pipeline, gate):
    worker = make("rqvae", slots=2)
    first, second, third = (worker.sample(items(pipeline, [0, 1], seed=seed)) for seed in range(3))
    until(lambda: gate.steps)
    assert first.cancel()
    assert second.cancel()
    gate.set()
    np.testing.assert_array_equal(codes_of(third), pipeline.generate([0, 1], seed=2).codes)
    assert gate.steps == [[0, 1]] * (1 + 16)


def test_a_hierarchy_waits_until_the_sampler_is_empty(make, artifacts):
    worker, pipeline = make("vqvae2", slots=2), artifacts.pipeline("vqvae2")
    futures = [worker.sample(items(pipeline, [label] * 3, seed=label)) for label in range(3)]
    for label, future in enumerate(futures):
        np.testing.assert_array_equal(codes_of(future), pipeline.generate([label] * 3, seed=label).codes)


def test_an_engine_that_fails_takes_its_requests_alone(make, pipeline, gate, caplog):
    worker = make("rqvae", slots=2)
    before = worker.pipeline
    gate.error = RuntimeError("/secret/path: out of memory")
    running, waiting = worker.sample(items(pipeline, [0, 1])), worker.sample(items(pipeline, [2], seed=1))
    gate.set()
    with pytest.raises(EngineError, match="the engine failed"):
        running.result(SECONDS)
    np.testing.assert_array_equal(codes_of(waiting), pipeline.generate([2], seed=1).codes)
    assert worker.works
    assert worker.pipeline is not before
    assert "/secret/path" in caplog.text


def test_a_request_fails_whole(make, pipeline, gate):
    """Images that still wait when another one of their request fails are not drawn."""
    worker = make("rqvae", slots=2)
    gate.error = MemoryError()
    failing = worker.sample(items(pipeline, [0, 1, 2, 0, 1]))
    gate.set()
    with pytest.raises(EngineError):
        failing.result(SECONDS)
    worker.sample(items(pipeline, [0])).result(SECONDS)
    assert len(gate.steps) == 1 + 16


def test_a_decoder_that_fails(make, pipeline, monkeypatch):
    worker = make("rqvae")
    images = np.zeros((1, *pipeline.image_shape), np.uint8)
    worker.sample(items(pipeline, [0])).result(SECONDS)
    assert worker._lanes
    monkeypatch.setattr(type(pipeline), "encode", lambda self, images: 1 / 0)
    with pytest.raises(EngineError):
        worker.encode(images).result(SECONDS)
    assert not worker.works
    monkeypatch.undo()
    np.testing.assert_array_equal(worker.encode(images).result(SECONDS), pipeline.encode(images))
    assert worker.works
    assert not worker._lanes  # nothing holds the engines of before
    np.testing.assert_array_equal(codes_of(worker.sample(items(pipeline, [0]))), pipeline.generate([0]).codes)


def test_a_plan_that_cannot_be_opened_again(artifacts, pipeline, gate):
    plan = artifacts.plan("rqvae")
    plans = [plan, artifacts.plan("movq"), plan / "nothing", plan]
    worker = Worker("plan", lambda: load(plans.pop(0), threads=1), 2, Metrics())
    gate.set()
    gate.error = RuntimeError()
    for _ in range(3):  # it fails; there is another plan; there is none
        with pytest.raises(EngineError):
            worker.sample(items(pipeline, [0])).result(SECONDS)
    np.testing.assert_array_equal(codes_of(worker.sample(items(pipeline, [0]))), pipeline.generate([0]).codes)
    worker.close()


def test_closing_cancels_what_is_left(make, pipeline, gate):
    worker = make("rqvae", slots=1)
    futures = [worker.sample(items(pipeline, [0])) for _ in range(3)]
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.set()
    closing.join(SECONDS)
    assert all(future.done() for future in futures)
    assert not worker.works


def test_previews_are_spread_evenly(make, movq_pipeline):
    worker = make("movq")
    for asked, steps in ((0, [5]), (1, [3, 5]), (2, [2, 4, 5]), (3, [2, 3, 4, 5]), (99, [1, 2, 3, 4, 5])):
        seen = []
        worker.sample(items(movq_pipeline, [0]), seen.append, asked).result(SECONDS)
        assert [preview.step for preview in seen] == steps
        assert all(preview.steps == 5 for preview in seen)
