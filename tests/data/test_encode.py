# ruff: noqa: E501 (templates and whole messages)
"""What is learned and what is not, in the formats of real families; places, rows and batches."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chat_families import (
    CHATML,
    FAMILIES,
    LLAMA3,
    MEDIA,
    MISTRAL,
    VICUNA,
    Family,
    Message,
    processor,
    spans_by_hand,
    tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.media import MediaSpec, VideoSpec, VisionSpec
from avlm.config.stage import Augment
from avlm.data.encode import pack, pad, segment_ids
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import described, without_media
from avlm.errors import ConfigError, DataError, MediaError
from avlm.layout import Segment
from avlm.samples import IGNORE, Clip, Encoded, MediaItem, Picture, Sample, Sound, Text, Turn

RNG = np.random.default_rng(0)
PICTURE = MediaItem("image", decoded=Picture(RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)))
SOUND = MediaItem("audio", decoded=Sound(RNG.normal(0, 0.1, 16_000).astype(np.float32), 16_000))
TRACK = Sound(RNG.normal(0, 0.1, 32_000).astype(np.float32), 16_000)
CLIP = MediaItem("video", decoded=Clip((PICTURE.decoded, PICTURE.decoded), 2.0, TRACK))
IMAGE_IDS, SOUND_IDS = 4, 7
"""Tokens of a picture (28 px in cells of 14), and of one second of sound (50 embeddings joined by eights)."""


def features(encoded: Encoded) -> list[torch.Tensor]:
    return [chunk.features for chunk in encoded.sounds]


def conversation(*messages: Message) -> Sample:
    return Sample("7", tuple(Turn(role, (Text(text),)) for role, text in messages), where="rows.jsonl line 3")  # type: ignore[arg-type]


def learned(encoded: Encoded) -> list[list[int]]:
    """Runs of learned ids."""
    pairs = zip(encoded.ids, encoded.labels, strict=True)
    runs = [(is_learned, list(run)) for is_learned, run in itertools.groupby(pairs, key=lambda pair: pair[1] != -100)]
    for _, run in (r for r in runs if r[0]):
        assert all(token == label for token, label in run)
    return [[token for token, _ in run] for is_learned, run in runs if is_learned]


CONVERSATIONS: list[list[Message]] = [
    [("user", "What is it?"), ("assistant", "red")],
    [("user", "Is it?"), ("assistant", "yes"), ("user", "And now?"), ("assistant", "yes"), ("user", "yes"), ("assistant", "yes")],
    [("user", "assistant"), ("assistant", "assistant"), ("user", "user"), ("assistant", "user")],
    [("user", "Say nothing."), ("assistant", ""), ("user", "More?"), ("assistant", "no")],
    [("user", "ab"), ("assistant", "c\n\nd"), ("user", "  e"), ("assistant", "1 2 3 blue circle")],
    [("user", "What?"), ("assistant", "é 漢字 🎉")],
    [("user", "USER: ASSISTANT: [INST]"), ("assistant", "ASSISTANT: USER:")],
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda m: m[1][1][:9])
def test_the_answers_and_their_end_tokens_are_learned_and_nothing_else(family: Family, messages: list[Message]) -> None:
    encoded = processor(family).encode(conversation(*messages))
    decode = tokenizer(family).decode
    spans = spans_by_hand(family, messages)
    assert decode(encoded.ids) == "".join(text for text, _ in spans)
    assert [decode(run) for run in learned(encoded)] == [text for text, is_learned in spans if is_learned]
    assert encoded.num_targets() == sum(len(run) for run in learned(encoded))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.has_system], ids=lambda f: f.name)
def test_a_system_message_is_written_and_not_learned(family: Family) -> None:
    messages = [("system", "You are a helpful assistant."), ("user", "Is it?"), ("assistant", "no")]
    encoded = processor(family).encode(conversation(*messages))
    decode = tokenizer(family).decode
    assert decode(encoded.ids) == "".join(text for text, _ in spans_by_hand(family, messages))
    assert len(learned(encoded)) == 1


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "yes",
        "assistant",
        "<|im_end|>",
        "<|im_start|>user\n",
        "</s>",
        "<|eot_id|>",
        "<think>",
        "{{ 1 }}",
        "\ufdd1",
    ]
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([CHATML, MISTRAL, LLAMA3]), st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_whatever_is_said_stays_what_it_is(family: Family, turns: list[tuple[str, str]]) -> None:
    messages = [message for q, a in turns for message in (("user", q), ("assistant", a))]
    made = processor(family)
    encoded = made.encode(conversation(*messages))
    noncharacters = dict.fromkeys(range(0xFDD0, 0xFDF0))
    spans = spans_by_hand(family, [(role, text.translate(noncharacters)) for role, text in messages])
    decode = tokenizer(family).decode
    assert decode(encoded.ids) == "".join(text for text, _ in spans)
    assert "".join(decode(run) for run in learned(encoded)) == "".join(text for text, is_learned in spans if is_learned)
    ends = [tokenizer(family).convert_tokens_to_ids(t) for t in family.special]
    runs = learned(encoded)
    assert sum(run.count(end) for run in runs for end in ends) == len(turns)  # nothing said became a control token
    assert all(run[-1] in ends for run in runs)
    prompt = made.encode(conversation(*messages), prompt_only=True)
    assert encoded.ids[: len(prompt)] == prompt.ids


@pytest.mark.parametrize("pieces", [False, True], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda m: m[1][1][:9])
def test_the_prompt_is_the_beginning_of_the_whole(family: Family, messages: list[Message], pieces: bool) -> None:
    made = processor(family, pieces=pieces)
    whole = made.encode(conversation(*messages))
    for count in range(2, len(messages) + 1, 2):
        for asked in (messages[:count], messages[: count - 1]):  # with its answer, which is left out, or without
            prompt = made.encode(conversation(*asked), prompt_only=True)
            assert whole.ids[: len(prompt)] == prompt.ids
            assert set(prompt.labels) == {-100}
            assert whole.labels[len(prompt)] == whole.ids[len(prompt)]  # the first token behind it is learned
            if count < len(messages):
                assert whole.labels[len(prompt) - 1] == -100


@pytest.mark.parametrize("pieces", [False, True], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_turns_are_written_as_if_all_were_written_at_once(family: Family, pieces: bool) -> None:
    """No space creeps in where a turn begins, as happens when SentencePiece sees the turn alone."""
    messages = [("user", "Is it red?"), ("assistant", "no"), ("user", "Is it blue?"), ("assistant", "yes")]
    encoded = processor(family, pieces=pieces).encode(conversation(*messages))
    text = "".join(text for text, _ in spans_by_hand(family, messages))
    assert encoded.ids == tokenizer(family, pieces=pieces)(text, add_special_tokens=False).input_ids


def test_an_answer_that_would_merge_with_the_prompt_is_written_apart() -> None:
    """Generation begins behind the prompt's tokens, so training must not see a token that spans both."""
    made = AvlmProcessor(
        tokenizer(CHATML),
        media=MEDIA.model_dump(mode="json"),
        chat_template="{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} gr{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}",
    )
    both = tokenizer(CHATML)("What? green<|im_end|>", add_special_tokens=False).input_ids
    prompt = tokenizer(CHATML)("What? gr", add_special_tokens=False).input_ids
    assert both[: len(prompt)] != prompt  # they do merge
    encoded = made.encode(conversation(("user", "What?"), ("assistant", "een")))
    assert encoded.ids[: len(prompt)] == prompt
    assert tokenizer(CHATML).decode(learned(encoded)[0]) == "een<|im_end|>"


