"""Reads pickles as data: nothing that a file names is imported or called.

`torch.load(weights_only=True)` rejects most training checkpoints, because they contain objects of unknown classes
beside the weights. And a dictionary key that is a deeply nested tuple crashes the process (torch 2.13). This reader
accepts all that `weights_only=True` accepts. It interprets the opcodes on a stack of its own: tensors, numpy arrays and
plain containers are rebuilt; objects of any other class become a `StandIn`.
"""

import math
import pickletools
from collections.abc import Callable, Iterable
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqdeploy.errors import ArtifactError

Storage = Callable[[str, torch.dtype, int], Tensor]
"""(Key, dtype, number of elements) -> flat tensor."""


class Global(NamedTuple):
    """A global that a pickle names: `module.name`."""

    name: str


class StandIn:
    """An object of an unknown class: its name, arguments and state."""

    def __init__(self, name: str, arguments: Any):
        self.name, self.arguments, self.state = name, arguments, None

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _Dict(dict[Any, Any]):
    """A dictionary of a pickle; other state of its class is dropped."""


class _Array:
    """A numpy array before its state is set."""

    def __init__(self) -> None:
        self.value = np.zeros(0)


class _Dtype:
    """A numpy dtype before its byte order is set."""

    def __init__(self, name: Any, *_: Any):
        if not isinstance(name, str):
            raise TypeError("the name of a dtype is no string")
        self.value = np.dtype(name)
        if self.value.kind not in "fiub" or self.value.itemsize > 8:
            raise ValueError(f"{name} is not a numeric dtype")


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
_LISTS = ("builtins.list", "builtins.set", "builtins.tuple", "builtins.frozenset", "collections.deque", "torch.Size")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_IGNORED = ("PROTO", "FRAME")
_DEEPEST = 64  # nesting depth of dictionaries
_COPIES = 4  # of each byte of a pickle; one from Python 2 or with big-endian numbers has two


def load(stream: IO[bytes], storage: Storage | None = None) -> Any:
    """Reads one pickle, and leaves the stream after its end.

    Args:
        stream: The pickle, at its start.
        storage: Looks up storages of tensors; None if the pickle has no tensors.

    Returns:
        Numbers, strings, bytes, lists, tuples, dictionaries, tensors and `StandIn`s. Sets are lists.

    Raises:
        ArtifactError: It is malformed, or uses opcodes that weights never need.
    """
    try:
        return _Machine(storage).run(stream)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        RuntimeError,
        TypeError,
        UnicodeError,
        ValueError,
    ) as error:
        reason = str(error).partition("\n")[0] or "it is damaged"
        raise ArtifactError(f"the pickle is malformed ({reason})") from error


