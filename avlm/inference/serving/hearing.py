"""What a request to /v1/audio/transcriptions says.

Source:
    OpenAI's API reference, "Create transcription".
"""

from __future__ import annotations

import secrets

from avlm.config.serve import Serve
from avlm.data.forms.folders import unbroken
from avlm.inference.sampling import Sampling
from avlm.inference.serving.asking import Wishes
from avlm.inference.serving.fields import Fields
from avlm.inference.serving.forms import Form, form_of
from avlm.inference.serving.refusing import wrong
from avlm.samples import MediaItem, Sample, Text, Turn

FORMATS = ("json", "text", "verbose_json")


def transcription_request(body: bytes, content_type: str, settings: Serve) -> tuple[Sample, Wishes]:
    """Read a request: a recording, and the question that a model is asked about it.

    Raises:
        RefusedError: It is not one that can be answered.
    """
    form = form_of(body, content_type)
    fields = Fields({name: _value(form, name) for name in form.texts})
    data = _file(form)
    fields.ignore(["language", "user"])  # the model hears which language it is
    language = fields.text("language")
    temperature = _number(fields, "temperature")
    said = fields.choice("response_format", FORMATS) or "json"
    instruction = fields.text("prompt") or settings.transcribe
    stream = (fields.choice("stream", ("true", "false", "True", "False", "1", "0")) or "0").lower() in ("true", "1")
    fields.neutral("chunking_strategy", "auto")
    model = fields.text("model")
    for name in ("timestamp_granularities[]", "timestamp_granularities", "include[]", "include"):
        if fields.take(name) is not None:
            raise fields.wrong(name, "asks for what this model does not tell: times and probabilities. Leave it out")
    fields.done()
    sampling = Sampling(
        max_tokens=settings.answer_tokens,
        temperature=settings.temperature if temperature is None else temperature,
        seed=secrets.randbits(62) if temperature else 0,
    )
    parts = (MediaItem("audio", data=data, title="file"), Text(unbroken(instruction, "prompt")))
    wishes = Wishes(model, sampling, stream=stream, form=said, language=language)
    return Sample("request", (Turn("user", parts),)), wishes


def _file(form: Form) -> bytes:
    for name in form.files:
        if name != "file":
            raise wrong(
                name[:100], f"{name[:100]} is not a file that this takes. Send the recording as `file`", "unknown"
            )
    found = form.files.get("file", [])
    if len(found) != 1 or not found[0]:
        raise wrong("file", "file is missing, empty, or there several times. Send one recording, with a file name")
    return found[0]


def _value(form: Form, name: str) -> str | None:
    """A field's only value; an empty one counts as not given."""
    values = form.texts[name]
    if len(values) > 1 and not name.endswith("[]"):
        raise wrong(name[:100], f"{name[:100]} is there several times. Give it once")
    return values[0] or None


def _number(fields: Fields, name: str) -> float | None:
    """A number, which a form holds as a text."""
    text = fields.text(name)
    if text is None:
        return None
    try:
        return Fields({name: float(text)}).number(name, 0, 2)
    except ValueError:
        raise fields.wrong(name, "is no number. Give one from 0 to 2", "invalid_type") from None
