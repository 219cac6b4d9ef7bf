"""The documents: every command parses, every Python block compiles, every linked file is there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from vqdeploy.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
VERBS = typer.main.get_command(app)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(first_word: str) -> list[str]:
    lines = (line for document in DOCUMENTS for block in blocks(document, "sh") for line in block.splitlines())
    return sorted({line for line in lines if line.startswith(first_word + " ")})


def test_there_are_commands():
    assert {shlex.split(line)[1] for line in commands("vqdeploy")} >= {"export", "build", "run", "verify", "inspect"}


@pytest.mark.parametrize("line", commands("vqdeploy"))
def test_command_parses(line):
    _, verb, *arguments = shlex.split(line, comments=True)
    VERBS.commands[verb].make_context(verb, arguments)


@pytest.mark.parametrize("line", commands("vqdeploy run"))
def test_tasks_take_the_options_that_they_are_given(vqdeploy, line):
    """They get as far as the plan, which is not here."""
    assert ".plan does not exist" in vqdeploy(*shlex.split(line, comments=True)[1:])[2]


def test_unknown_options_do_not_parse():
    with pytest.raises(Exception, match="No such option"):
        VERBS.commands["run"].make_context("run", ["--engine", "a.plan", "--nothing"])


@pytest.mark.parametrize("line", commands("make"))
def test_make_target_exists(line):
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_python_compiles(document):
    for block in blocks(document, "python"):
        compile(block, document.name, "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("input_path", ["examples/digits", "examples/digits/8.png"])
def test_example_images_exist(input_path):
    assert (ROOT / input_path).exists()
