"""The tool that loads a server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "load.py"


def run(*arguments):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, TOOL, *map(str, arguments)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300).stdout)  # noqa: S603


@pytest.mark.slow
def test_a_soak_of_few_requests(movq_plan):
    found = run("soak", movq_plan, "--requests", 40, "--concurrency", 4)
    assert sum(found["statuses"].values()) == found["requests"] == 40
    assert set(found["statuses"]) <= {"200", "400", "left"}
    assert len(found["readings"]) == 20


@pytest.mark.slow
def test_the_speed_of_few_requests(plan):
    found = run("speed", plan, "--requests", 2, "--concurrency", 4, "--threads", 1)
    assert found["code_maps_per_s_at_4"] > 0
