"""The fields of one request: read by type and range, and none left that nobody understood."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from avlm.data.forms.parts import kind_of
from avlm.inference.serving.refusing import RefusedError, wrong

T = TypeVar("T")

DEEPEST = 64
"""Lists and objects in each other."""


class Fields:
    """An object of a request. A field that is null counts as not given.

    Args:
        where: What the object is called in front of its fields' names.

    Raises:
        RefusedError: It is no object.
    """

    def __init__(self, given: Any, where: str = "") -> None:
        if not isinstance(given, Mapping):
            name = where.rstrip(".") or "The request"
            raise wrong(where.rstrip(".") or "body", f"{name} is {kind_of(given)}, and an object is wanted. Correct it")
        self.where = where
        self._given = {key: value for key, value in given.items() if value is not None}
        self._read: set[str] = set()

    def take(self, name: str) -> Any:
        """A field's value, None where it is not given."""
        self._read.add(name)
        return self._given.get(name)

    def text(self, name: str) -> str | None:
        return self._typed(name, str, "a text")

    def truth(self, name: str) -> bool:
        return bool(self._typed(name, bool, "true or false"))

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number within two bounds."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._type(name, value, "a whole number")
        self._check_within(name, value, low, high)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number within two bounds."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise self._type(name, value, "a number")
        self._check_within(name, value, low, high)
        return float(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        """One of several words."""
        value = self.text(name)
        if value is not None and value not in choices:
            raise self.wrong(name, f"is {json.dumps(value)}, and it may be {', '.join(choices)}. Choose one of them")
        return value

    def neutral(self, name: str, *values: Any) -> None:
        """A field that this server has no use for, and that changes nothing while it has one of these values."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            raise self.wrong(
                name, "would change the answer, and this server cannot do what it asks for. Leave it out", "unsupported"
            )

    def ignore(self, names: Iterable[str]) -> None:
        """Fields that change no answer."""
        self._read.update(names)

    def done(self) -> None:
        """Refuse what nobody has read.

        Raises:
            RefusedError: There is a field left.
        """
        left = [key for key in self._given if key not in self._read]
        if left:
            near = difflib.get_close_matches(str(left[0]), self._read, 1)
            hint = f"Did you mean {self.where}{near[0]}?" if near else "Leave it out"
            raise self.wrong(
                str(left[0])[:100], f"is not known here, so what it asks for cannot be done. {hint}", "unknown"
            )

    def wrong(self, name: str, message: str, code: str = "invalid_value") -> RefusedError:
        """The refusal of a field of this object."""
        return wrong(self.where + name, f"{self.where}{name} {message}", code)

    def _typed(self, name: str, wanted: type[T], words: str) -> T | None:
        value = self.take(name)
        if value is not None and not isinstance(value, wanted):
            raise self._type(name, value, words)
        return value

    def _type(self, name: str, value: Any, words: str) -> RefusedError:
        return self.wrong(name, f"is {kind_of(value)}, and it is {words} that it takes. Correct it", "invalid_type")

    def _check_within(self, name: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            shown = value if abs(value) < 1e15 else "too far away"
            raise self.wrong(name, f"is {shown}, and it may be from {low} to {high}. Choose a value between them")


def parse_json(body: bytes) -> Any:
    """JSON of a stranger.

    Raises:
        RefusedError: It is none, or nested too deeply.
    """
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_number)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, a number of thousands of digits, thousands of brackets
        raise RefusedError(
            400, "The body is not JSON in UTF-8. Send one object, with numbers that are finite"
        ) from None
    _check_depth(value)
    return value


def _no_number(text: str) -> Any:
    raise ValueError


def _check_depth(value: Any) -> None:
    """Refuse what is nested so deeply that code which looks through it would fail."""
    layer = [value]
    for _ in range(DEEPEST):
        layer = [
            inner
            for one in layer
            if isinstance(one, (list, dict))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (list, dict))
        ]
        if not layer:
            return
    raise RefusedError(400, f"The body has more than {DEEPEST} lists and objects inside each other. Send a flatter one")
