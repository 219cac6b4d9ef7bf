"""Configurations from JSON."""

import json
import re
from dataclasses import dataclass, replace

import pytest

from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError
from vqdeploy.systems import SYSTEMS, SystemConfig

PRESETS = {name: definition.presets for name, definition in SYSTEMS.items()}
ALL = [config for presets in PRESETS.values() for config in presets.values()]


@dataclass(frozen=True)
class Inner(Config):
    size: int = 1


@dataclass(frozen=True)
class Outer(Config):
    name: str
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    rate: float = 0.5
    sizes: tuple[int, ...] = ()
    flag: bool = False
    maybe: str | None = None


@pytest.mark.parametrize("config", ALL, ids=lambda config: f"{config.model}-{config.preset}")
def test_every_preset_survives_json(config):
    restored = SystemConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert type(restored.tokenizer) is type(config.tokenizer)


def test_nested_values_are_parsed():
    data = {"name": "a", "inner": {"size": 3}, "inners": [{"size": 4}, {}], "rate": 1, "sizes": [1, 2], "maybe": None}
    assert Outer.from_dict(data) == Outer("a", Inner(3), (Inner(4), Inner(1)), 1, (1, 2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "nmae": 1}, r"unknown keys.*\['nmae'\]"),
        ({"name": "a", "inner": {"sise": 1}}, r"Outer\.inner has unknown keys"),
        ({}, r"Outer is incomplete, without name\.$"),
        ({"name": 5}, "Outer.name is malformed; expected a value of type str, found 5"),
        ({"name": None}, "Outer.name is malformed"),
        ({"name": "a", "inner": 5}, r"Outer\.inner is malformed; expected an object"),
        ({"name": "a", "inner": None}, r"Outer\.inner is malformed"),
        ({"name": "a", "inner": {"size": True}}, r"Outer\.inner\.size is malformed.*found True"),
        ({"name": "a", "inner": {"size": 1.0}}, r"Outer\.inner\.size is malformed"),
        ({"name": "a", "inner": {"size": "1"}}, r"Outer\.inner\.size is malformed"),
        ({"name": "a", "inners": [{}, {"size": "1"}]}, r"Outer\.inners\[1\]\.size is malformed"),
        ({"name": "a", "inners": [{}, 5]}, r"Outer\.inners\[1\] is malformed; expected an object"),
        ({"name": "a", "rate": True}, "Outer.rate is malformed"),
        ({"name": "a", "rate": "0.5"}, "Outer.rate is malformed"),
        ({"name": "a", "flag": 1}, "Outer.flag is malformed"),
        ({"name": "a", "sizes": 3}, "Outer.sizes is malformed; expected a list"),
        ({"name": "a", "sizes": "12"}, "Outer.sizes is malformed"),
        ({"name": "a", "sizes": [1, None]}, r"Outer\.sizes\[1\] is malformed"),
        ({"name": "a", "sizes": [True]}, r"Outer\.sizes\[0\] is malformed"),
        ({"name": "a", "maybe": 5}, "Outer.maybe is malformed"),
        ([], "Outer is malformed"),
        (None, "Outer is malformed"),
    ],
)
def test_malformed_data_is_refused(data, message):
    with pytest.raises(ArtifactError, match=message):
        Outer.from_dict(data)


def test_configurations_cannot_be_changed():
    with pytest.raises(AttributeError):
        Inner().size = 2


SYSTEM = PRESETS["rqvae"]["tiny"].to_dict()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "rqvea"}, "model"),
        ({"model": None}, "model"),
        ({"model": ["rqvae"]}, "model"),
        ({"tokenizer": None}, "tokenizer"),
        ({"tokenizer": {"codebook_sise": 4}}, "tokenizer has unknown keys"),
        ({"tokenizer": {"conv": {"resolution": "32"}}}, "tokenizer.conv.resolution"),
        ({"prior": {"width": True}}, "prior.width"),
        ({"prior": 5}, "prior"),
        ({"labels": "0123456789"}, "labels"),
        ({"sampling": {"temperature": None}}, "sampling.temperature"),
        ({"extra": 1}, "extra"),
    ],
)
def test_malformed_systems_are_refused(change, field):
    with pytest.raises(ArtifactError, match=re.escape(field)):
        SystemConfig.from_dict({**SYSTEM, **change})


def test_a_system_may_have_no_prior():
    config = replace(PRESETS["rqvae"]["tiny"], prior=None)
    assert SystemConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
