"""Counts without decoding are those of what is encoded, for every kind of medium, template and stage."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import soundfile
from chat_families import CHATML, FAMILIES, GEMMA, LLAMA3, MEDIA, VICUNA, Family, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avlm.config.data import SystemPrompts
from avlm.config.media import AudioSpec, MediaSpec, Reduction, VideoSpec, VisionSpec
from avlm.config.stage import Stage, StateTokens
from avlm.data.encode import cut
from avlm.data.processor import AvlmProcessor
from avlm.data.staged import MOST_DRAWN, StageWriter
from avlm.data.text import templates as text
from avlm.data.text.pieces import CUT
from avlm.data.text.templates import pieces
from avlm.data.text.tokens import Tokens
from avlm.errors import ConfigError, DataError
from avlm.layout import AudioFacts, ImageFacts, VideoFacts, audio_chunks, load
from avlm.samples import IGNORE, Clip, Counts, Encoded, MediaItem, Picture, Sample, Sound, Text, Turn

SQUARE: dict[str, Any] = {"image_size_px": 28, "cell_px": 14}
WHISPER = AudioSpec(reduction=Reduction(stack=8))
END = "<|endoftext|>"
SPECS: dict[str, MediaSpec] = {
    "squares": MEDIA,
    "tiles": MediaSpec(vision=VisionSpec.model_validate({**SQUARE, "tiling": {"kind": "internvl", "max_tiles": 6}})),
    "any resolution": MediaSpec(
        vision=VisionSpec.model_validate(
            {**SQUARE, "tiling": {"kind": "anyres", "pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28]]}}
        )
    ),
    "patches": MediaSpec(vision=VisionSpec(**SQUARE, max_patches=40, reduction=Reduction(side=2)), audio=WHISPER),
    "wrapped": MediaSpec(
        vision=VisionSpec(**SQUARE, wrap=(END, END)),
        audio=WHISPER.model_copy(update={"wrap": (END, END)}),
        video=VideoSpec(fps=2, max_frames=5, clock=True),
    ),
    "whole window": MediaSpec(
        vision=VisionSpec(**SQUARE),
        audio=AudioSpec(window_frames=100, reduction=Reduction(stack=4, prompts=1)),
        video=VideoSpec(order="audio_video"),
    ),
    "true length in a window": MediaSpec(
        vision=VisionSpec(**SQUARE), audio=AudioSpec(window_frames=100, heard="sound"), video=VideoSpec(order="audio")
    ),
    "two encoders": MediaSpec(
        vision=VisionSpec(**SQUARE),
        audio=AudioSpec(beside=AudioSpec(features="fbank", mel_bins=16, n_fft=512, frame=400, convolutions=())),
        video=VideoSpec(order="video_audio"),
    ),
    "samples as they are": MediaSpec(
        vision=VisionSpec(**SQUARE),
        audio=AudioSpec(features="wave", mel_bins=1, n_fft=1, hop=1, max_frames=8000, reduction=Reduction(stack=4)),
        video=VideoSpec(order="video"),
    ),
}


@cache
def made(family: Family, spec: str) -> AvlmProcessor:
    own = SPECS[spec]
    if spec == "wrapped":  # a token that the family has
        ends = (family.special[0], family.special[1])
        assert own.vision is not None and own.audio is not None
        parts = {"vision": own.vision, "audio": own.audio}
        own = own.model_copy(update={name: part.model_copy(update={"wrap": ends}) for name, part in parts.items()})
    return AvlmProcessor(tokenizer(family), media=own.model_dump(mode="json"), chat_template=family.template)


@cache
def picture(height: int, width: int, form: str) -> MediaItem:
    """A file in which EXIF or Pillow's header alone says how large the picture is."""
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if form == "turned":
        exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG" if form == "PNG" else "JPEG", exif=exif)
    return MediaItem("image", data=file.getvalue(), alt="a red circle " * (width % 5))


