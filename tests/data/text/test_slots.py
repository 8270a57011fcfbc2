# ruff: noqa: E501 (templates)
"""Which templates are proven to write what is said as it is, and that a proven one is asked once for each shape."""

from __future__ import annotations

import pytest
from chat_families import CHATML, FAMILIES, GEMMA, LLAMA3, MISTRAL, PARTS, VICUNA, tokenizer

from avlm.data.text import templates
from avlm.data.text.pieces import SLOT, stripped_slots
from avlm.data.text.slots import only_writes
from avlm.data.text.templates import pieces
from avlm.samples import Sample, Text, Turn


def each(body: str) -> str:
    """A template that writes this for each message."""
    return "{% for m in messages %}{{ '<' + m['role'] + '>' }}" + body + "</s>{% endfor %}"


PLAIN = {
    "in a variable": each("{% set x = m.content %}{{ x }}"),
    "in a namespace": "{% set ns = namespace(x='') %}" + each("{% set ns.x = m.content %}{{ ns.x | trim }}"),
    "stripped by its method": each("{{ m.content.strip() }}"),
    "joined in another way": each("{{ m['content'] ~ '\n' }}"),
    "one or the other": each("{{ m.content if loop.first else ' ' + m.content | trim }}"),
    "a stretch of the messages": (
        "{% if messages and messages[0].role == 'system' %}{% set s = messages[0].content %}{% set r = messages[1:] %}"
        "{% else %}{% set s = '' %}{% set r = messages %}{% endif %}{{ s }}"
        "{% for m in r if m.role != 'system' %}{{ m.content }}{% if not loop.last %}\n{% else %}</s>{% endif %}{% endfor %}"
    ),
    "a refusal that tells the text": each(
        "{% if loop.index > 9 %}{{ raise_exception(m.content) }}{% endif %}{{ m.content }}"
    ),
    "what has no name here": each("{% if m.tool_calls is defined or tools %}x{% endif %}{{ m.content }}"),
}
OTHER = {
    "looks for a word": each("{% if 'yes' in m.content %}!{% endif %}{{ m.content }}"),
    "is looked for in": each("{{ 1 if m.content in ['yes'] else 2 }}{{ m.content }}"),
    "leaves the empty out": each("{% if m.content %}{{ m.content }}{% endif %}"),
    "or something else": each("{{ m.content or 'nothing' }}"),
    "measures": each("{{ m.content | length }}{{ m.content }}"),
    "cuts": each("{{ m.content[:3] }}"),
    "changes letters": each("{{ m.content | upper }}"),
    "replaces": each("{{ m.content.replace('a', 'b') }}"),
    "is put into another text": each("{{ 'a%s' % m.content }}"),
    "strips more than the text": each("{{ (' ' + m.content) | trim }}"),
    "strips one side": each("{{ m.content.lstrip() }}"),
    "strips other letters": each("{{ m.content.strip('a') }}"),
    "as JSON": each("{{ m | tojson }}"),
    "the message itself": each("{{ m }}"),
    "counts in a variable": "{% set ns = namespace(n=0) %}"
    + each("{% if ns.n %}!{% endif %}{% set ns.n = m.content | length %}{{ m.content }}"),
    "asks a variable": each("{% set x = m.content %}{% if x == 'yes' %}!{% endif %}{{ x }}"),
    "asks later": "{% for m in messages %}{% if last == 'x' %}!{% endif %}{% set last = m.content %}{{ last }}</s>{% endfor %}",
    "by a macro": "{% macro f(x) %}{{ x }}{% endmacro %}" + each("{{ f(m.content) }}"),
    "by the clock": "{{ strftime_now('%s') }}" + each("{{ m.content }}"),
    "through a filter of lists": "{% for c in messages | map(attribute='content') %}{{ c }}</s>{% endfor %}",
    "letter by letter": each("{% for c in m.content %}{{ c }}{% endfor %}"),
    "no template": "{% for m in messages %}",
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_writes_texts_and_asks_nothing_is_proven(name: str) -> None:
    assert only_writes(PLAIN[name], False)


@pytest.mark.parametrize("name", OTHER)
def test_what_asks_about_a_text_is_not(name: str) -> None:
    assert not only_writes(OTHER[name], False)
    assert not only_writes(OTHER[name], True)


def test_a_list_of_parts_is_no_text() -> None:
    parts = each(
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text | trim }}{% else %}<image>{% endif %}{% endfor %}"
    )
    either = each(
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endif %}"
    )
    assert only_writes(parts, True) and not only_writes(parts, False)
    assert not only_writes(each("{{ m.content }}"), True)
    assert not only_writes(either, True) and not only_writes(either, False)  # both branches are followed


def test_slots_are_seen_to_lose_their_space() -> None:
    one, two = SLOT.format(1), SLOT.format(2)
    assert stripped_slots(f"a {one}b{two}", f"a {one}b {two} ") == {"1"}
    assert stripped_slots(f"a{one}{two}", f"a {one}  {two} ") == set()
    assert stripped_slots(f"a{one}{one}", f"a {one} {one}") is None  # once so, once so
    assert stripped_slots(f"a{one}", f"a {one}") is None  # on one side only


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_proven_template_is_not_asked_again(family: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert family in (CHATML, VICUNA, LLAMA3, MISTRAL, GEMMA, PARTS)
    own, template = tokenizer(family), family.template  # type: ignore[arg-type, attr-defined]

    def sample(name: str) -> Sample:
        turns = [Turn(role, (Text(f" {name} {role}\n"),)) for role in ("user", "assistant") * 2]  # type: ignore[arg-type]
        return Sample(name, tuple(turns))

    by_hand = "".join(text for text, _ in family.by_hand([(t.role, t.text()) for t in sample("b").turns]))  # type: ignore[attr-defined]
    pieces(sample("a"), own, template)
    monkeypatch.setattr(templates, "_applied", None)
    found = "".join(piece.text for piece in pieces(sample("b"), own, template))
    assert by_hand.startswith(found) and len(by_hand) - len(found) <= 1  # but for a line break behind the last answer
