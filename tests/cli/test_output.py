"""What the command line prints: no text from outside acts on a terminal, and no terminal ends a verb."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

from vqdeploy.cli import output
from vqdeploy.errors import LONGEST

HOSTILE = "\x1b]0;pwn\x07\x1b[31m"


def harmless(done):
    """Whether a command ended as it should, with nothing that acts on a terminal."""
    assert done.returncode in (0, 1, 2), done.stderr
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed
    assert all(line.isprintable() for line in printed.split("\n"))
    assert all(len(line) < 500 for line in done.stderr.split("\n"))
    return done


def changed(plan, target, edit):
    """A copy of a plan with another manifest."""
    with zipfile.ZipFile(plan) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "manifest.json":
                manifest = json.loads(content)
                edit(manifest)
                content = json.dumps(manifest)
            copy.writestr(name, content)
    return target


EDITS = {
    "tensor": lambda manifest, text: manifest["stages"][0]["inputs"][0].update(name=text),
    "dtype": lambda manifest, text: manifest["stages"][0]["inputs"][0].update(dtype=text),
    "shape": lambda manifest, text: manifest["stages"][0]["inputs"][0].update(shape=[text]),
    "plugin": lambda manifest, text: manifest["stages"][0].update(plugins=[text]),
    "weight": lambda manifest, text: manifest["stages"][0].update(weights=[text]),
    "alias": lambda manifest, text: manifest["stages"][0].update(aliases={text: text}),
    "file": lambda manifest, text: manifest["stages"][0].update(file=text),
    "stage": lambda manifest, text: manifest["stages"][0].update(name=text),
    "backend": lambda manifest, text: manifest.update(backend=text),
    "builder": lambda manifest, text: manifest.update(builder=text),
    "target": lambda manifest, text: manifest.update(targets=[text]),
    "system": lambda manifest, text: manifest.update(name=text),
    "format": lambda manifest, text: manifest.update(format=text),
    "opset": lambda manifest, text: manifest.update(opset=text),
    "digest": lambda manifest, text: manifest["members"].update({"encode.onnx": text}),
    "member": lambda manifest, text: manifest["members"].update({text: "x"}),
    "label": lambda manifest, text: manifest.update(labels=[text, "a", "b"]),
    "producer": lambda manifest, text: manifest["provenance"].update(producer=text),
    "configuration": lambda manifest, text: manifest["config"].update({text: text}),
    "option": lambda manifest, text: manifest["sampling"]["options"].update({text: 1}),
    "kind": lambda manifest, text: manifest["sampling"].update(kind=text),
    "key": lambda manifest, text: manifest.update({text: text}),
}


@pytest.mark.parametrize("part", EDITS)
def test_text_of_a_plan_does_not_act_on_the_terminal(vqdeploy, plan, tmp_path, part):
    for text in (HOSTILE, "\udcff", "a\nPASSED", "x" * 10**6, "\u202e"):
        changed(plan, tmp_path / "a.plan", lambda manifest, text=text: EDITS[part](manifest, text))
        for verb in (["inspect"], ["run", "--label", "nosuch", "--engine"], ["-vv", "inspect"], ["inspect", "--json"]):
            code, out, err = vqdeploy(*verb, "a.plan")
            done = subprocess.CompletedProcess(verb, code, out, err)
            if verb[0] == "-vv":
                assert all(line.isprintable() for line in (out + err).split("\n"))
            else:
                harmless(done)
            assert "PASSED" not in (out + err).split("\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [HOSTILE],
        ["run", HOSTILE],
        ["run", f"--{HOSTILE}"],
        ["run", "--engine", HOSTILE],
        ["run", "--engine", "a.plan", "--seed", HOSTILE],
        ["run", "--engine", "a.plan", "--task", HOSTILE],
        ["run", "--engine", "a.plan", "--temperature", HOSTILE],
        ["run", "--engine", "a.plan", "--num-images", "9" * 100_000],
        ["export", "--model", HOSTILE],
        ["export", "--checkpoint", b"\xff\xfe"],
        ["build", b"\xff"],
        ["inspect", b"\xff.plan"],
        ["inspect", "x" * 100_000],
        ["train", "--data", HOSTILE],
    ],
    ids=ascii,
)
def test_what_was_typed_does_not_act_on_the_terminal(command, tmp_path, arguments):
    done = subprocess.run(  # noqa: S603
        [os.fsencode(command.script), *(a if isinstance(a, bytes) else a.encode() for a in arguments)],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        timeout=120,
    )
    text = subprocess.CompletedProcess(arguments, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert harmless(text).returncode == 2


def test_names_that_a_log_in_ascii_cannot_show(command, plan, tmp_path):
    arguments = ("run", "--engine", plan, "--label", "cat", "--num-images", 1, "-o", "画像.png")
    done = command(*arguments, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"\u753b\u50cf.png  generate in ")
    assert (tmp_path / "画像.png").exists()
    done = command(*arguments[:-1], os.fsdecode(b"\xff.png"), cwd=tmp_path)
    assert (done.returncode, done.stdout.partition("  ")[0]) == (0, r"\udcff.png")


def on_a_terminal(command, arguments, cwd, **environment):
    """Exit code of a command whose stderr is a terminal, and what that shows."""
    here, there = pty.openpty()
    with subprocess.Popen(  # noqa: S603
        [command.script, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"TERM": "xterm", **environment},
        stdout=subprocess.DEVNULL,
        stderr=there,
    ) as process:
        os.close(there)
        seen = b""
        while True:
            try:
                part = os.read(here, 4096)
            except OSError:  # the other end is closed
                part = b""
            if not part:
                break
            seen += part
    os.close(here)
    return process.returncode, seen


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_spinner_suits_the_terminal(command, package, tmp_path, encoding):
    code, seen = on_a_terminal(command, ["build", package], tmp_path, PYTHONIOENCODING=encoding)
    assert code == 0, seen
    assert b"building" in seen
    assert seen.isascii() == (encoding == "ascii")
    assert b"\\u" not in seen


def closed_pipe():
    """The end that is written to; nobody reads the other one."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("verb", ["inspect PLAN", "inspect --json PLAN", "models", "--help", "--version"])
