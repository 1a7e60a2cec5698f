"""Answers by name that are worked out when somebody asks: of thousands of endpoints, hardly any is asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, NoReturn, TypeVar

T = TypeVar("T")


def _nobody(name: str) -> NoReturn:
    raise KeyError(name)


class Answers(Mapping[str, T], Generic[T]):
    """One answer for each name, in order; each is worked out once."""

    def __init__(self, names: Iterable[str] = (), answer: Callable[[str], T] = _nobody) -> None:
        """Of a dict as `names` the keys, which is the quickest."""
        self._known: dict[str, T | None] = dict.fromkeys(names)
        self._answer = answer

    def __getitem__(self, name: str) -> T:
        known = self._known[name]
        if known is None:
            known = self._known[name] = self._answer(name)
        return known

    def __setitem__(self, name: str, answer: T) -> None:
        self._known[name] = answer

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return repr(dict(self))
