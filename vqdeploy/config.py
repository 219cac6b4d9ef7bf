"""Configurations: frozen dataclasses that read and write JSON and reject unknown keys."""

import dataclasses
import types
import typing
from typing import Any, Self, TypeVar

from vqdeploy.errors import ArtifactError


@dataclasses.dataclass(frozen=True)
class Config:
    """Base class of configurations."""

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Builds the configuration, nested ones included.

        Raises:
            ArtifactError: A key is unknown or missing, or a value has the wrong type; the message names the field by
                its path, such as `Manifest.stages[2].inputs[0].dtype`.
        """
        return parse(cls, data, cls.__name__)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types."""
        return dataclasses.asdict(self)

    def differences(self) -> dict[str, Any]:
        """The fields that differ from their defaults as JSON types; nested configurations likewise.

        So a new field with a default does not change digests, and 1.0 equals 1.
        """
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != _default(field)
        }


def _default(field: "dataclasses.Field[Any]") -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: object) -> object:
    if isinstance(value, Config):
        return value.differences()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


C = TypeVar("C", bound=Config)


def parse(kind: type[C], data: object, where: str) -> C:
    """Builds a configuration that is itself a field; `where` is its path, for messages.

    Raises:
        ArtifactError: As for `Config.from_dict`.
    """
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} is malformed", expected="an object", found=repr(data))
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - set(fields)):
        raise ArtifactError(f"{where} has unknown keys", expected=sorted(fields), found=unknown)
    if missing := [name for name, field in fields.items() if name not in data and _is_required(field)]:
        raise ArtifactError(f"{where} is incomplete, without {', '.join(missing)}")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _value(hint: object, value: object, where: str) -> object:
    if hint is Any:
        return value
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        # bool is an int, and float accepts int: prefer the option of the exact type, else the first match.
        options = tuple(option for option in options if option is not type(None))
        hint = next((option for option in options if option is type(value)), options[0])
    if isinstance(hint, type) and issubclass(hint, Config):
        return parse(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ArtifactError(f"{where} is malformed", expected="a list", found=repr(value))
        return tuple(_value(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ArtifactError(f"{where} is malformed", expected="an object", found=repr(value))
        return {key: _value(typing.get_args(hint)[1], item, f"{where}.{key}") for key, item in value.items()}
    if not isinstance(hint, type):
        raise TypeError(f"{where} has the type {hint}, which is not supported")
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ArtifactError(f"{where} is malformed", expected=f"a value of type {hint.__name__}", found=repr(value))
    return value