@cache
def recording(seconds: float, rate_hz: int, start_s: float) -> MediaItem:
    wave = np.random.default_rng(rate_hz).normal(0, 0.1, (round(seconds * rate_hz), 2)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, rate_hz, format="WAV")
    return MediaItem("audio", data=file.getvalue(), start_s=start_s, alt="two blue squares")


@cache
def film(seconds: float, sounds: bool, spec: str) -> MediaItem:
    """A video given as frames, as many as the model looks at."""
    from avlm.layout import frame_times_s

    count = len(frame_times_s(seconds, SPECS[spec].video))
    frame = Picture(np.zeros((20, 30, 3), np.uint8))
    track = Sound(np.random.default_rng(0).normal(0, 0.1, round(seconds * 8000)).astype(np.float32), 8000)
    return MediaItem(
        "video", decoded=Clip((frame,) * count, seconds, track if sounds else None), alt="a green triangle"
    )


SAID = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        " yes ",
        "\n",
        "What is in the picture?",
        "<|im_end|>",
        "</s>",
        "<think>\nno\n</think>\n\nyes",
        "one two three",
    ]
)
PICTURES = st.builds(picture, st.integers(1, 90), st.integers(1, 90), st.sampled_from(["PNG", "JPEG", "turned"]))
SOUNDS = st.builds(
    recording,
    st.sampled_from([0.06, 0.3, 1.0, 2.3]),
    st.sampled_from([8000, 16_000, 22_050]),
    st.sampled_from([0.0, 0.05]),
)


@st.composite
def conversations(draw: st.DrawFn, spec: str) -> Sample:
    """One to three questions with media anywhere in them, as people or as LLaVA write them."""
    own = SPECS[spec]
    kinds = [PICTURES] + [SOUNDS] * (own.audio is not None)
    films = st.builds(film, st.sampled_from([0.4, 2.0, 3.7]), st.just(own.video.order == "audio"), st.just(spec))
    media = st.one_of(*kinds, films) if own.audio is not None or own.video.order != "audio" else st.one_of(*kinds)
    turns: list[Turn] = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(SAID.map(Text) | media, min_size=1, max_size=4))
        turns.append(Turn("user", tuple(parts), verbatim=draw(st.booleans())))
        turns.append(Turn("assistant", (Text(draw(SAID)),), ended=draw(st.booleans())))
    return Sample("7", tuple(turns))


def taken(encoded: Encoded) -> tuple[int, int, int, int]:
    """Tokens, targets, tiles and frames, read off what is given to a model."""
    tiles = len(encoded.images) + len(encoded.frames)
    return len(encoded.ids), encoded.num_targets(), tiles, sum(chunk.features.shape[1] for chunk in encoded.sounds)


