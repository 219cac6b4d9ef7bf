"""The verb, in a process of its own, and clients of others."""

import base64
import io
import logging
import os
import re
import signal
import socket
import subprocess
import threading

import httpx
import numpy as np
import pytest
from support.serving import application, listening, pixels, png, until

from vqdeploy.serve import server

GENERATE = "/v1/images/generations"


@pytest.fixture
def serve(command):
    """Starts `vqdeploy serve` and returns the process and its address; ends it after the test."""
    processes = []

    def start(*arguments, **environment):
        process = subprocess.Popen(  # noqa: S603
            [command.script, "serve", *map(str, arguments), "--port", "0", "--threads", "1"],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        line = process.stderr.readline()
        match = re.search(r"http://\S+", line)
        assert match, line + process.stderr.read()
        return process, match[0]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_sigterm_answers_first(serve, plan, pipeline):
    process, address = serve(plan, "--slots", "1", VQDEPLOY_API_KEY="secret")
    replies = []

    def ask(seed):
        body = {"prompt": "cat", "seed": seed, "n": 16}
        with httpx.Client(headers={"Authorization": "Bearer secret"}, timeout=60) as client:
            replies.append(client.post(address + GENERATE, json=body))

    assert httpx.get(address + "/v1/models").status_code == 401
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    metric = 'vqdeploy_requests_in_flight{model="rqvae-fp32"} 3.0'
    until(lambda: metric in httpx.get(address + "/metrics").text)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    for thread in threads:
        thread.join()
    assert (process.returncode, out, err) == (0, "", "")
    assert [reply.status_code for reply in replies] == [200] * 3
    for reply in replies:
        expected = pipeline.generate([0] * 16, seed=reply.json()["seed"]).codes
        np.testing.assert_array_equal([image["codes"] for image in reply.json()["data"]], expected)


def test_an_interrupt_ends_it(serve, plan):
    process, _ = serve(plan)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{plan}", "{plan}"], "two plans have the name rqvae-fp32"),
        (["{plan}", "--host", "256.0.0.1"], "cannot listen at 256.0.0.1:0"),
        (["nothing.plan"], "nothing.plan"),
        (["{plan}", "--slots", "0"], "--slots"),
        (["{plan}", "--max-wait", "inf"], "--max-wait"),
        (["{plan}", "--host", "a..b"], "cannot listen at a..b"),
    ],
)
def test_what_cannot_be_served(command, plan, arguments, told):
    ended = command("serve", "--port", "0", *(argument.format(plan=plan) for argument in arguments))
    assert ended.returncode == 2
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("key", ["", " ", "two words", "säcret", "\udcff", "a\n"])
@pytest.mark.parametrize("place", ["option", "variable"])
def test_a_key_that_keeps_nobody_out_or_everybody(vqdeploy, monkeypatch, key, place):
    """An empty variable is a mistake in a configuration, and must not open the server."""
    monkeypatch.setattr(server, "run", lambda *_: pytest.fail("it must not start"))
    if place == "variable":
        monkeypatch.setenv("VQDEPLOY_API_KEY", key)
    code, _, err = vqdeploy("serve", "a.plan", *(["--api-key", key] if place == "option" else []))
    assert code == 2
    assert err.startswith("error: the API key is not valid; expected ASCII without spaces, found ")
    assert key.strip() == "" or key not in err


def test_a_port_that_is_taken(command, plan, serve):
    _, address = serve(plan)
    ended = command("serve", plan, "--port", address.rpartition(":")[2])
    assert ended.returncode == 2
    assert "cannot listen" in ended.stderr


@pytest.fixture(scope="module")
def client(artifacts):
    """OpenAI's own client of a server."""
    openai = pytest.importorskip("openai")
    plans = {name: artifacts.plan(name) for name in ("movq", "rqvae")}
    with (
        application(plans, api_key="secret") as app,
        listening(app) as address,
        openai.OpenAI(base_url=address + "/v1", api_key="secret", max_retries=0) as client,
    ):
        yield client


def test_openai_generates(client, movq_pipeline):
    reply = client.images.generate(
        model="movq", prompt="dog", n=2, size="16x16", response_format="b64_json", extra_body={"seed": 3, "steps": 4}
    )
    expected = movq_pipeline.generate([1, 1], seed=3, steps=4)
    for image, its in zip(reply.data, expected.images, strict=True):
        assert np.abs(pixels(image.b64_json).astype(int) - its).max() <= 1
    assert (reply.size, reply.output_format) == ("16x16", "png")


def test_openai_edits(client):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    alpha = np.full((16, 16, 1), 255, np.uint8)
    alpha[4:8] = 0
    mask = io.BytesIO(png(np.concatenate([image, alpha], -1)))
    mask.name = "mask.png"
    further = {"seed": 3, "top_k": "4,4,9,9"}
    reply = client.images.edit(model="movq", image=("a.png", png(image)), mask=mask, prompt="cat", extra_body=further)
    edited = pixels(reply.data[0].b64_json)
    np.testing.assert_array_equal(edited[8:], image[8:])
    assert (edited[4:8] != image[4:8]).any()


@pytest.mark.parametrize("model", ["movq", "rqvae"])
def test_openai_streams(client, model):
    with client.images.generate(model=model, prompt="dog", stream=True, partial_images=3) as stream:
        events = list(stream)
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert base64.b64decode(events[-1].b64_json)[1:4] == b"PNG"


def test_openai_lists_models(client):
    assert [model.id for model in client.models.list()] == ["movq", "rqvae"]
    assert client.models.retrieve("rqvae").owned_by == "vqdeploy"


def test_openai_raises_its_errors(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="no such label"):
        client.images.generate(model="movq", prompt="cow")
    with pytest.raises(openai.NotFoundError, match="expected movq or rqvae"):
        client.images.generate(model="cow", prompt="cat")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("key", [None, "secret"])
def test_a_body_that_is_malformed_gets_one_reply(artifacts, caplog, key, waits):
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    plans = {"rqvae": artifacts.plan("rqvae")}
    with application(plans, api_key=key) as app, listening(app, http=server._Protocol, log_config=None) as address:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head)
            received = connection.recv(4096) if waits and key else b""
            connection.sendall(b"ZZ\r\n")
            received += b"".join(iter(lambda: connection.recv(4096), b""))
        assert received.startswith(b"HTTP/1.1 4")
        assert received.count(b"HTTP/1.1") == 1
        assert httpx.get(f"{address}/health").status_code == 200
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} <= {"Invalid HTTP request received."}


def test_a_connection_that_asks_nothing_is_closed(monkeypatch, artifacts):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
    with application({"rqvae": artifacts.plan("rqvae")}) as app, listening(app, http=server._Protocol) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        for start in (b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(start)
                received = b"".join(iter(lambda: connection.recv(4096), b""))
            assert received.startswith(b"HTTP/1.1 200") == (b"Host" in start)
        assert httpx.get(f"{address}/health").status_code == 200
