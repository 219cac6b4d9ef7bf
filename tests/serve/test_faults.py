"""A server under load, and with clients and engines that fail."""

import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from support.serving import application, get, listening, png, post, requests, until

from vqdeploy.runtime.autoregressive import AutoregressiveSampler

GENERATE = "/v1/images/generations"
CAT = {"json": {"prompt": "cat", "seed": 0}}


@pytest.fixture
def gate(monkeypatch):
    """Holds the steps of autoregressive samplers until it is set."""
    gate, real = threading.Event(), AutoregressiveSampler._call
    monkeypatch.setattr(AutoregressiveSampler, "_call", lambda sampler: gate.wait(60) and real(sampler))
    return gate


def in_use(app):
    return sum(len(lane.images) for plan in app.plans.values() for lane in plan.worker._lanes.values())


def in_flight(app):
    return sum(plan._in_flight for plan in app.plans.values())


def test_a_full_queue_says_when_to_come_again(plan, gate):
    with application({"plan": plan}, slots=1, max_queue=2, max_wait=60) as app:
        threading.Timer(0.5, gate.set).start()
        replies = requests(app, *[("POST", GENERATE, CAT)] * 5)
        assert sorted(reply.status_code for reply in replies) == [200, 200, 200, 429, 429]
        refused = [reply for reply in replies if reply.status_code == 429]
        assert all(1 <= int(reply.headers["retry-after"]) <= 60 for reply in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        assert post(app, GENERATE, **CAT).status_code == 200


def test_a_request_that_takes_too_long(plan, gate):
    with application({"plan": plan}, slots=1, max_wait=0.3) as app:
        running, waiting = requests(app, *[("POST", GENERATE, CAT)] * 2)
        assert (running.status_code, waiting.status_code) == (504, 504)
        assert running.json()["error"]["code"] == "timeout"
        assert in_flight(app) == 0
        gate.set()
        until(lambda: in_use(app) == 0)


def test_a_stream_that_takes_too_long(plan, gate):
    with application({"plan": plan}, max_wait=0.3) as app:
        reply = post(app, GENERATE, json={"prompt": "cat", "stream": True})
        assert reply.status_code == 200
        name, data = reply.text.strip().split("\n")
        assert name == "event: error"
        assert json.loads(data[6:])["error"]["code"] == "timeout"
        gate.set()
        until(lambda: in_use(app) == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_the_slots_of_a_client_that_leaves_are_free(plan, gate, stream):
    with application({"plan": plan}, slots=2) as app, listening(app) as address:
        body = {"prompt": "cat", "n": 2, "stream": stream, "partial_images": 3 if stream else 0}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + GENERATE, json=body, timeout=0.3)
        assert in_use(app) == 2
        until(lambda: in_flight(app) == 0)
        gate.set()
        until(lambda: in_use(app) == 0)
        assert 'route="/v1/images/generations",status="' + ("200" if stream else "499") in get(app, "/metrics").text


def test_a_client_that_leaves_in_the_middle_of_a_body(plan):
    with application({"plan": plan}) as app, listening(app) as address:
        url = httpx.URL(address)
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
            time.sleep(0.1)
        assert httpx.post(address + GENERATE, **CAT).status_code == 200


def test_an_engine_that_fails(plan, pipeline, monkeypatch):
    with application({"plan": plan}) as app:
        monkeypatch.setattr(AutoregressiveSampler, "_call", lambda sampler: (_ for _ in ()).throw(OSError("/secret")))
        reply = post(app, GENERATE, **CAT)
        stream = post(app, GENERATE, json={"prompt": "cat", "stream": True})
        assert reply.status_code == 500
        assert reply.json()["error"]["message"] == "the engine failed; try again"
        assert json.loads(stream.text.strip().split("\n")[1][6:]) == reply.json()
        assert get(app, "/ready").status_code == 503
        assert get(app, "/health").status_code == 200
        monkeypatch.undo()
        again = post(app, GENERATE, **CAT).json()["data"][0]["codes"]
        assert again == pipeline.generate([0], seed=0).codes[0].tolist()
        assert get(app, "/ready").status_code == 200


def test_an_error_that_should_not_occur(plan, monkeypatch):
    with application({"plan": plan}) as app:
        monkeypatch.setattr(type(app.plans["plan"]), "describe", lambda self: {}["/secret"])
        reply = get(app, "/v1/models")
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"


def test_mixed_traffic(artifacts):
    """Everything at once, with guidance and without, over one connection each."""
    pipeline = artifacts.pipeline("movq")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    image[..., 3] = np.where(np.arange(16) < 9, 255, 0)
    with application({"movq": artifacts.plan("movq")}, slots=3) as app:
        calls = []
        for seed in range(4):
            calls += [
                ("POST", GENERATE, {"json": {"label": 1, "seed": seed, "guidance_scale": 1 + seed % 2, "n": 2}}),
                ("POST", GENERATE, {"json": {"label": 2, "seed": seed, "stream": True, "partial_images": 4}}),
                ("POST", "/v1/images/edits", {"data": {"prompt": "cat"}, "files": {"image": png(image)}}),
                ("POST", "/v1/codes/decode", {"json": {"codes": np.zeros((2, *pipeline.grid), int).tolist()}}),
                ("POST", GENERATE, {"json": {"label": 9}}),
            ]
        replies = requests(app, *calls)
    assert [reply.status_code for reply in replies] == [200, 200, 200, 200, 400] * 4
    for seed, reply in enumerate(replies[::5]):
        expected = pipeline.generate([1, 1], seed=seed, guidance_scale=1 + seed % 2)
        np.testing.assert_array_equal([each["codes"] for each in reply.json()["data"]], expected.codes)
