"""What a request to /v1/chat/completions says: a conversation, and how it is to be answered.

Source:
    OpenAI's API reference, "Create chat completion"; `video_url`, `audio_url`, `top_k`, `min_p` and
    `repetition_penalty` as vLLM's server takes them.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from avlm.config.serve import Serve
from avlm.data.forms.folders import Folders
from avlm.data.forms.parts import role_of, turn_of
from avlm.errors import DataError
from avlm.inference.chat import media_first
from avlm.inference.sampling import Sampling
from avlm.inference.serving.fields import Fields
from avlm.inference.serving.refusing import RefusedError, wrong
from avlm.samples import MediaItem, Sample, Text, Turn

HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls",
)  # fmt: skip
"""Fields that change no answer of this server."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""Fields that this server cannot follow, and the values at which there is nothing to follow."""
PARTS = ("text", "image_url", "input_audio", "video_url", "audio_url")
STOPS = 16
"""Most stop strings."""
STOP = 200
"""Characters of one."""
TOP = 20
"""Most alternatives that are told of each token."""
_REMOTE = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a request is to be answered."""

    model: str | None
    sampling: Sampling
    """Of the first answer; each further one draws with the next seed."""
    choices: int = 1
    stream: bool = False
    usage: bool = False
    """Whether a stream ends with what it took."""
    form: str = "json"
    """Of a transcript."""
    language: str | None = None
    """Of a recording, as its sender says."""

    def of_choice(self, number: int) -> Sampling:
        """How one of the answers is drawn."""
        return replace(self.sampling, seed=(self.sampling.seed + number) % 2**63)


def chat_request(given: Any, settings: Serve) -> tuple[Sample, Wishes]:
    """Read a request.

    Args:
        given: What its JSON holds.

    Raises:
        RefusedError: It is not one that can be answered.
    """
    fields = Fields(given)
    turns = _turns(fields.take("messages"), settings)
    stream = fields.truth("stream")
    wishes = Wishes(
        model=fields.text("model"),
        sampling=_sampling(fields, settings),
        choices=fields.whole("n", 1, settings.max_choices) or 1,
        stream=stream,
        usage=_usage(fields, stream),
    )
    for name, values in NEUTRAL.items():
        fields.neutral(name, *values)
    fields.ignore(HARMLESS)
    fields.done()
    return Sample("request", turns), wishes


def _sampling(fields: Fields, settings: Serve) -> Sampling:
    temperature = fields.number("temperature", 0, 2)
    if temperature is None:
        temperature = settings.temperature
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    if seed is None:
        seed = secrets.randbits(62) if temperature else 0  # workers are copies, and so are their generators
    top_p, min_p = fields.number("top_p", 0, 1), fields.number("min_p", 0, 1)
    penalty = fields.number("repetition_penalty", 0.01, 100)
    return Sampling(
        max_tokens=_max_tokens(fields, settings),
        temperature=temperature,
        top_k=max(0, fields.whole("top_k", -1, 10**6) or 0),  # -1 is how vLLM's clients say all of them
        top_p=1.0 if top_p is None else max(top_p, 1e-9),  # of none at all the likeliest one is left
        min_p=min_p or 0.0,
        repetition_penalty=1.0 if penalty is None else penalty,
        stop=_stop(fields),
        seed=seed % 2**63,
        logprobs=_logprobs(fields),
    )


def _max_tokens(fields: Fields, settings: Serve) -> int:
    """OpenAI's older and newer name for one thing."""
    named = {name: fields.whole(name, 1, settings.max_tokens) for name in ("max_completion_tokens", "max_tokens")}
    found = {value for value in named.values() if value is not None}
    if len(found) > 1:
        raise fields.wrong("max_tokens", "and max_completion_tokens say two things. Give one of them")
    return found.pop() if found else settings.answer_tokens


def _stop(fields: Fields) -> tuple[str, ...]:
    given = fields.take("stop")
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > STOPS or not all(isinstance(s, str) for s in stops):
        raise fields.wrong("stop", f"is not a text, or a list of at most {STOPS} of them. Correct it")
    if not all(0 < len(s) <= STOP for s in stops):
        raise fields.wrong("stop", f"holds a text that is empty, or longer than {STOP} characters. Leave it out")
    return tuple(stops)