def test_a_reader_that_has_gone_is_no_error(command, plan, verb):
    """As with `vqdeploy inspect PLAN | head -1`."""
    arguments = [plan if word == "PLAN" else word for word in verb.split()]
    writer = closed_pipe()
    done = subprocess.run([command.script, *arguments], stdout=writer, stderr=subprocess.PIPE, check=False)  # noqa: S603
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_verb_ends_its_work_when_nobody_reads_its_progress(command, package, tmp_path):
    writer = closed_pipe()
    done = subprocess.run(  # noqa: S603
        [command.script, "build", package, "-o", "a.plan"], cwd=tmp_path, stdout=writer, stderr=writer, check=False
    )
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "a.plan").exists()


def test_a_check_that_fails_says_so_in_its_code_though_nobody_reads(command, plan, tmp_path):
    """An error, too, keeps its code."""
    writer = closed_pipe()
    (tmp_path / "bad.plan").write_bytes(plan.read_bytes()[:1000])
    for name, code in (("bad.plan", 1), ("none.plan", 2)):
        done = subprocess.run(  # noqa: S603
            [command.script, "inspect", tmp_path / name], stdout=writer, stderr=writer, check=False
        )
        assert done.returncode == code
    os.close(writer)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_output_to_a_full_disk(command, plan):
    with open("/dev/full", "w") as full:
        done = subprocess.run(  # noqa: S603
            [command.script, "inspect", plan], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written (No space left on device).\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_verb_ends_its_work_when_its_progress_cannot_be_printed(command, package, tmp_path):
    with open("/dev/full", "w") as full:
        line = [command.script, "build", package, "-o", "a.plan"]
        done = subprocess.run(line, cwd=tmp_path, stderr=full, check=False)  # noqa: S603
    assert done.returncode == 0
    assert (tmp_path / "a.plan").exists()


def test_the_current_folder_is_named_if_it_is_gone(command, plan, tmp_path):
    for name in ("in", "gone"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "0.png")
    script = 'cd gone && rmdir ../gone && exec "$0" tokenize --engine "$1" --input "$2/in" -o "$2/out" --workers 1'
    line = ["/bin/sh", "-c", script, command.script, plan, tmp_path]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603
    said = "error: the current folder cannot be read or written (No such file or directory).\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_json_has_no_nan(capsys):
    output.finish({"psnr": float("inf"), "ratios": [float("nan"), 1.0]}, True, "")
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"psnr": None, "ratios": [None, 1.0]}


def test_log_records_are_one_short_line():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(output.LineFormatter("%(name)s: %(message)s"))
    record = logging.makeLogRecord({"name": "vqdeploy", "msg": "stage %s", "args": (HOSTILE + "\n" + "x" * 10**6,)})
    handler.handle(record)
    assert stream.getvalue().startswith(r"vqdeploy: stage \x1b]0;pwn\x07\x1b[31m\nxxx")
    assert len(stream.getvalue()) == LONGEST + 1


def test_wrong_usage_by_a_bug_is_a_traceback_that_acts_on_no_terminal(vqdeploy, plan, monkeypatch):
    def fail(*_):
        raise KeyError(HOSTILE)

    monkeypatch.setattr("vqdeploy.runtime.bundle.Bundle.sizes", fail)
    code, out, err = vqdeploy("inspect", plan)
    assert (code, out) == (1, "")
    assert "KeyError" in err
    assert "\x1b" not in err


def test_a_closed_stderr(command, plan, tmp_path):
    """Its descriptor is not given to a file that is written."""
    line = f'"{command.script}" inspect "{plan}" 2>&-; "{command.script}" run --engine none 2>&-'
    ended = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False, timeout=600)  # noqa: S603
    assert ended.returncode == 2
    assert "rqvae" in ended.stdout
    assert "Traceback" not in ended.stdout
    assert "error" not in ended.stdout