def test_everything_is_learned_but_the_media_when_asked_for() -> None:
    sample = Sample("1", (Turn("user", (PICTURE, Text("What?"))), Turn("assistant", (Text("red"),))))
    encoded = processor(CHATML).encode(sample, supervise="everything")
    place = processor(CHATML).tokens().placeholders["image"]
    assert encoded.labels == [-100 if token == place else token for token in encoded.ids]
    assert encoded.ids.count(place) == IMAGE_IDS


# ---------------------------------------------------------------- media


def test_each_medium_takes_its_places_where_it_stands() -> None:
    turns = (
        Turn("user", (PICTURE, SOUND, Text("What?"))),
        Turn("assistant", (Text("red"),)),
        Turn("user", (Text("And"), PICTURE, Text("now?"), SOUND)),
        Turn("assistant", (Text("blue"),)),
    )
    made = processor(CHATML)
    encoded = made.encode(Sample("9", turns))
    names = {id_: f"({kind})" for kind, id_ in made.tokens().placeholders.items()}
    written = "".join(names.get(i) or tokenizer(CHATML).decode([i]) for i in encoded.ids)
    picture, sound = "(image)" * IMAGE_IDS, "(audio)" * SOUND_IDS
    assert written == (
        f"<|im_start|>user\n{picture}{sound}What?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        f"<|im_start|>user\nAnd\n{picture}now?\n{sound}<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>"
    )
    assert [tokenizer(CHATML).decode(run) for run in learned(encoded)] == ["red<|im_end|>", "blue<|im_end|>"]
    assert [(p.sample_id, p.item, p.segments[0]) for p in encoded.places] == [
        ("9", 0, Segment("image", IMAGE_IDS)),
        ("9", 1, Segment("audio", SOUND_IDS)),
        ("9", 2, Segment("image", IMAGE_IDS)),
        ("9", 3, Segment("audio", SOUND_IDS)),
    ]
    assert [tuple(t.shape) for t in encoded.images] == [(3, 28, 28)] * 2
    assert [tuple(t.features.shape) for t in encoded.sounds] == [(80, 100)] * 2
    assert all(label == -100 for i, label in zip(encoded.ids, encoded.labels, strict=True) if i in names)


