"""The routes: what they answer is what the pipeline does."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from support.serving import application, codes, get, pixels, png, post, requests, text
from support.systems import SMALL

from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.systems import create

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def app(artifacts):
    names = ("rqvae", "movq", "vit", "vqvae2", "three", "text", "features", "llamagen", "var")
    with application(
        {name: artifacts.plan(name) for name in names}, max_images=4, max_pixels=5000, max_body=50_000
    ) as app:
        yield app


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture
def hole():
    """The lower middle of an image of 16x16, which is to be drawn anew."""
    hole = np.zeros((16, 16), bool)
    hole[8:11, 5:12] = True
    return hole


def events(reply):
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    assert all(block[0].startswith("event: ") and block[1].startswith("data: ") for block in blocks)
    found = [(block[0][7:], json.loads(block[1][6:])) for block in blocks]
    assert all(event.get("type", "error") == name for name, event in found)
    return [event for _, event in found]


@pytest.mark.parametrize("name", ["rqvae", "movq", "vit", "vqvae2"])
def test_a_generation_is_that_of_the_pipeline(app, artifacts, name):
    pipeline = artifacts.pipeline(name)
    reply = post(app, GENERATE, json={"model": name, "prompt": "dog", "n": 3, "seed": 5, "temperature": 0.8})
    expected = pipeline.generate([1, 1, 1], seed=5, temperature=0.8)
    np.testing.assert_array_equal(codes(reply), expected.codes)
    for image, its in zip(reply.json()["data"], expected.images, strict=True):
        assert np.abs(pixels(image["b64_json"]).astype(int) - its).max() <= 1
    assert reply.json()["options"] == {k: v for k, v in expected.options.items() if k not in ("seed", "labels")}
    assert reply.json()["seed"] == 5


def test_texts_and_no_classes(app, artifacts):
    pipeline = artifacts.pipeline("text")
    ids = pipeline.condition.examples(1)
    reply = post(app, GENERATE, json={"model": "text", "text_ids": ids[0].tolist(), "seed": 1})
    np.testing.assert_array_equal(codes(reply), pipeline.generate(ids, seed=1).codes)
    pipeline = artifacts.pipeline("features")
    features = pipeline.condition.examples(1)
    asked = {"model": "features", "text_features": npy(features[0]), "seed": 1, "guidance_interval": 3}
    expected = pipeline.generate(features, seed=1, guidance_interval=3).codes
    np.testing.assert_array_equal(codes(post(app, GENERATE, json=asked)), expected)
    reply = post(app, GENERATE, json={"model": "three", "seed": 1})
    np.testing.assert_array_equal(codes(reply), artifacts.pipeline("three").generate(seed=1).codes)


@pytest.mark.parametrize(
    "label", [{"prompt": "eel"}, {"prompt": " 2 "}, {"label": 2}, {"label": "eel", "prompt": "cat"}]
)
def test_a_class_by_name_or_number(app, pipeline, label):
    reply = post(app, GENERATE, json={"seed": 0, **label})
    np.testing.assert_array_equal(codes(reply), pipeline.generate([2], seed=0).codes)


def test_no_class_is_no_label_where_there_is_one(app, movq_pipeline):
    known = np.full((1, *movq_pipeline.grid), -1)
    reply = post(app, GENERATE, json={"model": "movq", "seed": 0})
    np.testing.assert_array_equal(codes(reply), movq_pipeline.complete(known, None, seed=0).codes)
    assert post(app, GENERATE, json={"model": "rqvae"}).status_code == 400


def test_seeds_are_random_and_told(app):
    first, second = (post(app, GENERATE, json={"prompt": "cat"}) for _ in range(2))
    assert first.json()["seed"] != second.json()["seed"]
    again = post(app, GENERATE, json={"prompt": "cat", "seed": first.json()["seed"]})
    np.testing.assert_array_equal(codes(first), codes(again))


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_formats(app, kind):
    reply = post(app, GENERATE, json={"prompt": "cat", "output_format": kind}).json()
    assert (reply["output_format"], reply["size"]) == (kind, "16x16")
    assert pixels(reply["data"][0]["b64_json"]).shape == (16, 16, 3)


@pytest.mark.parametrize("form", ["alpha of the mask", "white of the mask", "alpha of the image"])
@pytest.mark.parametrize("name", ["movq", "rqvae"])
def test_an_edit_is_that_of_the_pipeline(app, artifacts, picture, hole, name, form):
    pipeline, alpha = artifacts.pipeline(name), np.where(hole, 0, 255).astype(np.uint8)[..., None]
    seen = picture
    files = {"image": png(picture)}
    if form == "alpha of the mask":
        files["mask"] = png(np.concatenate([picture, alpha], -1))
    elif form == "white of the mask":
        files["mask"] = png(255 - alpha[..., 0])
    else:
        files = {"image": png(np.concatenate([picture, alpha], -1))}
        seen = np.where(hole[..., None], 255, picture)
    fields = {"model": name, "prompt": "cat", "seed": "7", "n": "2", "top_k": "9,9,3,3"}
    reply = post(app, EDIT, data=fields, files=files)
    expected = pipeline.inpaint(seen[None].astype(np.uint8), [0], mask=hole, completions=2, seed=7, top_k=[9, 9, 3, 3])
    np.testing.assert_array_equal(codes(reply), expected.codes)
    images = np.stack([pixels(image["b64_json"]) for image in reply.json()["data"]])
    assert np.abs(images.astype(int) - expected.images).max() <= 1
    if name == "movq":
        np.testing.assert_array_equal(images[:, ~hole], np.stack([seen[~hole]] * 2))
    assert ("raster order" in (reply.json()["note"] or "")) == (name == "rqvae")


def test_a_field_of_a_form_may_be_as_long_as_the_body(artifacts, picture, hole):
    """Starlette allows a megabyte by itself, and features of texts are longer."""
    files = {"image": png(picture), "mask": png(hole)}
    with application({"movq": artifacts.plan("movq")}) as app:
        assert post(app, EDIT, data={"label": "1", "user": "x" * 2_000_000}, files=files).status_code == 200
        assert post(app, EDIT, data={"label": "1", "user": "x" * 2**24}, files=files).status_code == 413


def test_blended_maps_are_decoded_instead_of_codes(app, artifacts, picture, hole):
    pipeline = artifacts.pipeline("var")
    plain, smooth = {"model": "var", "label": 1, "seed": 3, "n": 2}, {"more_smooth": 1}
    together = requests(app, ("POST", GENERATE, {"json": plain}), ("POST", GENERATE, {"json": plain | smooth}))
    images = [np.stack([pixels(image["b64_json"]) for image in reply.json()["data"]]) for reply in together]
    for reply, found, options in zip(together, images, ({}, smooth), strict=True):
        expected = pipeline.generate([1, 1], seed=3, **options)
        np.testing.assert_array_equal(codes(reply), expected.codes)
        assert np.abs(found.astype(int) - expected.images).max() <= 1
    assert np.abs(images[0].astype(int) - images[1]).max() > 9
    asked = plain | smooth | {"stream": True, "partial_images": 1}
    *_, last = events(post(app, GENERATE, json=asked))
    np.testing.assert_array_equal(pixels(last["b64_json"]), images[1][last["image_index"]])
    image = np.resize(picture, pipeline.image_shape)
    hole = np.resize(hole, pipeline.image_shape[:2])
    reply = post(
        app,
        EDIT,
        data={"model": "var", "label": "1", "seed": "3"} | smooth,
        files={"image": png(image), "mask": png(hole)},
    )
    expected = pipeline.inpaint(image[None], [1], mask=hole, seed=3, more_smooth=1)
    assert np.abs(pixels(reply.json()["data"][0]["b64_json"]).astype(int) - expected.images[0]).max() <= 1


def test_images_of_other_sizes_are_cut_as_in_run(app, pipeline, tmp_path):
    from vqdeploy.runtime.images import read

    odd = png(np.random.default_rng(1).integers(0, 256, (50, 31, 3), np.uint8))
    (tmp_path / "odd.png").write_bytes(odd)
    expected = pipeline.encode(read(tmp_path / "odd.png", 16)[None])
    assert post(app, "/v1/codes/encode", json={"images": [text(odd)]}).json()["codes"] == expected.tolist()


@pytest.mark.parametrize("name", ["rqvae", "movq", "vqvae2"])
def test_codes_there_and_back(app, artifacts, name):
    pipeline = artifacts.pipeline(name)
    images = np.random.default_rng(2).integers(0, 256, (2, *pipeline.image_shape), np.uint8)
    reply = post(app, "/v1/codes/encode", json={"model": name, "images": [text(png(image)) for image in images]})
    assert reply.json()["codes"] == pipeline.encode(images).tolist()
    reply = post(app, "/v1/codes/decode", json={"model": name, "codes": reply.json()["codes"]})
    decoded = np.stack([pixels(image["b64_json"]) for image in reply.json()["data"]])
    assert np.abs(decoded.astype(int) - pipeline.reconstruct(images)).max() <= 1


def test_fewer_depths(app, pipeline):
    drawn = np.random.default_rng(3).integers(0, pipeline.codebook_size, (1, *pipeline.grid))
    reply = post(app, "/v1/codes/decode", json={"codes": drawn.tolist(), "depth": 1})
    decoded = pixels(reply.json()["data"][0]["b64_json"])
    assert np.abs(decoded.astype(int) - pipeline.decode(drawn, depth=1)[0]).max() <= 1


@pytest.mark.parametrize(
    ("name", "asked", "previews"), [("movq", 99, 4), ("movq", 2, 2), ("movq", 0, 0), ("rqvae", 3, 3)]
)
def test_a_stream_previews_steps(app, artifacts, name, asked, previews):
    steps = []
    artifacts.pipeline(name).generate([2, 2], seed=4, callback=lambda step: steps.append(step.codes.copy()))
    body = {"model": name, "label": 2, "seed": 4, "n": 2, "stream": True, "partial_images": asked}
    found = events(post(app, GENERATE, json=body))
    for image in range(2):
        *partial, last = [event for event in found if event["image_index"] == image]
        assert [event["type"] for event in partial] == ["image_generation.partial_image"] * previews
        assert [event["partial_image_index"] for event in partial] == list(range(previews))
        for event in partial:
            assert event["steps"] == len(steps)
            np.testing.assert_array_equal(event["codes"], steps[event["step"] - 1][image])
            assert pixels(event["b64_json"]).shape == (16, 16, 3)
        assert last["type"] == "image_generation.completed"
        np.testing.assert_array_equal(last["codes"], steps[-1][image])


@pytest.mark.parametrize("stream", [False, True])
def test_codes_alone_leave_the_decoder_out(app, movq_pipeline, monkeypatch, stream):
    expected = movq_pipeline.generate([1], seed=2).codes[0].tolist()
    monkeypatch.setattr(type(movq_pipeline), "decode", lambda *_: 1 / 0)
    body = {"model": "movq", "prompt": "dog", "seed": 2, "response_format": "codes"}
    reply = post(app, GENERATE, json={**body, "stream": stream, "partial_images": 9 if stream else 0})
    found = events(reply) if stream else reply.json()["data"]
    assert [image["b64_json"] for image in found] == [None] * (5 if stream else 1)
    assert found[-1]["codes"] == expected


def test_a_stream_of_an_edit_keeps_the_rest(app, picture, hole):
    files = {"image": png(picture), "mask": png(np.where(hole, 255, 0).astype(np.uint8))}
    data = {"model": "movq", "prompt": "cat", "stream": "true", "partial_images": "9", "steps": "3"}
    found = events(post(app, EDIT, data=data, files=files))
    assert [event["type"] for event in found] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    for event in found:
        np.testing.assert_array_equal(pixels(event["b64_json"])[~hole], picture[~hole])


def test_a_tokenizer_alone(artifacts):
    tokenizer = create(replace(SMALL, prior=None))
    pipeline = artifacts.pipeline(tokenizer)
    image = np.random.default_rng(0).integers(0, 256, pipeline.image_shape, np.uint8)
    with application({"tokenizer": artifacts.plan(tokenizer)}) as app:
        reply = post(app, "/v1/codes/encode", json={"images": [text(png(image))]})
        assert reply.json()["codes"] == pipeline.encode(image[None]).tolist()
        assert "a tokenizer and no prior" in post(app, GENERATE, json={"prompt": "cat"}).json()["error"]["message"]
        assert "a tokenizer and no prior" in post(app, EDIT, data={}, files={"image": png(image)}).text
        model = get(app, "/v1/models/tokenizer").json()
    assert (model["kind"], model["classes"], model["options"]) == (None, None, {})


def test_guidance_needs_two_rows(artifacts):
    with application({"movq": artifacts.plan("vit", batch=SizeRange(1, 1, 1))}) as app:
        reply = post(app, GENERATE, json={"label": 1})
        assert "an image with guidance takes 2 rows" in reply.json()["error"]["message"]
        assert post(app, GENERATE, json={"label": 1, "guidance_scale": 1}).status_code == 200


def test_models(app, artifacts):
    listed = get(app, "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == list(app.plans)
    model = get(app, "/v1/models/movq").json()
    assert model == listed["data"][1]
    pipeline = artifacts.pipeline("movq")
    assert (model["labels"], model["options"]) == (["cat", "dog", "eel"], pipeline.options())
    assert (model["maps"], model["keeps_pixels"], model["label_is_optional"]) == ([[4, 4, 4]], True, True)


def test_states(app):
    assert get(app, "/health").json() == get(app, "/ready").json() == {"status": "ok"}


def test_metrics(artifacts):
    with application({"plan": artifacts.plan("rqvae")}) as app:
        post(app, GENERATE, json={"prompt": "cat", "n": 2})
        get(app, "/v1/models/" + "x" * 50)
        lines = dict(line.rsplit(" ", 1) for line in get(app, "/metrics").text.splitlines() if line[0] != "#")
    assert lines['vqdeploy_requests_total{route="/v1/images/generations",status="200"}'] == "1.0"
    assert lines['vqdeploy_requests_total{route="/v1/models/{name}",status="404"}'] == "1.0"
    assert lines['vqdeploy_images_total{model="rqvae-fp32",task="sample"}'] == "2.0"
    assert lines['vqdeploy_step_seconds_count{model="rqvae-fp32"}'] == "16.0"
    assert lines['vqdeploy_slots{model="rqvae-fp32"}'] == "16.0"
    assert lines['vqdeploy_slots_in_use{model="rqvae-fp32"}'] == "0.0"


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return text(file.getvalue())


def raw(text):
    return {"content": text, "headers": {"content-type": "application/json"}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"json": {"prompt": "cow"}}, "no such label"),
        ({"json": {"prompt": "cat", "colour": 1}}, "colour: Extra inputs are not permitted"),
        ({"json": {"prompt": "cat", "n": 5}}, "too many images in one request; expected at most 4"),
        ({"json": {"prompt": "cat", "n": 0}}, "n: Input should be greater than or equal to 1"),
        ({"json": {"prompt": "cat", "size": "1024x1024"}}, "images of one size; expected 16x16"),
        ({"json": {"prompt": "cat", "response_format": "url"}}, "response_format"),
        ({"json": {"prompt": "cat", "steps": 3}}, "no option steps"),
        ({"json": {"prompt": "cat", "temperature": [1, 2]}}, "temperature has the wrong number of values"),
        ({"json": {"prompt": "cat", "seed": 2**63}}, "seed"),
        ({"json": {"prompt": "cat", "text_ids": [1]}}, "takes labels, not texts"),
        ({"json": {"model": "movq", "label": 0, "schedule": "slow"}}, "schedule"),
        ({"json": {"model": "text"}}, "needs a text"),
        ({"json": {"model": "text", "text_ids": [10**30]}}, "text"),
        ({"json": {"model": "text", "text_features": "AAAA"}}, "takes text_ids"),
        ({"json": {"model": "features", "text_ids": [1]}}, "takes text_features"),
        ({"json": {"model": "features", "text_features": "AAAA"}}, "an NPY in base64"),
        ({"json": {"model": "features", "text_features": npy(np.zeros((3, 12)))}}, "no tokens"),
        ({"json": {"model": "features", "text_features": npy(np.zeros((3, 5)))}}, "up to 7, 12"),
        (raw('{"prompt": NaN}'), "prompt"),
        (raw('{"prompt": "\\ud800"}'), "found \\ud800"),
        (raw('{"label": 1e400}'), "label"),
        (raw('{"prompt": "cat", "temperature": Infinity}'), "temperature is out of range"),
        (raw("[" * 10_000), ""),
        ({"json": {"prompt": "cat", "label": ""}}, "no such label"),
        ({"json": {"prompt": "cat", "partial_images": 2}}, "previews need a stream"),
        (raw("{"), "the body is not JSON: Expecting property name"),
        (raw(b"\xff"), ""),
        ({"content": "prompt=cat", "headers": {"content-type": "text/plain"}}, ""),
    ],
)
def test_what_is_wrong_with_a_generation(app, given, told):
    reply = post(app, GENERATE, **given)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert told in error["message"]
    assert error["message"].isprintable()
    assert error["param"] is None or not error["param"].isdigit()
    assert len(error["message"]) < 500


def test_a_field_that_is_there_twice(app, picture):
    for name in ("image", "label"):
        files = [
            ("image", png(picture)),
            ("label", (None, "cat")),
            (name, png(picture) if name == "image" else (None, "dog")),
        ]
        reply = post(app, EDIT, files=files)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"].startswith(f"the form has the field {name} more than once")
    files = [("image", png(picture)), ("label", (None, "cat")), *[("top_p", (None, "1"))] * 2]
    assert "top_p has the wrong number of values" in post(app, EDIT, files=files).json()["error"]["message"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "image"),
        ({"image": b"no image"}, "the image is not an image that can be read"),
        ({"image": png(np.zeros((16, 16), np.uint8))}, "there is no mask"),
        ({"image": png(np.zeros((16, 16), np.uint8)), "mask": b""}, "the mask is not an image"),
        ({"image": png(np.zeros((16, 16), np.uint8)), "mask": png(np.zeros((16, 16), np.uint8))}, "the mask is empty"),
        ({"image": png(np.zeros((100, 100), np.uint8))}, "more than 5,000"),
    ],
)
def test_what_is_wrong_with_an_edit(app, files, told):
    reply = post(app, EDIT, data={"prompt": "cat"}, files=files)
    assert (reply.status_code, told in reply.json()["error"]["message"]) == (400, True), reply.text


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("encode", {"images": []}, "images"),
        ("encode", {"images": ["%%"]}, "not in base64"),
        ("encode", {"images": [text(b"GIF89a")]}, "not an image"),
        ("encode", {"images": ["", "", "", "", ""]}, "too many images"),
        ("decode", {"codes": [1]}, "wrong shape"),
        ("decode", {"codes": [[1], [1, 2]]}, "rows of one length"),
        ("decode", {"codes": np.full((1, 4, 4, 4), 64).tolist()}, "out of range"),
        ("decode", {"codes": np.full((1, 4, 4, 4), -1).tolist()}, "out of range"),
        ("decode", {"codes": np.full((1, 4, 4, 4), 2**70).tolist()}, "wrong shape or type"),
        ("decode", {"codes": np.full((5, 4, 4, 4), 0).tolist()}, "too many images"),
        ("decode", {"codes": np.full((1, 4, 4, 4), 0).tolist(), "depth": 5}, "no such depth"),
        ("decode", {"model": "movq", "codes": np.full((1, 4, 4, 4), 0).tolist(), "depth": 1}, "no depths"),
    ],
)
def test_what_is_wrong_with_codes(app, path, body, told):
    reply = post(app, f"/v1/codes/{path}", json=body)
    assert (reply.status_code, told in reply.json()["error"]["message"]) == (400, True), reply.text


def test_what_there_is_not(app):
    replies = requests(
        app,
        ("GET", "/v1/models/../../etc/passwd", {}),
        ("GET", "/v1/models/cow", {}),
        ("POST", GENERATE, {"json": {"model": "/etc/passwd", "prompt": "cat"}}),
        ("GET", "/v1/images/generations", {}),
        ("GET", "/docs", {}),
    )
    assert [reply.status_code for reply in replies] == [404, 404, 404, 405, 404]
    assert all(set(reply.json()) == {"error"} for reply in replies)
    assert "expected rqvae or movq" in replies[1].json()["error"]["message"]


def test_a_body_that_is_too_large(app):
    async def parts():
        for _ in range(60):
            yield b" " * 1000

    json_type = {"content-type": "application/json"}
    replies = requests(
        app,
        ("POST", GENERATE, {"content": b" " * 60_000, "headers": json_type}),
        ("POST", GENERATE, {"content": parts(), "headers": json_type}),
        ("POST", EDIT, {"data": {"prompt": "cat" * 20_000}, "files": {"image": b"x"}}),
        ("POST", EDIT, {"content": parts(), "headers": {"content-type": "multipart/form-data; boundary=x"}}),
    )
    assert [reply.status_code for reply in replies] == [413, 413, 413, 400]
    assert all(set(reply.json()) == {"error"} for reply in replies)


@pytest.mark.parametrize("key", [None, "", "wrong", "säcret"])
def test_a_key_keeps_others_out(artifacts, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    with application({"plan": artifacts.plan("rqvae")}, api_key="secret") as app:
        calls = [("POST", GENERATE, {"json": {}}), ("GET", "/v1/models", {}), ("GET", "/v1/nothing", {})]
        refused = requests(app, *calls, headers=headers)
        allowed = requests(app, *calls, headers={"Authorization": "Bearer secret"})
        assert get(app, "/health").status_code == 200
    assert [reply.status_code for reply in refused] == [401] * 3
    assert [reply.status_code for reply in allowed] == [400, 200, 404]
    assert refused[0].json()["error"]["code"] == "invalid_api_key"


def test_other_web_sites_are_kept_out(app):
    assert get(app, "/v1/models", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert get(app, "/v1/models", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_the_fields_are_those_of_the_table():
    from vqdeploy.options import OPTIONS
    from vqdeploy.serve.schemas import Edit, Generation

    assert set(OPTIONS) <= set(Generation.model_fields) & set(Edit.model_fields)
