"""Lists of submodules."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Modules(nn.ModuleList, Generic[M]):
    """A `ModuleList` that says what its modules are."""

    if TYPE_CHECKING:

        def __init__(self, modules: Iterable[M] = ()) -> None: ...
        def __iter__(self) -> Iterator[M]: ...
        @overload
        def __getitem__(self, index: slice) -> "Modules[M]": ...
        @overload
        def __getitem__(self, index: int) -> M: ...
        def __getitem__(self, index: int | slice) -> "M | Modules[M]": ...
