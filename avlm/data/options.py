"""What a caller of the processor asks for besides texts and media, under the names that transformers has for it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from avlm.errors import ConfigError
from avlm.samples import Encoded

Side = Literal["left", "right"]

NESTED = ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "processor_kwargs")
"""Options may stand in these, too; what stands outside of them comes first."""
KNOWN = (
    "add_special_tokens", "max_length", "pad_to_multiple_of", "padding", "padding_side", "return_tensors",
    "sampling_rate", "truncation",
)  # fmt: skip
OTHERS = (
    "device", "do_center_crop", "do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize",
    "do_sample_frames", "fps", "load_audio_from_video", "num_frames", "return_attention_mask", "return_metadata",
    "return_mm_token_type_ids", "return_offsets_mapping", "return_token_type_ids", "size", "video_fps",
    "video_load_backend", "video_metadata",
)  # fmt: skip
"""What other processors do when they are asked; this one prepares media as the model's directory says."""


ENDLESS = 10**9
"""From here on a tokenizer's longest text is none that somebody set."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for."""

    side: Side = "left"
    """Where padding goes: on the left to generate, on the right to train."""
    tensors: Literal["pt", "np"] | None = None
    padded: bool = False
    """Whether padding was asked for."""
    width: int = 0
    """To which everything is padded at least, and of which the width is a multiple; 0 for neither."""
    multiple: int = 1
    most: int | None = None
    """Tokens from which on a text would be cut off."""
    rate_hz: int | None = None
    """Of sounds that are given as arrays."""
    special: bool = True
    """Whether a text that is no prompt yet may be made one."""
    rest: dict[str, Any] = field(default_factory=dict)
    """What is none of these."""

    def even(self, encoded: Sequence[Encoded]) -> bool:
        """Whether texts come as one tensor: all are as long, or that is wanted."""
        return self.padded or self.tensors is not None or len({len(one) for one in encoded}) == 1

    def check_length(self, encoded: Sequence[Encoded]) -> None:
        """Refuse to cut off at a length: media would lose their places, and what they show with them.

        Raises:
            ConfigError: One is longer than is wanted.
        """
        longest = max(map(len, encoded), default=0)
        if self.most is not None and longest > self.most:
            raise ConfigError(
                f"{longest} tokens are to be cut off at {self.most} (truncation, max_length), with media and what "
                "follows them, and avlm cuts nothing off. Leave out what is too long, or raise max_length"
            )


def options_of(given: dict[str, Any], longest: int) -> Options:
    """The options among the keywords of a call.

    Args:
        longest: Tokens that the tokenizer says a text has at most.

    Raises:
        ConfigError: One of them cannot be.
    """
    asked: dict[str, Any] = {}
    for name in NESTED:
        asked |= given[name] if isinstance(given.get(name), dict) else {}
    asked |= {name: value for name, value in given.items() if name not in NESTED}
    side, tensors = asked.get("padding_side") or "left", asked.get("return_tensors")
    if side not in ("left", "right"):
        raise ConfigError(f"side={side!r} is neither end of a batch. Pad on the left or on the right")
    tensors = getattr(tensors, "value", tensors)
    if tensors not in (None, "pt", "np"):
        raise ConfigError(f"return_tensors={tensors!r} is no kind of tensors that there is here. Take 'pt' or 'np'")
    padding = getattr(asked.get("padding"), "value", asked.get("padding"))
    limit = int(asked.get("max_length") or 0) or (longest if longest < ENDLESS else 0)
    return Options(
        side=cast(Side, side),
        tensors=cast('Literal["pt", "np"] | None', tensors),
        padded=padding not in (None, False, "do_not_pad") or asked.get("padding_side") is not None,
        width=limit if padding == "max_length" else 0,
        multiple=int(asked.get("pad_to_multiple_of") or 1),
        most=limit if limit and _cuts(asked.get("truncation")) else None,
        rate_hz=asked.get("sampling_rate"),
        special=asked.get("add_special_tokens") is not False,
        rest={name: value for name, value in asked.items() if name not in KNOWN},
    )


def _cuts(truncation: Any) -> bool:
    return getattr(truncation, "value", truncation) not in (None, False, "do_not_truncate")


def tell_unknown(rest: dict[str, Any], *, also: Sequence[str] = ()) -> None:
    """Tell of options that are left out; of nothing that is not set.

    Args:
        also: What is read elsewhere.
    """
    for name, value in rest.items():
        if name not in also and value is not None and value is not False:
            warnings.warn(
                f"{name} is nothing that avlm's processor can be asked for, so it is left out. Media are prepared as "
                "the model's directory says",
                stacklevel=4,
            )


def with_variables(template: str, rest: dict[str, Any]) -> str:
    """A chat template that begins with what its author left to the caller (`enable_thinking`, say).

    Raises:
        ConfigError: One of these is nothing that can be written down.
    """
    lines = []
    for name, value in rest.items():
        try:
            lines.append(f"{{% set {name} = {_jinja(value)} %}}")
        except (TypeError, ValueError):
            raise ConfigError(
                f"{name}={value!r} is for the chat template, and what it is given are texts, numbers, truth values, "
                "and lists and dicts of these. Give one of them"
            ) from None
    return "".join(lines) + template


def _jinja(value: Any) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_jinja(key)}: {_jinja(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_jinja, value)) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