ORDERS = [
    ("interleaved", "vvvvaaaaaavvvvaaaaaaa"),  # thirteen sound tokens; the seventh is over after the second frame came
    ("video_audio", "vvvvvvvvaaaaaaaaaaaaa"),
    ("audio_video", "aaaaaaaaaaaaavvvvvvvv"),
    ("video", "vvvvvvvv"),
    ("audio", "aaaaaaaaaaaaa"),
]


def watching(**video: Any) -> AvlmProcessor:
    """A processor with other settings for videos."""
    media = MEDIA.model_copy(update={"video": VideoSpec(**{"fps": 1, **video})})
    return AvlmProcessor(tokenizer(CHATML), media=media.model_dump(mode="json"), chat_template=CHATML.template)


def kinds_of(made: AvlmProcessor, encoded: Encoded) -> str:
    """The first letters of the media that the places are of."""
    letters = {id_: kind[0] for kind, id_ in made.tokens().placeholders.items()}
    return "".join(letters.get(i, "") for i in encoded.ids)


@pytest.mark.parametrize(("order", "kinds"), ORDERS)
def test_a_video_takes_its_places_in_the_order_asked_for(order: Any, kinds: str) -> None:
    made = watching(order=order)
    encoded = made.encode(Sample("1", (Turn("user", (CLIP,)), Turn("assistant", (Text("x"),)))))
    assert kinds_of(made, encoded) == kinds
    assert len(encoded.frames) == (2 if "v" in kinds else 0)
    assert len(encoded.sounds) == (1 if "a" in kinds else 0)
    assert encoded.images == []


def tensors(encoded: Encoded) -> list[torch.Tensor]:
    return [*encoded.frames, *(sound.features for sound in encoded.sounds)]


@pytest.mark.parametrize("pieces", [False, True], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize(("order", "kinds"), ORDERS)
def test_a_clock_is_written_before_each_frame_and_never_learned(order: Any, kinds: str, pieces: bool) -> None:
    media = MEDIA.model_copy(update={"video": VideoSpec(fps=1, order=order, clock=True)})
    own = tokenizer(CHATML, pieces=pieces)
    made = AvlmProcessor(own, media=media.model_dump(mode="json"), chat_template=CHATML.template)
    plain = AvlmProcessor(
        own,
        media=MEDIA.model_copy(update={"video": VideoSpec(fps=1, order=order)}).model_dump(mode="json"),
        chat_template=CHATML.template,
    )
    sample = Sample("1", (Turn("user", (CLIP, Text("What?"))), Turn("assistant", (Text("0.0s"),))))
    encoded, without = made.encode(sample, supervise="everything"), plain.encode(sample, supervise="everything")
    assert kinds_of(made, encoded) == kinds
    # By hand: each time is turned into tokens by itself, before its frame, and everything else is as it was.
    times = [own(text, add_special_tokens=False).input_ids for text in ("0.0s", "1.0s")]
    frame = [made.tokens().placeholders["video"]] * IMAGE_IDS
    expected, learned_, i = [], [], 0
    while i < len(without.ids):
        if times and without.ids[i : i + IMAGE_IDS] == frame:
            clock = times.pop(0)
            expected += [*clock, *frame]
            learned_ += [-100] * (len(clock) + IMAGE_IDS)
            i += IMAGE_IDS
            continue
        expected.append(without.ids[i])
        learned_.append(without.labels[i])
        i += 1
    assert encoded.ids == expected
    assert encoded.labels == learned_
    (place,) = encoded.places
    assert len(segment_ids(place.segments, made.tokens())) == len(encoded.ids) - len(without.ids) + len(kinds)
    for ours, theirs in zip(tensors(encoded), tensors(without), strict=True):
        assert torch.equal(ours, theirs)


def test_for_words_there_is_no_clock() -> None:
    sample = Sample("1", (Turn("user", (alt(CLIP, "red"),)),))
    assert (
        watching(clock=True).encode(sample, supervise="words").ids == watching().encode(sample, supervise="words").ids
    )


def test_several_videos_between_pictures_and_sounds_keep_their_order() -> None:
    """Frames, pictures and sounds, each numbered by its level, come to the encoders as their places are read."""

    def flat(level: int) -> Picture:
        return Picture(np.full((28, 28, 3), level, np.uint8))

    def noise(seconds: float) -> Sound:
        return Sound(RNG.normal(0, 0.1, round(16_000 * seconds)).astype(np.float32), 16_000)

    first = MediaItem("video", decoded=Clip((flat(10), flat(20)), 2.0, noise(2.0)))
    silent = MediaItem("video", decoded=Clip((flat(40),), 1.0, None))
    last = MediaItem("video", decoded=Clip((flat(60),), 1.0, noise(1.0)))
    pictures = [MediaItem("image", decoded=flat(level)) for level in (30, 70)]
    sounds = [MediaItem("audio", decoded=noise(seconds)) for seconds in (0.5, 0.25)]
    turns = (
        Turn("user", (first, pictures[0], Text("What?"), silent, sounds[0])),
        Turn("assistant", (Text("red"),)),
        Turn("user", (sounds[1], last, pictures[1], Text("And now?"))),
        Turn("assistant", (Text("blue"),)),
    )
    made = watching()
    encoded = made.encode(Sample("1", turns))
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kinds_of(made, encoded))]
    assert runs == [
        ("v", 4),
        ("a", 6),
        ("v", 4),
        ("a", 7),
        ("i", 4),
        ("v", 4),
        ("a", 4 + 2),
        ("v", 4),
        ("a", 7),
        ("i", 4),
    ]
    spec = MEDIA.vision
    assert spec is not None
    for found, levels in ((encoded.frames, (10, 20, 40, 60)), (encoded.images, (30, 70))):
        assert [round(255 * (float(t[0].mean()) * spec.std[0] + spec.mean[0])) for t in found] == list(levels)
    assert [sound.frames for sound in encoded.sounds] == [200, 50, 25, 100]
    assert [place.item for place in encoded.places] == list(range(7))