def numbers(counts: Counts) -> tuple[int, int, int, int]:
    return counts.tokens, counts.targets, counts.load.tiles, counts.load.frames


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_counts_are_those_of_what_is_encoded(spec: str, data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    sample = data.draw(conversations(spec))
    own = made(family, spec)
    supervise = data.draw(st.sampled_from(["answers", "everything", "words"]))
    prompt_only = data.draw(st.booleans())
    encoded = own.encode(sample, supervise=supervise, prompt_only=prompt_only)
    counts = own.count(sample, supervise=supervise, prompt_only=prompt_only)
    assert numbers(counts) == taken(encoded)
    if SPECS[spec].vision is not None and SPECS[spec].vision.max_patches is not None:
        assert counts.load.patches == sum(len(picture) for picture in [*encoded.images, *encoded.frames])
    else:
        assert counts.load.patches == 4 * counts.load.tiles  # 28 pixels in cells of 14


def test_work_grows_with_the_square_of_a_sequence_and_not_with_their_number() -> None:
    spec = SPECS["squares"]
    assert spec.audio is not None
    long, short = 16_000 * 30, 16_000 * 5
    assert len(audio_chunks(long, spec.audio)) == 1
    ratio = load(AudioFacts(long), spec).cost / load(AudioFacts(short), spec).cost
    assert ratio == pytest.approx(6 * (1 + 1500 / 6144) / (1 + 250 / 6144), rel=1e-3)  # 50 positions a second
    one, four = load(VideoFacts(1.0, 0), spec), load(VideoFacts(4.0, 0), spec)
    assert (one.tiles, four.tiles, four.cost) == (1, 4, 4 * one.cost)
    assert load(ImageFacts((30, 40)), spec) == one


# ---------------------------------------------------------------- rendering once for a shape, and reading once

TYPED = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% else %}{{ '<' + part['type'] + '>' }}\n{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""As multimodal models of the field have them: typed parts in, placeholders out."""
FORGETFUL = (
    "{% for m in messages %}{% set text = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in text and not "
    "loop.last %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<s>' + m['role'] + '\n' + text + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
"""Thoughts of earlier turns are dropped, as reasoning models do it."""
TEMPLATES = {
    **{family.name: (family, family.template) for family in FAMILIES},
    "typed": (VICUNA, TYPED),
    "forgetful": (VICUNA, FORGETFUL),
    "counts its messages": (VICUNA, "{{ messages | length }}" + VICUNA.template),
    "shouts": (VICUNA, VICUNA.template.replace("m['content'] }}</s>", "m['content'] | upper }}</s>")),
    "leaves empty answers out": (
        VICUNA,
        VICUNA.template.replace("{% else %}ASSISTANT", "{% elif m['content'] %}ASSISTANT"),
    ),
    "writes answers of yes twice": (
        VICUNA,
        VICUNA.template.replace("m['content'] }}</s>", "m['content'] * (2 if 'yes' in m['content'] else 1) }}</s>"),
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_shape_that_is_known_gives_what_rendering_answer_by_answer_gives(name: str, data: st.DataObject) -> None:
    family, template = TEMPLATES[name]
    sample = data.draw(conversations("squares"))
    own = tokenizer(family)

    def rendered(prompt_only: bool) -> tuple[Any, str]:
        """Pieces, or the error; texts that follow each other are one."""
        try:
            found = pieces(sample, own, template, prompt_only=prompt_only)
        except (ConfigError, DataError) as error:
            return str(error), ""
        return [(piece.media, piece.answer) for piece in found], "|".join(piece.text for piece in found)

    quick = [rendered(prompt_only) for prompt_only in (False, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_shape", lambda *_: None)
        slow = [rendered(prompt_only) for prompt_only in (False, True)]
    assert quick == slow


def test_a_conversation_of_a_known_shape_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    own, calls = tokenizer(CHATML), []
    apply = own.apply_chat_template
    monkeypatch.setattr(own, "apply_chat_template", lambda *a, **k: calls.append(1) or apply(*a, **k))
    turns = tuple(Turn(role, (Text(f"{role} {i}"),)) for i in range(6) for role in ("user", "assistant"))
    pieces(Sample("1", turns), own, CHATML.template)
    calls.clear()
    pieces(Sample("2", turns), own, CHATML.template)
    assert len(calls) == 1
    stripped = tuple(Turn(turn.role, (Text(f" {turn.text()}\n"),)) for turn in turns)
    for family in (LLAMA3, GEMMA):
        own = tokenizer(family)
        pieces(Sample("1", turns), own, family.template)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "_answer_by_answer", None)
            pieces(Sample("3", stripped), own, family.template)  # what is stripped is of a known shape too


@cache
def tokens(family: Family, sentencepiece: bool) -> Tokens:
    return Tokens(tokenizer(family, pieces=sentencepiece), family.template)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_what_is_written_behind_a_text_is_read_as_if_both_were_read_whole(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    own = tokens(family, data.draw(st.booleans()))
    some = st.sampled_from(
        [*family.special, *family.special, "<image>", CUT, " ", "\n", "yes", " red", "a", "<", "|", ">", "é"]
    )
    before, behind = ("".join(data.draw(st.lists(some, max_size=6))) for _ in range(2))

    def read(whole: str) -> list[int]:
        parts = [own.tokenizer(part, add_special_tokens=False).input_ids for part in whole.split(CUT) if part]
        return [i for part in parts for i in part]

    first, both = read(before), read(before + behind)
    assert list(own.after(before, behind)) == (both[len(first) :] if both[: len(first)] == first else read(behind))


def test_settings_that_somebody_gives_the_tokenizer_change_nothing() -> None:
    own = Tokens(tokenizer(VICUNA), VICUNA.template)
    text = "a red circle and a blue square, one two three " * 8  # too long to be remembered
    ids = own.ids(text)
    own.tokenizer(["a", "a red circle"], padding="max_length", max_length=5, truncation=True)
    assert own.ids(text) == ids and len(ids) > 5


# ---------------------------------------------------------------- stages


def stage(**settings_: Any) -> Stage:
    return Stage.model_validate({"name": "a", "steps": 1, **settings_})


TOLD = Sample(
    "1",
    (
        Turn("user", (picture(30, 44, "JPEG"), recording(1.0, 16_000, 0.0), Text("What is it?"))),
        Turn("assistant", (Text("red"),)),
        Turn("user", (recording(2.3, 8000, 0.0), picture(50, 41, "PNG"))),
        Turn("assistant", (Text("no"),), state="noise"),
    ),
)


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"rows": "text"},
        {"rows": "text", "supervise": "everything"},
        {"state_tokens": StateTokens()},
        {"loss": "distill"},
        {"supervise": "words"},
        {"describe": 1.0},
        {"rows": "vision"},
        {"rows": "audio", "describe": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [CHATML, GEMMA], ids=lambda f: f.name)
def test_a_stage_counts_what_it_encodes(settings_: dict[str, Any], family: Family) -> None:
    own = AvlmProcessor(tokenizer(family), MEDIA.model_dump(mode="json"), family.template)
    if family.has_system:
        own.use_system(SystemPrompts(text="Be helpful.", audio="Listen.", image="Look."))
    kinds = {"vision": frozenset({"image"}), "audio": frozenset({"audio"})}.get(settings_.get("rows", ""), frozenset())
    writer = StageWriter(stage(**settings_), own, kinds)  # type: ignore[arg-type]
    encoded = writer.encode(TOLD, 0, 0)
    counts = writer.count(TOLD, own.reader().measure)
    assert numbers(counts) == (encoded.room(), *taken(encoded)[1:])
    if settings_.get("loss") == "distill":
        assert encoded.teacher is not None and counts.tokens == max(len(encoded), len(encoded.teacher))


def test_media_that_are_drawn_are_counted_at_their_most() -> None:
    own = made(CHATML, "squares")
    writer = StageWriter(stage(describe=0.5), own)
    counts = writer.count(TOLD, own.reader().measure)
    drawn = [taken(writer.encode(TOLD, 0, epoch)) for epoch in range(120)]  # of 16 choices
    assert len(set(drawn)) > 8
    assert numbers(counts) == tuple(max(column) for column in zip(*drawn, strict=True))
    many = Sample("2", (Turn("user", TOLD.turns[0].parts * (MOST_DRAWN + 1)), TOLD.turns[1]))
    most = writer.count(many, own.reader().measure).tokens
    assert max(len(writer.encode(many, 0, epoch)) for epoch in range(40)) <= most + len(many.media())


def test_media_in_words_are_not_measured() -> None:
    own = made(CHATML, "squares")
    writer = StageWriter(stage(rows="text"), own)
    gone = MediaItem("image", path=None, data=b"nothing", alt="a red circle")
    sample = Sample("1", (Turn("user", (gone,)), Turn("assistant", (Text("yes"),))))
    assert writer.count(sample, own.reader().measure).tokens == len(writer.encode(sample, 0, 0))


# ---------------------------------------------------------------- cut


def shortened(encoded: Encoded, capacity: int) -> Encoded | str:
    """What is left of it, or what is said where that is nothing."""
    try:
        return cut(encoded, capacity)
    except DataError as error:
        return str(error)


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_a_cut_sample_is_the_beginning_of_the_whole_with_whole_media(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(["squares", "tiles", "any resolution", "wrapped", "patches", "two encoders"]))
    family = data.draw(st.sampled_from(FAMILIES))
    sample, own = data.draw(conversations(spec)), made(family, spec)
    supervise = data.draw(st.sampled_from(["answers", "everything", "words"]))
    whole = own.encode(sample, supervise=supervise)
    capacity = data.draw(st.integers(1, len(whole) + 1))
    found = shortened(whole, capacity)
    if isinstance(found, str):
        assert "nothing that is learned is within the first" in found
        border = min([capacity, *(start for start, stop in whole.spans if start < capacity < stop)])
        if supervise == "words":
            assert all(stop > border for words, (_, stop) in zip(whole.words, whole.spans, strict=True) if words)
        else:
            assert set(whole.labels[1:border]) <= {IGNORE}
        return
    assert len(found) <= capacity
    assert (found.ids, found.labels) == (whole.ids[: len(found)], whole.labels[: len(found)])
    assert found.places == whole.places[: len(found.places)]
    placeholders = set(own.tokens().placeholders.values())
    assert sum(i in placeholders for i in found.ids) == sum(
        s.count for place in found.places for s in place.segments if s.kind != "text"
    )
    facts = own.measure(sample)
    loads = [load(facts[place.item], own.media_spec()) for place in found.places]
    assert len(found.images) + len(found.frames) == sum(part.tiles for part in loads)
    assert sum(chunk.features.shape[1] for chunk in found.sounds) == sum(part.frames for part in loads)
    if len(found) < len(whole) and supervise != "words":
        assert found.labels[-1] != IGNORE
    if len(found) < len(whole) and supervise == "words":
        assert len(found.words) == len(found.places) and found.num_targets() > 0


def test_what_is_counted_of_a_cut_sample_is_what_is_left_of_it() -> None:
    own = made(CHATML, "squares")
    for loss in ("next_token", "distill"):
        writer = StageWriter(stage(loss=loss), own)
        encoded = writer.encode(TOLD, 0, 0)
        whole = encoded.room()
        for capacity in range(12, whole + 1):
            left = shortened(encoded, capacity)
            if isinstance(left, str):
                with pytest.raises(DataError) as error:
                    writer.count(TOLD, own.reader().measure, capacity)
                assert str(error.value) == left
                continue
            counts = writer.count(TOLD, own.reader().measure, capacity)
            assert numbers(counts) == (left.room(), *taken(left)[1:])
            assert counts.tokens + counts.cut == whole and counts.tokens <= capacity
            if left.teacher is not None:
                learned = [[i for i in version.labels[1:] if i != IGNORE] for version in (left, left.teacher)]
                assert learned[0] == learned[1]


def test_by_hand() -> None:
    """Seven tokens, a picture of three in the middle with a token on either side."""
    encoded = Encoded("1", [1, 5, 9, 9, 9, 6, 2], [IGNORE, *[IGNORE] * 5, 2], spans=[(1, 6)])
    encoded.labels[0] = 1
    with pytest.raises(DataError, match="has 7 tokens, and nothing that is learned is within the first 6"):
        cut(encoded, 6)
    encoded.ids += [7, 8]
    encoded.labels += [IGNORE, 8]
    assert cut(encoded, 8).ids == [1, 5, 9, 9, 9, 6, 2]
    assert cut(encoded, 9) is encoded
