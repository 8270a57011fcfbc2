"""Where a step lost its numbers: the first module, weight or input with a NaN or an infinity.

Nothing here costs anything while all is well. A step whose loss or gradient is no number is computed once more, from
the same weights and with the same draws, under hooks on every module; the first value that is none names its module.

Shapes in this file:
    T  tokens in a row
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avlm.layout import Kind
from avlm.samples import Place, Row

Cause = Literal["weight", "input", "forward", "backward", "gradient"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The first value of a step that is no number."""

    cause: Cause
    """What it was in: a weight or an input before anything was computed; what a module made of good values, forward or
    backward; or the gradient of a weight."""
    name: str
    """Of the module or weight as `named_modules` has it, empty outside all of them; of an input its kind."""
    what: str
    """NaN or infinity, or both."""
    row: int | None = None
    """Of the step, from 0."""
    samples: tuple[str, ...] = ()
    """Those of the row that it came up in; empty: not known."""
    item: int | None = None
    """Which medium of the sample an input is of."""
    beside: str = ""
    """Where the values are made between two modules: the one they were first seen at."""

    def sentence(self) -> str:
        """Where it was, without the samples."""
        if self.cause == "weight":
            return f"the weight {self.name} holds {self.what}"
        if self.cause == "input":
            return f"the {self.name} holds {self.what} before the model has seen it"
        if self.cause == "gradient":
            return f"the gradient of the weight {self.name} is the first to hold {self.what}"
        place = self.name or ("the loss" if self.cause == "backward" else "what is outside all modules")
        beside = f", {'before' if self.cause == 'forward' else 'behind'} {self.beside}" if self.beside else ""
        return f"the first {self.what} comes from {place}{beside}, in the {self.cause} pass"