def asked(*parts: Text | MediaItem, answer: str = "red") -> Sample:
    """A question about media and its answer."""
    return Sample("1", (Turn("user", parts), Turn("assistant", (Text(answer),))), "vqa", "rows.jsonl line 3")


def alt(item: MediaItem, words: str) -> MediaItem:
    return replace(item, alt=words)


def test_for_a_stage_of_text_each_medium_is_what_it_shows_or_says_on_a_line_of_its_own() -> None:
    """One without words leaves nothing behind."""
    sample = asked(alt(PICTURE, "a red circle"), SOUND, alt(CLIP, "bell, then siren"), Text("What?"))
    worded = without_media(sample)
    assert worded.turns[0].text() == "a red circle\nbell, then siren\nWhat?"
    assert (worded.id, worded.task, worded.where, worded.turns[1]) == (
        "1",
        "vqa",
        "rows.jsonl line 3",
        sample.turns[1],
    )
    assert worded.media() == []
    encoded = processor(CHATML).encode(without_media(sample))
    assert encoded.ids == processor(CHATML).encode(worded).ids
    written = tokenizer(CHATML).decode(encoded.ids)
    positions = [written.index(words) for words in ("a red circle\n", "bell, then siren\n", "What?", "red<|im_end|>")]
    assert positions == sorted(positions)
    assert not encoded.places and not encoded.images and not encoded.sounds and not encoded.frames


def test_a_marker_in_the_words_of_a_medium_is_refused_as_in_any_text() -> None:
    with pytest.raises(DataError, match="a text holds the marker <image>"):
        processor(CHATML).encode(without_media(asked(alt(PICTURE, "an <image>"), Text("What?"))))


def test_the_share_of_media_asked_for_is_described_and_the_rest_kept() -> None:
    items = [alt(PICTURE, f"picture {i}") for i in range(400)]
    sample = asked(*items, Text("Which?"))
    rng = np.random.default_rng(0)
    kept = described(sample, 0.25, rng)
    words = [part.text for part in kept.turns[0].parts if isinstance(part, Text)]
    assert 70 <= len(words) - 1 <= 130  # 100 expected; four standard deviations are 35
    for before, after in zip(sample.turns[0].parts, kept.turns[0].parts, strict=True):
        assert after is before or (isinstance(before, MediaItem) and after == Text(f"{before.alt}\n"))
    again = described(sample, 0.25, np.random.default_rng(0))
    other = described(sample, 0.25, np.random.default_rng(1))
    assert again == kept != other


def test_none_all_and_those_without_words_are_described_as_they_must_be() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    sample = asked(alt(PICTURE, "a red circle"), SOUND, Text("What?"))
    assert described(sample, 0.0, rng) is sample
    assert rng.bit_generator.state == before  # a stage that does not describe draws as it did before there was that
    assert described(sample, 1.0, rng).turns[0].parts == (Text("a red circle\n"), SOUND, Text("What?"))


def test_a_stage_for_one_sense_is_given_the_other_in_words_as_far_as_they_are_known() -> None:
    sample = asked(alt(PICTURE, "a red circle"), alt(SOUND, "seven"), SOUND, Text("What?"))
    found = described(sample, 0.0, np.random.default_rng(0), {"image"})
    assert found.turns[0].parts == (alt(PICTURE, "a red circle"), Text("seven\n"), SOUND, Text("What?"))


# ---------------------------------------------------------------- words for an encoder


