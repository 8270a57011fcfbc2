"""From Energon's samples to avlm's: a sample type of one's own, what cooks it, and one function for each type.

    Talk         the type: a conversation with the bytes of its media
    cook_talk    makes one of the files of a crude sample
    to_sample    the register: which function makes avlm's `Sample` of which type
    ToSamples    the task encoder, which has Energon do both

For another type, write a function that takes it and returns a `Sample`, with `@to_sample.register` above it. It takes
subclasses of its type too. For a type that Energon has not, write the class and its cooker as well.
"""

from __future__ import annotations

import json
import re
from functools import singledispatch

from megatron import energon

from avlm.data.forms.parse import SPEAKERS
from avlm.errors import DataError
from avlm.samples import MediaItem, Sample, Text, Turn

MARKS = re.compile("(<image>|<audio>)")


@energon.edataclass
class Talk(energon.Sample):
    """A conversation in which `<image>` and `<audio>` stand where its media are."""

    said: list[dict[str, str]]
    images: list[bytes]
    audios: list[bytes]


@energon.stateless
@energon.cooker
def cook_talk(files: energon.CrudeSample) -> Talk:
    """A conversation from its JSON and from the files that this names.

    Raises:
        DataError: One of them is not in the tar.
    """
    told = json.loads(files["json"])
    missing = [name for name in (*told.get("images", []), *told.get("audios", [])) if name not in files]
    if missing:
        raise DataError(
            f"names {', '.join(missing)}, which is not in the tar beside it, so nothing can be seen or heard. "
            "Put it there",
            where=files["__key__"],
        )
    return Talk(
        **energon.basic_sample_keys(files),
        said=told["conversations"],
        images=[files[name] for name in told.get("images", [])],
        audios=[files[name] for name in told.get("audios", [])],
    )


@singledispatch
def to_sample(given: energon.Sample) -> Sample:
    """The sample that avlm learns from, of one of Energon's.

    Raises:
        DataError: Nobody said what to make of this type, or the sample is wrong.
    """
    raise DataError(
        f"is {type(given).__name__}, and no function makes a row of that. Write one in {__name__}.py, "
        "with @to_sample.register above it",
        where=given.__key__,
    )


@to_sample.register
def talk(given: Talk) -> Sample:
    """Each mark takes the next medium of its kind, and none may be left over.

    Raises:
        DataError: They are not as many as their marks, or it is not known who speaks.
    """
    unknown = {turn["from"] for turn in given.said} - SPEAKERS.keys()
    if unknown:
        raise DataError(
            f"is said by {', '.join(sorted(unknown))}, and it is not known which side that is. "
            f"Give one of {', '.join(SPEAKERS)}",
            where=given.__key__,
        )
    left = {"<image>": list(given.images), "<audio>": list(given.audios)}
    marks = [mark for turn in given.said for mark in MARKS.findall(turn["value"])]
    for mark, media in left.items():
        if marks.count(mark) != len(media):
            raise DataError(
                f"has {marks.count(mark)} {mark} for {len(media)} of them, so it is not known which is where. "
                "Write one for each",
                where=given.__key__,
            )

    def part(piece: str) -> Text | MediaItem:
        if piece not in left:
            return Text(piece)
        return MediaItem("image" if piece == "<image>" else "audio", data=left[piece].pop(0))

    turns = [
        Turn(SPEAKERS[turn["from"]], tuple(part(piece) for piece in MARKS.split(turn["value"]) if piece))
        for turn in given.said
    ]
    return Sample(given.__key__, tuple(turns), task="talk")


@to_sample.register
def caption(given: energon.CaptioningSample) -> Sample:
    """Undecoded, as `ToSamples` asks for them, a picture and its caption are the bytes of their files."""
    question = (MediaItem("image", data=given.image), Text("What do you see?"))
    answer = (Text(given.caption.decode().strip()),)
    return Sample(given.__key__, (Turn("user", question), Turn("assistant", answer)), task="caption")


@energon.edataclass
class Row(energon.Sample):
    """What leaves the task encoder. Energon keeps track of samples by the fields that this inherits."""

    sample: Sample


class ToSamples(energon.TaskEncoder):
    """Cooks what is crude and makes avlm's samples; media stay the bytes that they are in the tar."""

    decoder = None
    cookers = [energon.Cooker(cook_talk)]

    @energon.stateless
    def encode_sample(self, sample: energon.Sample) -> Row:
        return Row.derive_from(sample, sample=to_sample(sample))