class Locator:
    """Looks for the first value that is no number while a step is computed once more.

    Args:
        roots: What is looked at, by the prefix of its modules' names.
        kept: What learns in a parameter's place and holds its gradient: its float32 copy, or itself.
    """

    def __init__(self, roots: Mapping[str, nn.Module], kept: Callable[[nn.Parameter], Tensor]) -> None:
        self.roots, self.kept = roots, kept
        self.found: Finding | None = None
        self._names = {module: name for name, module in self._named("named_modules")}
        self._stack: list[str] = []
        """Names of the modules whose forward pass is under way."""
        self._row: Row | None = None
        self._number = 0
        self._callers: dict[int, str | None] = {}
        """By the id of an output: who called the outermost module that returned it."""
        self._alive: list[Tensor] = []
        """Outputs that were marked, so that no id is given twice within a row."""
        self._marks: list[dict[int, RemovableHandle]] = []
        """Of each module under way: the hooks on its marked inputs."""

    def _named(self, kind: str) -> Iterator[tuple[str, Any]]:
        for prefix, root in self.roots.items():
            for name, thing in getattr(root, kind)():
                yield ".".join(filter(None, (prefix, name))), thing

    # ------------------------------------------------------------ before the step

    def weights(self) -> Finding | None:
        """The first weight that is no number, or buffer with a NaN (limits in buffers may be infinite)."""
        for name, parameter in self._named("named_parameters"):
            if _bad(parameter):
                return Finding("weight", name, _what(parameter))
        for name, buffer in self._named("named_buffers"):
            if buffer.is_floating_point() and bool(_here(buffer).isnan().any()):
                return Finding("weight", name, "NaN")
        return None

    def inputs(self, row: Row, number: int) -> Finding | None:
        """The first medium of a row that is no number, with its sample."""
        media: tuple[tuple[str, Kind, Tensor | None], ...] = (
            ("picture", "image", row.pixel_values),
            ("video", "video", row.pixel_values_videos),
            ("sound", "audio", row.input_features),
            ("sound", "audio", row.input_features_beside),
        )
        for name, kind, values in media:
            if values is not None and _bad(values):
                at = int((~values.isfinite()).flatten(1).any(1).nonzero()[0])
                places = _owners(row, kind)
                if len(places) == len(values):
                    place = places[at]
                    return Finding("input", name, _what(values), number, (place.sample_id,), place.item)
                return Finding("input", name, _what(values), number, tuple(dict.fromkeys(p.sample_id for p in places)))
        return None

    # ------------------------------------------------------------ in the step

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Hooks on every module while the block runs; compiled ones run as they are written."""
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self._names:
                before = module.register_forward_pre_hook(self._before, with_kwargs=True)
                after = module.register_forward_hook(self._after, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield
        self._alive.clear()

    def begin_row(self, row: Row, number: int) -> None:
        """Say which row is computed next."""
        self._row, self._number = row, number
        self._stack.clear()
        self._marks.clear()
        self._callers.clear()
        self._alive.clear()
        if self.found is None:
            self.found = self.inputs(row, number)

    def gradients(self) -> Finding | None:
        """The first weight whose gradient, all rows together, is no number."""
        for name, parameter in self._named("named_parameters"):
            grad = self.kept(parameter).grad
            if grad is not None and _bad(grad):
                return Finding("gradient", name, _what(grad))
        return None

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        name, caller = self._names[module], self._stack[-1] if self._stack else None
        self._stack.append(name)
        self._marks.append({})
        for tensor in _tensors((args, kwargs)):
            self._see("forward", tensor, caller or "", name)
        if not torch.is_grad_enabled():
            return None
        return self._marked(args, name), {key: self._marked(value, name) for key, value in kwargs.items()}

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        name, marks = self._stack.pop(), self._marks.pop()
        caller = self._stack[-1] if self._stack else None
        for tensor in _tensors(output):
            self._see("forward", tensor, name)
            if not tensor.requires_grad:
                continue
            if id(tensor) in marks:
                marks[id(tensor)].remove()  # handed through as it came: its gradient is none of this module's making
            if id(tensor) not in self._callers:
                self._alive.append(tensor)
                tensor.register_hook(partial(self._behind, id(tensor), name))  # type: ignore[no-untyped-call]
            self._callers[id(tensor)] = caller

    def _marked(self, value: Any, name: str) -> Any:
        """The same values, as tensors whose gradient is what this module alone makes of its outputs' gradients."""
        if type(value) is tuple:  # a list may be one that the callee is to add to
            return tuple(self._marked(v, name) for v in value)
        if not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf:
            return value
        view = value.view_as(value)
        self._alive.append(view)
        self._marks[-1][id(view)] = view.register_hook(partial(self._into, name))  # type: ignore[no-untyped-call]
        return view

    def _into(self, name: str, grad: Tensor) -> None:
        """The gradient that a module makes of good ones."""
        self._see("backward", grad, name)

    def _behind(self, key: int, name: str, grad: Tensor) -> None:
        """The gradient that comes to a module's output from where it is used."""
        self._see("backward", grad, self._callers[key] or "", name)

    def _see(self, cause: Cause, tensor: Tensor, name: str, beside: str = "") -> None:
        if self.found is None:
            if _bad(tensor):
                self.found = Finding(cause, name, _what(tensor), self._number, beside=beside)
                self._narrow(tensor)
        elif not self.found.samples and self.found.row == self._number and self.found.cause == cause:
            self._narrow(tensor)

    def _narrow(self, tensor: Tensor) -> None:
        """Which samples it is in, where the values lie token by token: no sample of a packed row sees another."""
        assert self._row is not None and self.found is not None
        lengths, values = self._row.lengths, _here(tensor.detach())
        if values.ndim >= 3 and values.shape[:2] == (1, sum(lengths)):
            values = values[0]
        if values.ndim < 2:
            return
        if len(values) == sum(lengths):
            bad_T = (~values.isfinite()).flatten(1).any(1)
            hit = [bool(bad_T[a:b].any()) for a, b in pairwise(accumulate(lengths, initial=0))]
        elif values.shape[:2] == (len(lengths), max(lengths)):  # the row as a padded batch
            hit = (~values.isfinite()).flatten(1).any(1).tolist()
        else:
            return
        samples = [i for i, bad in zip(self._row.ids, hit, strict=True) if bad]
        self.found = replace(self.found, samples=tuple(dict.fromkeys(samples)))


def _owners(row: Row, kind: Kind) -> list[Place]:
    """Whose each picture, frame or chunk of sound is, as far as the places tell."""
    places = [place for place in row.places if place.count(kind)]
    if kind == "audio" and len(row.chunks) == len(places):
        return [place for place, chunks in zip(places, row.chunks, strict=True) for _ in range(chunks)]
    if kind == "video":
        return [place for place in places for segment in place.segments if segment.kind == kind]
    return places


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors with fractions in what a module takes or returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _here(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def _bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(_here(tensor.detach()).isfinite().all())


def _what(tensor: Tensor) -> str:
    values = _here(tensor.detach())
    kinds = [name for name, mask in (("NaN", values.isnan()), ("infinity", values.isinf())) if bool(mask.any())]
    return " and ".join(kinds)