def test_for_words_there_are_places_and_what_each_medium_shows_or_says_and_no_text() -> None:
    """A medium without words takes those of the first answer."""
    answers = [Turn("assistant", (Text(text),)) for text in ("blue circle", "no")]
    asks = [Turn("user", (alt(PICTURE, "red 1 2 3"), Text("What?"), SOUND)), Turn("user", (Text("Sure?"), PICTURE))]
    sample = Sample("9", (asks[0], answers[0], asks[1], answers[1]))
    made = processor(CHATML)
    encoded = made.encode(sample, supervise="words")
    decode = tokenizer(CHATML).decode
    assert [decode(words) for words in encoded.words] == ["red 1 2 3", "blue circle", "blue circle"]
    names = made.tokens().placeholders
    assert encoded.ids == [names["image"]] * IMAGE_IDS + [names["audio"]] * SOUND_IDS + [names["image"]] * IMAGE_IDS
    assert encoded.labels == [-100] * len(encoded.ids)
    assert encoded.num_targets() == sum(len(tokenizer(CHATML)(decode(words)).input_ids) for words in encoded.words)
    answered = made.encode(sample)
    assert encoded.places == answered.places
    for ours, theirs in zip(
        [*encoded.images, *features(encoded)], [*answered.images, *features(answered)], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_words_need_no_template_and_no_answer() -> None:
    made = with_template("{{ raise_exception('never') }}")
    sample = Sample("1", (Turn("user", (alt(PICTURE, "red"), SOUND)),))
    encoded = made.encode(sample, supervise="words")
    assert [tokenizer(CHATML).decode(words) for words in encoded.words] == ["red", ""]
    assert encoded.num_targets() == len(encoded.words[0]) > 0


def test_a_row_holds_the_words_of_its_samples_in_reading_order() -> None:
    made = processor(CHATML)
    samples = [made.encode(asked(alt(PICTURE, "red"), alt(PICTURE, "1 2"), Text("?")), supervise="words")]
    samples += [made.encode(asked(alt(SOUND, "blue"), Text("?")), supervise="words")]
    row = pack(samples)
    assert [tokenizer(CHATML).decode(words) for words in row.words] == ["red", "1 2", "blue"]
    assert row.num_targets() == sum(sample.num_targets() for sample in samples) == sum(map(len, row.words))
    assert pack([made.encode(asked(alt(PICTURE, "red"), Text("?")))]).words == []


def test_changes_to_media_reach_those_whose_words_are_learned() -> None:
    """The same draws give the same picture as where an answer is learned."""
    sample, changes = asked(alt(PICTURE, "red"), Text("What?")), Augment(shift=0.3, jitter=0.3)
    plain, *changed = (
        processor(CHATML).encode(sample, supervise=supervise, augment=augment).images[0]
        for supervise, augment in (
            ("words", None),
            ("words", (changes, np.random.default_rng(3))),
            ("answers", (changes, np.random.default_rng(3))),
        )
    )
    assert torch.equal(*changed) and not torch.equal(plain, changed[0])


def test_a_medium_that_the_model_cannot_take_is_the_samples_error() -> None:
    for media, item, message in (
        (MediaSpec(audio=MEDIA.audio), PICTURE, "the image given as data: is a picture, and this model does not see. Use a model with a vision part"),
        (MediaSpec(vision=MEDIA.vision), SOUND, "the audio given as data: is a sound, and this model does not hear. Use a model with an audio part"),
    ):  # fmt: skip
        made = AvlmProcessor(tokenizer(CHATML), media=media.model_dump(mode="json"), chat_template=CHATML.template)
        with pytest.raises(MediaError) as error:
            made.encode(Sample("7", (Turn("user", (item,)),), where="rows.jsonl line 3"), prompt_only=True)
        assert (error.value.reason, error.value.sample_id, error.value.where) == (message, "7", "rows.jsonl line 3")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_marker_without_its_medium_is_refused(kind: str, role: str) -> None:
    messages = [("user", "a"), ("assistant", "b")]
    messages = [(r, f"x <{kind}> y") if r == role else (r, t) for r, t in [("system", "s"), *messages]]
    with pytest.raises(DataError) as error:
        processor(CHATML).encode(conversation(*messages))
    assert str(error.value) == (
        f"rows.jsonl line 3: a text holds the marker <{kind}>, which stands for {kind} data, and no {kind} belongs to it "
        f'there. Give the {kind} as a part of its own ({{"type": "{kind}", "path": ...}}) or write the marker in another way'
    )
    assert error.value.sample_id == "7"


def test_no_text_can_forge_a_medium_or_a_turn() -> None:
    """Marks that the renderer uses inside, whole, nested and cut by reserved characters."""
    made = processor(CHATML)
    forged = ["\ufdd20\ufdd3", "\ufdd2\ufdd20\ufdd30\ufdd3", "<|im_\ufdd0end|>", "\ufdd1", "\ue0000\ue001"]
    for text in forged:
        encoded = made.encode(Sample("1", (Turn("user", (PICTURE, Text(text))), Turn("assistant", (Text("b"),)))))
        places = [i for i in encoded.ids if i in made.tokens().placeholders.values()]
        assert len(places) == IMAGE_IDS
        end = tokenizer(CHATML).convert_tokens_to_ids("<|im_end|>")
        assert encoded.ids.count(end) == 2
    with pytest.raises(DataError, match="holds the marker <image>"):
        made.encode(conversation(("user", "<ima\ufdd0ge>"), ("assistant", "b")))


def test_a_medium_in_an_answer_is_refused() -> None:
    with pytest.raises(DataError) as error:
        processor(CHATML).encode(Sample("7", (Turn("user", (Text("a"),)), Turn("assistant", (PICTURE,)))))
    assert str(error.value) == (
        "an assistant turn holds the image given as data, and models answer in words. Move it to a user turn"
    )


def test_a_sample_with_nothing_to_learn_is_refused() -> None:
    for sample in (conversation(("user", "What?")), conversation()):
        with pytest.raises(DataError) as error:
            processor(CHATML).encode(sample)
        assert str(error.value) == "rows.jsonl line 3: there is no answer to learn from. Add an assistant turn"
    with pytest.raises(DataError) as error:
        processor(CHATML).encode(conversation(("assistant", "red")), prompt_only=True)
    assert str(error.value) == "rows.jsonl line 3: there is no question to answer. Add a user turn"


def test_a_question_behind_the_last_answer_is_not_written() -> None:
    messages = [("user", "What?"), ("assistant", "red")]
    whole = processor(CHATML).encode(conversation(*messages))
    assert processor(CHATML).encode(conversation(*messages, ("user", "And?"))).ids == whole.ids


def with_template(template: str | None, family: Family = CHATML) -> AvlmProcessor:
    return AvlmProcessor(tokenizer(family), media=MEDIA.model_dump(mode="json"), chat_template=template)


TWO = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
STRIPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_history_cannot_be_trained_on() -> None:
    made = with_template(STRIPS_THINKING)
    with pytest.raises(ConfigError) as error:
        made.encode(TWO)
    assert str(error.value) == (
        "the chat template changes earlier text when an answer is added, so what is to be learned cannot be told from "
        "the prompt. Use a template in which a longer conversation begins with the shorter one"
    )
    one = made.encode(conversation(("user", "a"), ("assistant", "b")))
    assert tokenizer(CHATML).decode(learned(one)[0]) == "<think>\n</think>\nb<|im_end|>"
    asked = made.encode(TWO, prompt_only=True)  # and it can be talked with
    assert tokenizer(CHATML).decode(asked.ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_words_that_a_template_puts_around_an_answer_are_not_taken_for_the_answer() -> None:
    """The header names a channel called final, and the answer is that word."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user {{ m.content }}<|im_end|>{% else %}"
        "<|im_start|>assistant<|endoftext|>final {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    for answer in ("final", "", "assistant", "x"):
        encoded = with_template(template).encode(conversation(("user", "a"), ("assistant", answer)))
        assert tokenizer(CHATML).decode(learned(encoded)[0]) == f"<|endoftext|>final {answer}<|im_end|>"


def test_an_answer_ends_with_the_first_of_several_end_tokens() -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|><|endoftext|>\n{% endfor %}"
    encoded = with_template(template).encode(conversation(("user", "a"), ("assistant", "b")))
    assert [tokenizer(CHATML).decode(run) for run in learned(encoded)] == ["b<|im_end|>"]


def test_an_answer_without_an_end_token_cannot_be_trained_on() -> None:
    with pytest.raises(ConfigError) as error:
        with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").encode(TWO)
    assert str(error.value) == (
        "the chat template closes an answer with '\\n', which has no special token, so the model could not learn where to "
        "stop. End the assistant's turn with the tokenizer's end token"
    )


def test_a_template_that_is_not_jinja_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"the chat template is not Jinja \(.*, line 2\). Correct it"):
        with_template("{% for m in messages %}\n{{ m.content }").encode(TWO)


def test_a_model_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        with_template(None).encode(TWO)
    assert str(error.value) == (
        "the tokenizer  has no chat template, so a conversation cannot be written down. "
        "Set model.language.chat_template to a Jinja template"
    )


def test_a_conversation_that_the_template_refuses_is_the_samples_error() -> None:
    with pytest.raises(DataError) as error:
        processor(MISTRAL).encode(conversation(("user", "a"), ("user", "b"), ("assistant", "c")))
    assert str(error.value) == (
        "rows.jsonl line 3: the chat template refuses this conversation (Conversation roles must alternate "
        "user/assistant/user/assistant/...). Correct the order of its turns"
    )
    with pytest.raises(DataError, match="Only user and assistant roles are supported!"):
        processor(MISTRAL).encode(conversation(("user", "a"), ("system", "b"), ("assistant", "c")))


def test_a_template_that_leaves_a_medium_out_is_refused() -> None:
    drops_system = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    sample = Sample("7", (Turn("system", (PICTURE,)), Turn("user", (Text("a"),)), Turn("assistant", (Text("b"),))))
    with pytest.raises(DataError) as error:
        with_template(drops_system).encode(sample)
    assert str(error.value) == (
        "the chat template does not write every medium of this conversation down once. Put media into the user's turns"
    )


def test_a_template_that_writes_markers_itself_is_refused() -> None:
    template = "{% for m in messages %}<image>{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ConfigError, match="reads 1 tokens <image> in a prompt with 0 media"):
        with_template(template).encode(conversation(("user", "a"), ("assistant", "b")))


# ---------------------------------------------------------------- rows and batches


def three() -> list[Encoded]:
    made = processor(VICUNA)
    asked = [
        (Turn("user", (PICTURE, Text("What?"))), Turn("assistant", (Text("red"),))),
        (Turn("user", (Text("Hello"),)), Turn("assistant", (Text("yes no"),))),
        (Turn("user", (SOUND, CLIP, Text("Hm?"))), Turn("assistant", (Text("blue circle"),))),
    ]
    return [made.encode(Sample(str(i), turns)) for i, turns in enumerate(asked)]


def test_a_row_is_its_samples_end_to_end() -> None:
    samples = three()
    row = pack(samples)
    assert row.input_ids.tolist() == [[i for s in samples for i in s.ids]]
    assert row.input_ids.dtype == row.labels.dtype == row.position_ids.dtype == torch.int64
    assert row.position_ids.tolist() == [[i for s in samples for i in range(len(s.ids))]]
    assert row.labels.tolist() == [[i for s in samples for i in [-100, *s.labels[1:]]]]
    assert row.lengths == [len(s) for s in samples]
    assert row.ids == ["0", "1", "2"]
    assert row.num_targets() == sum(s.num_targets() for s in samples)
    assert row.pixel_values is not None
    assert row.pixel_values_videos is not None
    assert torch.equal(row.pixel_values, samples[0].images[0][None])
    assert row.pixel_values_videos.shape == (2, 3, 28, 28)


def test_a_first_token_that_is_learned_alone_is_not_learned_behind_another_sample() -> None:
    """With everything learned, nothing predicts the first token of a sample, least of all the sample before it."""
    made = processor(VICUNA)
    samples = [made.encode(conversation(("user", "a"), ("assistant", "b")), supervise="everything") for _ in range(2)]
    row = pack(samples)
    assert row.num_targets() == sum(len(s) - 1 for s in samples)
    assert row.labels[0, len(samples[0])] == -100


def test_shorter_sounds_are_padded_with_nothing_and_marked() -> None:
    row = pack(three())
    assert row.input_features is not None
    assert row.input_features_mask is not None
    lengths = [m.shape[1] for s in three() for m in features(s)]
    assert row.input_features_mask.sum(1).tolist() == lengths
    for i, mel in enumerate(m for s in three() for m in features(s)):
        assert torch.equal(row.input_features[i, :, : lengths[i]], mel)
        assert not row.input_features[i, :, lengths[i] :].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_asked_for(side: Any) -> None:
    samples = three()
    batch = pad(samples, 9, side)
    longest = max(len(s) for s in samples)
    for i, s in enumerate(samples):
        space = longest - len(s)
        for name, values, filler in (
            ("input_ids", s.ids, 9),
            ("labels", s.labels, -100),
            ("attention_mask", [1] * len(s), 0),
        ):
            expected = [filler] * space + values if side == "left" else values + [filler] * space
            assert batch[name][i].tolist() == expected


def test_long_texts_are_not_remembered_and_short_ones_are() -> None:
    tokens = processor(CHATML, pieces=True).tokens()  # which cannot be read word by word
    tokens._short.cache_clear()
    tokens.ids("x" * 10_000)
    assert tokens._short.cache_info().currsize == 0
    tokens.ids("short")
    tokens.ids("short")
    assert tokens._short.cache_info().hits == 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_an_answer_that_does_not_end_teaches_its_words_and_no_end(family: Family) -> None:
    """VITA's `end_tag`: the end token is read like the rest of the prompt, and only left out of what is learned."""
    closed = conversation(("user", "Is it?"), ("assistant", "yes"), ("user", "And now?"), ("assistant", "red"))
    made = processor(family)
    whole = made.encode(closed)
    *_, last = learned(whole)
    for open_turns in ((1,), (3,), (1, 3)):
        turns = [replace(turn, ended=i not in open_turns) for i, turn in enumerate(closed.turns)]
        encoded = made.encode(replace(closed, turns=tuple(turns)))
        assert encoded.ids == whole.ids
        answers = learned(encoded)
        for answer, i in zip(answers, (1, 3), strict=True):
            text = made.tokenizer.decode(answer).strip()
            assert (text == closed.turns[i].text()) == (i in open_turns)
    assert made.tokenizer.decode(last).strip() != "red"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("supervise", ["answers", "everything"])
def test_an_answer_that_is_not_learned_is_read_and_leaves_the_others_as_they_are(
    family: Family, supervise: Any
) -> None:
    """OpenAI's `weight: 0`, ms-swift's `loss: false`: the same tokens, without labels or a state."""
    talk = conversation(
        ("user", "Is it?"), ("assistant", "yes"), ("user", "And now?"), ("assistant", "red"), ("user", "So?"), ("assistant", "no")
    )  # fmt: skip
    made = processor(family)
    whole = made.encode(talk, supervise=supervise)
    plain = made.encode(talk)
    runs = learned_at(plain)
    assert len(runs) == 3
    for left_out in ((0,), (1,), (0, 2)):
        turns = [replace(turn, learned=(i - 1) / 2 not in left_out) for i, turn in enumerate(talk.turns)]
        encoded = made.encode(replace(talk, turns=tuple(turns)), supervise=supervise)
        gone = {at for number in left_out for at in runs[number]}
        assert encoded.ids == whole.ids
        assert encoded.labels == [IGNORE if i in gone else label for i, label in enumerate(whole.labels)]
        assert encoded.states == [state for i, state in enumerate(whole.states) if i not in left_out]


def learned_at(encoded: Encoded) -> list[list[int]]:
    """Positions of the labels, run by run."""
    known = itertools.groupby(range(len(encoded)), key=lambda i: encoded.labels[i] != IGNORE)
    return [list(run) for is_learned, run in known if is_learned]


def test_marks_stand_in_the_text_where_the_row_has_them() -> None:
    parts = (Text("Compare "), PICTURE, Text(" and "), PICTURE, Text(".\n"), SOUND)
    turns = (Turn("user", parts, verbatim=True), Turn("assistant", (Text("no"),)))
    made = processor(CHATML)
    text = made.tokenizer.decode(made.encode(Sample("7", turns), prompt_only=True).ids)
    image, sound = "<image>" * IMAGE_IDS, "<audio>" * SOUND_IDS
    assert text == f"<|im_start|>user\nCompare {image} and {image}.\n{sound}<|im_end|>\n<|im_start|>assistant\n"
    worded = without_media(Sample("7", (Turn("user", (Text("a "), replace(PICTURE, alt="dog"), Text("?")), True),)))
    assert worded.turns[0].text() == "a dog?" and worded.turns[0].verbatim


@pytest.mark.parametrize("spec", ["square", "tiles", "patches"])
def test_pictures_that_travel_as_bytes_become_the_same_bits(spec: str) -> None:
    """As when they are normalised at once, which NumPy does in double precision too, within 1e-6."""
    square = {"image_size_px": 28, "cell_px": 14, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    more = {"tiles": {"tiling": {"kind": "internvl", "max_tiles": 6}}, "patches": {"max_patches": 40}}
    vision = VisionSpec.model_validate({**square, **more.get(spec, {})})
    family = CHATML
    made = AvlmProcessor(tokenizer(family), MediaSpec(vision=vision).model_dump(mode="json"), family.template)
    rng = np.random.default_rng(0)
    seen = [Picture(rng.integers(0, 256, (30, 75, 3), dtype=np.uint8)) for _ in range(3)]
    film = MediaItem("video", decoded=Clip(tuple(seen), 1.5, None))
    items = (*(MediaItem("image", decoded=picture) for picture in seen), film)
    sample = Sample("1", (Turn("user", items), Turn("assistant", (Text("yes"),))))
    plain, later = made.encode(sample), made.encode(sample, pixels="bytes")
    assert (later.colours is None) == (spec == "patches")
    one, other = pack([plain, plain]), pack([later, later])
    for name in ("pixel_values", "pixel_values_videos"):
        assert torch.equal(getattr(one, name), getattr(other, name)) and getattr(other, name).dtype == torch.float32
    if later.colours is not None:
        assert all(picture.dtype == torch.uint8 for picture in [*later.images, *later.frames])
        mean, std = (np.array(values)[:, None, None] for values in later.colours)
        by_hand = (later.images[0].numpy() / 255 - mean) / std
        np.testing.assert_allclose(other.pixel_values[0].numpy(), by_hand, rtol=0, atol=1e-6)  # type: ignore[index]
        again = pack([later])
        assert torch.equal(again.pixel_values, plain_pixels(plain))  # what was read is not changed on the way


def plain_pixels(encoded: Encoded) -> torch.Tensor:
    return torch.stack(encoded.images)
