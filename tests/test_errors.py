"""Sentences of errors: one line, no control characters, no more than a screen."""

import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqdeploy.errors import LONGEST, ArtifactError, VqdeployError, missing, shown

ANY = st.text(st.characters(codec=None))  # lone surrogates, controls and all
HOSTILE = "\x1b]0;pwn\x07\x1b[31m\u202e\udcff\u2028"


def test_a_sentence_has_its_parts():
    error = ArtifactError("a is wrong", expected=1, found=[2], fix="vqdeploy export")
    assert str(error) == "a is wrong; expected 1, found [2]. Fix: vqdeploy export"
    assert str(VqdeployError("a is wrong", found=0)) == "a is wrong; found 0."
    assert str(VqdeployError("a is wrong", expected="b")) == "a is wrong; expected b."
    assert str(VqdeployError("a is\n  wrong")) == "a is wrong."
    assert str(VqdeployError(f"b is wrong: {error}")) == f"b is wrong: {error}."
    assert str(VqdeployError(f"b: {VqdeployError('a', found=1)}", fix="c")) == "b: a; found 1. Fix: c"


@given(ANY, st.none() | ANY, st.none() | ANY, st.none() | ANY, st.integers(1, 2000))
def test_a_sentence_is_one_short_line_that_prints(what, expected, found, fix, times):
    sentence = str(VqdeployError(what * times, expected=expected, found=found and found * times, fix=fix))
    assert sentence.isprintable()
    assert len(sentence) <= LONGEST
    sentence.encode()


def test_what_is_long_leaves_room_for_the_rest():
    sentence = str(VqdeployError("a is wrong", expected="x" * 10**6, found="y" * 10**6, fix="vqdeploy export"))
    assert sentence.startswith("a is wrong; expected xxx")
    assert ", found yyy" in sentence
    assert sentence.endswith("yyy. Fix: vqdeploy export")
    assert len(sentence) == LONGEST - 1 or len(sentence) == LONGEST


def test_escapes_can_be_read():
    assert shown(HOSTILE) == r"\x1b]0;pwn\x07\x1b[31m\u202e\udcff\u2028"
    assert shown("Größe 画像 a b") == "Größe 画像 a b"
    assert shown("a\nb\tc") == r"a\nb\tc"


class Broken:
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize("value", [10**5000, Broken(), [[]] * 10**6, {"a": HOSTILE}, b"\x1b"], ids=type)
def test_anything_can_be_shown(value):
    assert shown(value, 50).isprintable()
    assert 0 < len(shown(value, 50)) <= 50
    str(VqdeployError("a is wrong", found=value))


@given(ANY, st.integers(4, 60))
def test_a_short_text_starts_and_ends_as_the_long_one(text, longest):
    whole = shown(text, 10**6)
    short = shown(text, longest)
    assert len(short) <= longest
    if len(whole) <= longest:
        assert short == whole
    else:
        start, end = short.split("...", 1) if short.count("...") == 1 else (short[:1], "")
        assert whole.startswith(start)
        assert whole.endswith(end)


def test_a_package_without_an_extra_is_named_itself():
    assert str(missing("torch.nn")).endswith('torch.nn. Fix: pip install "vqdeploy[export,train]"')
    assert str(missing("seaborn")).endswith("Fix: pip install seaborn")


def test_messages_to_the_logger_are_shown_as_errors_are(caplog):
    logging.getLogger("vqdeploy").warning("stage %s: %s", HOSTILE, "x" * 10**6)
    (message,) = caplog.messages
    assert message.startswith(r"stage \x1b]0;pwn\x07")
    assert len(message) == LONGEST


@pytest.mark.parametrize("kind", [VqdeployError, ArtifactError])
@pytest.mark.parametrize("fix", [None, "a command"])
def test_an_error_of_another_process_reads_the_same(kind, fix):
    error = kind("it is wrong", expected=1, found=2, fix=fix)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 (of our own)
    assert (type(copy), str(copy)) == (kind, str(error))


def test_lists_that_share_their_parts_have_a_short_text():
    """In full it would have 2^60 characters."""
    nested = ["x"]
    for _ in range(60):
        nested = [nested, nested]
    assert len(shown(nested)) <= 120
    assert "([[[...]" in str(VqdeployError("it is odd", found={"a": (nested,)}))
    assert shown([1, (2, "x")]) == "[1, (2, 'x')]"
