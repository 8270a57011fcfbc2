"""Whether a chat template writes what is said down as it is, by the template's own syntax.

A template is a program and may do anything with a text: look for words in it, leave it out, cut it. Of one whose syntax
shows that it only ever writes texts down (joined to others, or stripped of white space), every conversation of a shape
is the same words around other texts, so rendering one of them tells how all others look. Of any other template nothing
is known, and each conversation is rendered.

It is followed what each expression can depend on: on the shape alone (roles, their order, kinds of parts, special
tokens), or on what is said. What depends on what is said may be written, joined and kept in variables. As soon as it is
asked about in any way (tested, compared, measured, cut, handed to a function) the template is one of the others. So is
every template with something in it that is not understood here.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, nodes


class Kind(Enum):
    """What an expression's value is, and so what it can depend on."""

    KNOWN = auto()
    """Anything that follows from the shape."""
    WORDS = auto()
    """One text that is said, as it is or stripped; or what is KNOWN."""
    SAID = auto()
    """Texts that are said, and known ones between them."""
    MESSAGES = auto()
    MESSAGE = auto()
    PARTS = auto()
    PART = auto()
    LOOP = auto()
    SPACE = auto()
    """A `namespace`, whose attributes are variables."""


_TEXTS = {Kind.KNOWN, Kind.WORDS, Kind.SAID}
_HOLDERS = {Kind.MESSAGES: Kind.MESSAGE, Kind.PARTS: Kind.PART}
"""Lists, and what is in them. How many there are follows from the shape."""
_COUNTED = {Kind.KNOWN, Kind.MESSAGES, Kind.MESSAGE, Kind.PARTS, Kind.PART}
"""Whether one of these is empty follows from the shape."""
_LOOP = {"index", "index0", "revindex", "revindex0", "first", "last", "length"}
_TYPES = {"defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "number", "boolean"}
"""Tests that a value's type decides."""
_FILTERS = {"trim", "length", "count", "list", "first", "last", "upper", "lower", "capitalize", "title", "string"}
"""Filters that give the same for the same."""
_METHODS = {"strip", "lstrip", "rstrip", "upper", "lower", "title", "capitalize", "startswith", "endswith"}
_ARITHMETIC = (nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow)


class _UnclearError(Exception):
    """Something that is said may decide what is written, or nobody knows."""


@lru_cache(maxsize=256)
def only_writes(template: str, typed: bool) -> bool:
    """Whether a template writes every text that is said down as it is or stripped, wherever it writes it.

    Which of the two it is, and where, follows from the roles and parts of a conversation and not from its texts.

    Args:
        template: As `apply_chat_template` of a transformers tokenizer takes it, with `messages` that have a role and a
            content and nothing else.
        typed: Whether the content is a list of typed parts, each with a type and, if that is text, its text.
    """
    try:
        tree = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]).parse(template)
        _Reading(typed).read(tree.body)
    except (_UnclearError, TemplateSyntaxError, RecursionError):
        return False
    return True