class _Machine:
    """The virtual machine of a pickle: stack, marks (indices into the stack) and memo.

    A few bytes can ask for one more copy of a value in the memo, so copies are bounded by what was read.
    """

    def __init__(self, storage: Storage | None):
        self.storage = storage
        self.read = self.copied = 0  # bytes; items of containers count as one
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes]) -> Any:
        start = stream.tell()
        for opcode, argument, place in pickletools.genops(stream):
            name, self.read = opcode.name, (place or 0) - start
            if name == "STOP":
                return self.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif step := getattr(self, f"_{name.lower()}", None):
                step(argument) if opcode.arg else step()
            elif name not in _IGNORED:
                self._value(opcode, argument)
        raise ValueError("it has no end")

    def _value(self, opcode: Any, argument: Any) -> None:
        """Opcodes with a value: numbers, strings and bytes."""
        if not opcode.arg or opcode.stack_before or not opcode.stack_after or opcode.name.startswith(("EXT", "NEXT")):
            raise ValueError(f"opcode {opcode.name} is not supported")
        self.stack.append(argument)

    def pop(self) -> Any:
        if self.marks and self.marks[-1] >= len(self.stack):
            raise ValueError("a mark is where a value should be")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"a {kind.__name__} is missing")
        return self.stack[-1]

    def items(self) -> list[Any]:
        """Pops the values above the last mark, and the mark."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    # Stack and memo

    def _mark(self) -> None:
        self.marks.append(len(self.stack))

    def _pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _pop_mark(self) -> None:
        self.items()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _put(self, index: int) -> None:
        self.memo[int(index)] = self.stack[-1]

    _binput = _long_binput = _put

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[int(index)])

    _binget = _long_binget = _get

    # Containers

    def _empty_list(self) -> None:
        self.stack.append([])

    _empty_set = _empty_list

    def _empty_tuple(self) -> None:
        self.stack.append(())

    def _empty_dict(self) -> None:
        self.stack.append(_Dict())

    def _list(self) -> None:
        self.stack.append(self.items())

    def _tuple(self) -> None:
        self.stack.append(tuple(self.items()))

    _frozenset = _tuple

    def _tuple1(self) -> None:
        self.stack.append((self.pop(),))

    def _tuple2(self) -> None:
        second = self.pop()
        self.stack.append((self.pop(), second))

    def _tuple3(self) -> None:
        third, second = self.pop(), self.pop()
        self.stack.append((self.pop(), second, third))

    def _dict(self) -> None:
        items, made = self.items(), _Dict()
        _fill(made, items[::2], items[1::2])
        self.stack.append(made)

    def _append(self) -> None:
        value = self.pop()
        self._extend([value])

    def _appends(self) -> None:
        self._extend(self.items())

    _additems = _appends

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], StandIn):  # a subclass of list
            self.top(list).extend(values)

    def _setitem(self) -> None:
        value, key = self.pop(), self.pop()
        self._update([key], [value])

    def _setitems(self) -> None:
        items = self.items()
        self._update(items[::2], items[1::2])

    def _update(self, keys: list[Any], values: list[Any]) -> None:
        if not isinstance(self.stack[-1], StandIn):  # a subclass of dict
            _fill(self.top(dict), keys, values)

    # Globals and calls

    def _global(self, names: str) -> None:
        self.stack.append(_named(*names.split(" ", 1)))

    def _stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(_named(module, name))

    def _reduce(self) -> None:
        arguments = self.pop()
        self.stack.append(self.make(self.pop(), arguments))

    _newobj = _reduce

    def _newobj_ex(self) -> None:
        self.pop()  # keyword arguments
        self._reduce()

    def _obj(self) -> None:
        made, *arguments = self.items()
        self.stack.append(self.make(made, tuple(arguments)))

    def _inst(self, names: str) -> None:
        self.stack.append(self.make(_named(*names.split(" ", 1)), tuple(self.items())))

    def _build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif isinstance(target, _Array):
            target.value = _array(self.once_more(state))
        elif isinstance(target, _Dtype):
            target.value = target.value.newbyteorder(">" if state[1] == ">" else "<")
        elif not isinstance(target, dict | list | tuple | Tensor):
            raise TypeError(f"state is given to a {type(target).__name__}")

    def _binpersid(self) -> None:
        persistent = self.pop()
        if isinstance(persistent, tuple) and len(persistent) == 4 and persistent[0] == "module":
            self.stack.append(persistent[1])  # a class with its source code
            return
        kind, storage_type, key, _, size, *view = persistent
        if kind != "storage" or self.storage is None or any(part is not None for part in view):
            raise ValueError("it has an unknown persistent id")
        self.stack.append(self.storage(str(key), _storage_dtype(storage_type), size))

    def _persid(self, text: str) -> None:
        raise ValueError("it has an unknown persistent id")

    def make(self, made: Any, arguments: Any) -> Any:
        """The result of calling `made`, for known globals."""
        if not isinstance(made, Global):
            return StandIn(type(made).__name__, arguments)
        name = made.name.replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
        if name in _COPYING:
            self.once_more(arguments)
        if name in _DICTS:
            filled = _Dict()
            pairs = arguments[0] if arguments and isinstance(arguments[0], list | tuple) else []
            _fill(filled, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
            return filled
        if name in _LISTS:
            return list(arguments[0]) if arguments and isinstance(arguments[0], list | tuple) else []
        maker = _MAKERS.get(name)
        return StandIn(made.name, arguments) if maker is None else maker(*arguments)

    def once_more(self, values: Any) -> Any:
        """Counts the elements of values that are about to be copied."""
        self.copied += sum(len(value) for value in values if isinstance(value, str | bytes | bytearray | list | tuple))
        if self.copied > _COPIES * self.read:
            raise ValueError("it copies its values again and again")
        return values


def _named(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name is no string")
    return Global(f"{module}.{name}")


def _fill(target: dict[Any, Any], keys: Iterable[Any], values: Iterable[Any]) -> None:
    for key, value in zip(keys, values, strict=True):
        # Only plain keys are hashed: hashing a deeply nested tuple would overflow the stack.
        target[key if isinstance(key, str | int | float | StandIn | Global | None) else StandIn("key", key)] = value


def _storage_dtype(storage_type: Any) -> torch.dtype:
    name = storage_type.name.removeprefix("torch.").removeprefix("cuda.") if isinstance(storage_type, Global) else ""
    if name not in _STORAGES:
        raise ValueError(f"{name or type(storage_type).__name__} is an unknown storage type")
    return _STORAGES[name]


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    size, stride = tuple(size), tuple(stride)
    whole = all(type(number) is int and number >= 0 for number in (offset, *size, *stride))
    if not whole or len(size) != len(stride):
        raise ValueError("the shape of a tensor is none")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    if math.prod(size) > len(storage):  # repeated by strides of 0
        raise ValueError("a tensor is larger than its storage")
    return torch.as_strided(storage, size, stride, offset) if 0 not in size else storage.new_empty(size)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _subclass(rebuild: Any, _kind: Any, arguments: Any, _state: Any) -> Tensor:
    if rebuild not in (Global("torch._utils._rebuild_tensor_v2"), Global("torch._utils._rebuild_parameter")):
        raise ValueError(f"a tensor is made by {rebuild.name if isinstance(rebuild, Global) else 'no function'}")
    made = _MAKERS[rebuild.name](*arguments)
    if not isinstance(made, Tensor):
        raise TypeError("it makes no tensor")
    return made


def _array(state: Any) -> np.ndarray:
    _, shape, dtype, columns_first, data = state
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise TypeError("an array does not hold numbers")
    array = np.frombuffer(data, dtype.value).reshape(shape, order="F" if columns_first else "C")
    return np.array(array, dtype.value.newbyteorder("="), order="C")


def _buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    array.value = _array((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(data, dtype.value)[0].item() if isinstance(dtype, _Dtype) else StandIn("numpy.scalar", data)


def _bytes(text: Any = "", encoding: Any = "latin1") -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else StandIn("bytes", text)


_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _buffer,
    "_codecs.encode": _bytes,
}
_COPYING = {*_DICTS, *_LISTS, "numpy.core.numeric._frombuffer", "_codecs.encode"}


def plain(tree: Any) -> Any:
    """Converts numpy arrays in a tree of dictionaries to tensors; preserves sharing and cycles."""
    seen: dict[int, Any] = {}

    def convert(value: Any, depth: int) -> Any:
        if isinstance(value, _Array):
            return torch.from_numpy(value.value)
        if not isinstance(value, dict) or depth > _DEEPEST:
            return value
        if id(value) not in seen:
            made = seen[id(value)] = {}
            made.update((key, convert(item, depth + 1)) for key, item in value.items())
        return seen[id(value)]

    return convert(tree, 0)