def _logprobs(fields: Fields) -> int | None:
    wanted, top = fields.truth("logprobs"), fields.whole("top_logprobs", 0, TOP)
    if top is not None and not wanted:
        raise fields.wrong("top_logprobs", "says how many alternatives are told, and logprobs is not true. Set it")
    return (top or 0) if wanted else None


def _usage(fields: Fields, stream: bool) -> bool:
    given = fields.take("stream_options")
    if given is None:
        return False
    if not stream:
        raise fields.wrong("stream_options", "is about a stream, and stream is not true. Leave it out")
    options = Fields(given, "stream_options.")
    found = options.truth("include_usage")
    options.ignore(["include_obfuscation"])
    options.done()
    return found


# ---------------------------------------------------------------- the conversation


def _turns(messages: Any, settings: Serve) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "messages is not a list of at least one message. Give what is asked")
    turns = tuple(_turn(message, f"messages[{number}].", settings) for number, message in enumerate(messages))
    if turns[-1].role == "assistant":
        raise wrong(
            "messages", "The last of the messages is the assistant's, so there is nothing to answer. Ask something"
        )
    count = sum(isinstance(part, MediaItem) for turn in turns for part in turn.parts)
    if count > settings.max_media:
        raise wrong("messages", f"There are {count} media, and at most {settings.max_media} are taken. Send fewer")
    letters = sum(len(turn.text()) for turn in turns)
    if letters > settings.max_text:
        raise RefusedError(
            400,
            f"The messages have {letters} characters, and at most {settings.max_text} are read. Send less",
            param="messages",
            code="context_length_exceeded",
        )
    return turns


def _turn(message: Any, where: str, settings: Serve) -> Turn:
    """One message; of what avlm's own rows may say of one (its state, its cuts) nothing is taken from a stranger."""
    fields = Fields(message, where)
    role, content = fields.text("role"), fields.take("content")
    for name in ("refusal", "audio", "function_call"):
        fields.neutral(name)
    fields.neutral("tool_calls", [])
    fields.ignore(["name", "annotations", "reasoning_content", "reasoning"])
    fields.done()
    if not isinstance(content, (str, list)) or not content:
        raise fields.wrong("content", "is not a text or a list of parts, or there is nothing in it. Give what is said")
    items = (
        [_checked(part, f"{where}content[{i}].") for i, part in enumerate(content)]
        if isinstance(content, list)
        else content
    )
    plain = {"role": role, "content": items}
    try:
        role_of(plain)
        turn = turn_of(plain, Folders())
    except DataError as error:
        raise wrong(where.rstrip("."), f"{where.rstrip('.')}: {error.reason}") from None
    named = [_named(part, f"{where}content[{i}]") for i, part in enumerate(turn.parts)]
    return replace(turn, parts=tuple(media_first(named)))


def _checked(part: Any, where: str) -> dict[str, Any]:
    """A part with the fields that are meant for strangers, and no address but one of the web."""
    fields = Fields(part, where)
    kind = fields.choice("type", PARTS)
    if kind is None:
        raise fields.wrong("type", f"is missing, and a part is one of {', '.join(PARTS)}. Give it")
    fields.ignore(["cache_control", "uuid"])
    if kind == "text":
        found = {"type": kind, "text": fields.text("text")}
        fields.done()
        return found
    given = fields.take(kind)
    fields.done()
    inner = Fields({"url": given} if isinstance(given, str) and kind != "input_audio" else given, f"{where}{kind}.")
    key = "data" if kind == "input_audio" else "url"
    value = inner.text(key)
    inner.choice("detail", ("auto", "low", "high", "original"))
    inner.text("format")
    inner.ignore(["uuid"])
    inner.done()
    if not value:
        raise inner.wrong(key, "is missing, and so is what it shows or lets hear. Give it")
    if key == "url" and not value.startswith("data:") and not _REMOTE.match(value):
        raise inner.wrong(key, "is neither a data URL nor one of http or https. Send data:TYPE;base64,...")
    return {"type": kind, kind: {key: value}}


def _named(part: Text | MediaItem, name: str) -> Text | MediaItem:
    """A medium that messages can name by its place; files of this machine are none of a stranger's."""
    if isinstance(part, Text):
        return part
    if part.path is not None:
        raise wrong(name, f"{name}: is a path, and paths are not read. Send the file as a data URL")
    return replace(part, title=name)