class _Reading:
    """One template, followed until no variable turns out to hold more than was thought."""

    def __init__(self, typed: bool) -> None:
        self.content = Kind.PARTS if typed else Kind.WORDS
        self.names: dict[str, Kind] = {"messages": Kind.MESSAGES, "loop": Kind.LOOP}

    def read(self, body: Iterable[nodes.Node]) -> None:
        body, before = list(body), None
        while before != self.names:
            before = dict(self.names)
            self._follow(body)

    # ------------------------------------------------------------ statements

    def _follow(self, body: Iterable[nodes.Node]) -> None:
        for node in body:
            if isinstance(node, nodes.Output):
                for written in node.nodes:
                    self._text(written)
            elif isinstance(node, nodes.If):
                self._truth(node.test)
                for branch in (node.body, node.elif_, node.else_):
                    self._follow(branch)
            elif isinstance(node, nodes.For):
                self._loop(node)
            elif isinstance(node, nodes.Assign):
                self._assign(node)
            elif not isinstance(node, (nodes.Break, nodes.Continue)):
                raise _UnclearError

    def _loop(self, node: nodes.For) -> None:
        over = self._kind(node.iter)
        if node.recursive or not (over is Kind.KNOWN or over in _HOLDERS):
            raise _UnclearError
        self._hold(node.target, _HOLDERS.get(over, Kind.KNOWN))
        if node.test is not None:
            self._truth(node.test)
        self._follow(node.body)
        self._follow(node.else_)

    def _assign(self, node: nodes.Assign) -> None:
        value = node.node
        if isinstance(value, nodes.Call) and isinstance(value.node, nodes.Name) and value.node.name == "namespace":
            if value.args or value.dyn_args or value.dyn_kwargs or not isinstance(node.target, nodes.Name):
                raise _UnclearError
            self._put(node.target.name, Kind.SPACE)
            for given in value.kwargs:
                self._put(f"{node.target.name}.{given.key}", self._kind(given.value))
            return
        self._hold(node.target, self._kind(value))

    def _hold(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.Name):
            self._put(target.name, kind)
        elif isinstance(target, nodes.NSRef) and self.names.get(target.name) is Kind.SPACE:
            self._put(f"{target.name}.{target.attr}", kind)
        elif isinstance(target, nodes.Tuple) and kind is Kind.KNOWN:
            for one in target.items:
                self._hold(one, kind)
        else:
            raise _UnclearError

    def _put(self, name: str, kind: Kind) -> None:
        """A variable may hold this too, wherever it is asked for: whichever came last is not looked at."""
        if name == "loop":
            raise _UnclearError
        self.names[name] = _either(self.names.get(name, kind), kind)

    # ------------------------------------------------------------ expressions

    def _text(self, node: nodes.Node) -> Kind:
        """An expression that is written or joined to others."""
        kind = self._kind(node)
        if kind not in _TEXTS:
            raise _UnclearError
        return kind

    def _known(self, *given: nodes.Node | None) -> Kind:
        """Expressions that nothing said may be in."""
        if any(one is not None and self._kind(one) is not Kind.KNOWN for one in given):
            raise _UnclearError
        return Kind.KNOWN

    def _truth(self, node: nodes.Node) -> Kind:
        """An expression of which it is asked whether it is true."""
        if isinstance(node, (nodes.And, nodes.Or)):
            self._truth(node.left)
            return self._truth(node.right)
        if isinstance(node, nodes.Not):
            return self._truth(node.node)
        if self._kind(node) not in _COUNTED:
            raise _UnclearError
        return Kind.KNOWN

    def _kind(self, node: nodes.Node) -> Kind:
        if isinstance(node, (nodes.Const, nodes.TemplateData)):
            return Kind.KNOWN
        if isinstance(node, nodes.Name):
            return self.names.get(node.name, Kind.KNOWN)
        if isinstance(node, (nodes.Add, nodes.Concat)):
            joined = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
            return Kind.KNOWN if {self._text(one) for one in joined} == {Kind.KNOWN} else Kind.SAID
        if isinstance(node, nodes.CondExpr):
            self._truth(node.test)
            other = Kind.KNOWN if node.expr2 is None else self._kind(node.expr2)
            return _either(self._kind(node.expr1), other)
        if isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return self._member(node)
        if isinstance(node, nodes.Filter):
            return self._filtered(node)
        if isinstance(node, nodes.Test):
            return self._tested(node)
        if isinstance(node, nodes.Compare):
            return self._compared(node)
        if isinstance(node, nodes.Call):
            return self._called(node)
        return self._combined(node)

    def _combined(self, node: nodes.Node) -> Kind:
        if isinstance(node, nodes.Not):
            return self._truth(node)
        if isinstance(node, (nodes.And, nodes.Or, *_ARITHMETIC)):
            return self._known(node.left, node.right)
        if isinstance(node, (nodes.Neg, nodes.Pos)):
            return self._known(node.node)
        if isinstance(node, (nodes.List, nodes.Tuple)):
            return self._known(*node.items)
        if isinstance(node, nodes.Slice):
            return self._known(node.start, node.stop, node.step)
        raise _UnclearError

    def _member(self, node: nodes.Getattr | nodes.Getitem) -> Kind:
        """An attribute, a key, a place or a stretch of something."""
        name = node.attr if isinstance(node, nodes.Getattr) else None
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            name = node.arg.value
        of = self._kind(node.node)
        if of is Kind.KNOWN:
            return self._known(node.arg) if isinstance(node, nodes.Getitem) else Kind.KNOWN
        if of is Kind.LOOP and name in _LOOP:
            return Kind.KNOWN
        if of is Kind.SPACE and isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            return self.names.get(f"{node.node.name}.{name}", Kind.KNOWN)
        if of in _HOLDERS and isinstance(node, nodes.Getitem) and not isinstance(name, str):
            self._known(node.arg)
            return of if isinstance(node.arg, nodes.Slice) else _HOLDERS[of]
        if of in (Kind.MESSAGE, Kind.PART) and isinstance(name, str) and not hasattr(dict, name):
            said = {"content": self.content} if of is Kind.MESSAGE else {"text": Kind.WORDS}
            return said.get(name, Kind.KNOWN)
        raise _UnclearError

    def _filtered(self, node: nodes.Filter) -> Kind:
        if node.node is None or node.kwargs or node.dyn_args or node.dyn_kwargs or node.name not in _FILTERS:
            raise _UnclearError
        kind = self._kind(node.node)
        if kind is Kind.KNOWN:
            return self._known(*node.args)
        if kind is Kind.WORDS and node.name == "trim" and not node.args:
            return kind
        if kind in _HOLDERS and not node.args:
            found = {"length": Kind.KNOWN, "count": Kind.KNOWN, "list": kind}
            found |= {"first": _HOLDERS[kind], "last": _HOLDERS[kind]}
            if node.name in found:
                return found[node.name]
        raise _UnclearError

    def _tested(self, node: nodes.Test) -> Kind:
        kind = self._kind(node.node)
        if node.name in _TYPES and kind is not Kind.SPACE and kind is not Kind.LOOP:
            return self._known(*node.args)
        if kind is Kind.KNOWN and not (node.kwargs or node.dyn_args or node.dyn_kwargs):
            return self._known(*node.args)
        raise _UnclearError

    def _compared(self, node: nodes.Compare) -> Kind:
        for other in node.ops:
            keys = other.op in ("in", "notin") and self._kind(other.expr) in (Kind.MESSAGE, Kind.PART)
            if not keys or len(node.ops) > 1:  # which keys there are follows from the shape
                self._known(other.expr)
        return self._known(node.expr)

    def _called(self, node: nodes.Call) -> Kind:
        if node.kwargs or node.dyn_args or node.dyn_kwargs:
            raise _UnclearError
        called = node.node
        if isinstance(called, nodes.Name) and called.name not in self.names:
            if called.name == "raise_exception":  # whatever it says: the shape is refused
                for given in node.args:
                    self._text(given)
                return Kind.KNOWN
            if called.name == "range":
                return self._known(*node.args)
        if isinstance(called, nodes.Getattr):
            kind = self._kind(called.node)
            if kind is Kind.WORDS and called.attr == "strip" and not node.args:
                return kind
            if kind is Kind.KNOWN and called.attr in _METHODS:
                return self._known(*node.args)
        raise _UnclearError


def _either(one: Kind, other: Kind) -> Kind:
    """What is one of two."""
    if one is other:
        return one
    if not {one, other} <= _TEXTS:
        raise _UnclearError
    return Kind.SAID if Kind.SAID in (one, other) else Kind.WORDS
