"""The table of sampling options, and what follows from it."""

import re
from pathlib import Path

import numpy as np
import pytest
import typer

from vqdeploy.cli import app
from vqdeploy.errors import VqdeployError
from vqdeploy.options import SAMPLING_OPTIONS
from vqdeploy.reference import _choices
from vqdeploy.runtime.options import choose, for_graph
from vqdeploy.runtime.schedules import SCHEDULES
from vqdeploy.systems import Sampling

ROOT = Path(__file__).parents[2]
VERBS = typer.main.get_command(app).commands
NAMED = {option.name: option for option in SAMPLING_OPTIONS}


def test_the_readme_has_the_table():
    """After a change of `vqdeploy/options.py`, paste what this test expects."""
    lines = ["| option | values | meaning |", "|---|---|---|"]
    for option in SAMPLING_OPTIONS:
        spellings = ", ".join(f"`{spelling}`" for spelling in option.spellings)
        values = option.values + (", for each depth" if option.per_depth else "")
        lines.append(f"| {spellings} | {values} | {option.help} |")
    assert "\n".join(lines) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["run", "bench"])
def test_verbs_that_sample_take_every_option_and_spelling(verb):
    taken = {spelling for parameter in VERBS[verb].params for spelling in parameter.opts}
    assert {spelling for option in SAMPLING_OPTIONS for spelling in option.spellings} <= taken


def test_the_table_names_the_schedules():
    assert set(NAMED["schedule"].choices) == set(SCHEDULES)


VALUES = {
    "temperature": ([0, 0.5, [1, 0, 2.5, 9]], [-1, np.inf, "1", True, [1, 2]]),
    "top_k": ([0, 64, [1, 2, 3, 64]], [-1, 65, 1.5, "2"]),
    "top_p": ([0, 1, [0.1, 0.2, 0.3, 1]], [-0.1, 1.1, np.nan]),
    "guidance_scale": ([0, 1, 1000], [-1, 1001, [1, 2, 3, 4]]),
    "guidance_interval": ([-1, 0, 100], [-2, 1.5, np.inf, [1, 2, 3, 4]]),
    "steps": ([1, 10_000], [0, 10_001, 2.5, [1, 2, 3, 4]]),
    "schedule": (["cosine", "halton"], ["sine", 3, ""]),
    "more_smooth": ([0, 1], [-1, 2, 0.5, [1, 0, 0, 1]]),
    "choice_temperature": ([0, 4.5], [-1, np.nan]),
}


def test_every_option_has_its_cases():
    assert VALUES.keys() == NAMED.keys()


@pytest.mark.parametrize("name", VALUES)
def test_values_within_the_limits_are_taken(name):
    for value in VALUES[name][0]:
        chosen = choose({name: value}, {name: VALUES[name][0][0]}, depth=4, codebook_size=64)[name]
        assert chosen == value
        assert isinstance(chosen, (list, NAMED[name].type, int))


@pytest.mark.parametrize("name", VALUES)
def test_values_beyond_the_limits_are_refused(name):
    for value in VALUES[name][1]:
        with pytest.raises(VqdeployError, match=name):
            choose({name: value}, {name: VALUES[name][0][0]}, depth=4, codebook_size=64)


def test_an_option_of_a_later_version_is_refused():
    with pytest.raises(VqdeployError, match=r"unknown option sharpness\. Fix: pip install -U vqdeploy"):
        choose({}, {"sharpness": 1}, depth=1, codebook_size=2)


@pytest.mark.parametrize("temperature", [0, 1e-30, 0.5, 1e30, [0, 0.5, 1, 2]])
@pytest.mark.parametrize("top_k", [0, 3, [0, 1, 2, 64]])
@pytest.mark.parametrize("top_p", [1, 0.9, [0, 0.5, 0.9, 1]])
def test_the_reference_takes_options_as_plans_do(temperature, top_k, top_p):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected = for_graph(options, 4, 64)
    for (name, values), found in zip(expected.items(), _choices(Sampling(**options), 4, 64), strict=True):
        np.testing.assert_array_equal(values, found, err_msg=name, strict=True)


def test_options_of_the_command_line_arrive(vqdeploy, monkeypatch):
    asked = {}

    def run(job):
        asked.update(job.options, threads=job.threads, columns=job.columns, keep_levels=job.keep_levels)
        return {"output": "a.png", "seconds": 0.0}

    monkeypatch.setattr("vqdeploy.cli.tasks.run", run)
    given = "--temperature 0.5,1 --top-k 3,4 --top-p 0.5 --cfg-scale 2 --num-inference-steps 7 --schedule halton"
    own = "--cfg-interval 9 --more-smooth 1 --choice-temperature 3 --seed 5 --threads 2 --columns 3 --keep-levels 1"
    assert vqdeploy("run", "--engine", "a.plan", *given.split(), *own.split())[0] == 0
    assert asked == {
        "temperature": [0.5, 1.0],
        "top_k": [3, 4],
        "top_p": 0.5,
        "guidance_scale": 2.0,
        "guidance_interval": 9,
        "steps": 7,
        "schedule": "halton",
        "more_smooth": 1,
        "choice_temperature": 3.0,
        "seed": 5,
        "threads": 2,
        "columns": 3,
        "keep_levels": 1,
    }


def test_help_tells_the_values_of_a_choice(vqdeploy):
    assert re.search(r"cosine,\s+linear", vqdeploy("run", "--help")[1])
