"""What the OpenAPI description allows and what it does not: no request makes a server fail."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support.serving import application

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
OPERATIONS = [
    "POST /v1/images/generations",
    "POST /v1/images/edits",
    "POST /v1/codes/encode",
    "POST /v1/codes/decode",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /ready",
    "GET /metrics",
]


@pytest.fixture(scope="module")
def operations(artifacts):
    with application({"movq": artifacts.plan("movq")}, max_images=2, max_wait=60) as app:
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        assert "servers" not in schema.raw_schema
        yield {each.ok().label: each.ok() for each in schema.get_all_operations()}


def test_all_operations_are_tried(operations):
    assert sorted(operations) == sorted(OPERATIONS)


TRIED = [
    (name, mode)
    for name in OPERATIONS
    for mode in schemathesis.GenerationMode
    if mode.is_positive or name.startswith("POST")  # the others take nothing that could be wrong
]


@pytest.mark.parametrize(("name", "mode"), TRIED)
def test_no_request_makes_it_fail(operations, name, mode):
    checks = schemathesis.checks
    checked = (checks.not_a_server_error, checks.response_schema_conformance, checks.content_type_conformance)

    @given(operations[name].as_strategy(generation_mode=mode))
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def try_it(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("steps"), int):
            case.body["steps"] = min(case.body["steps"], 50)  # 10,000 are allowed, and take as long as they say
        case.call_and_validate(checks=checked)

    try_it()
