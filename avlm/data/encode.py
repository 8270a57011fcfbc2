"""From a sample to tokens, places and labels; from several to a row or a padded batch.

Placeholders are written here, one id for each media token, with counts from
`layout`. What is learned follows from the pieces that `text` renders.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avlm.config.media import AudioSpec, MediaSpec, VisionSpec, Wrap
from avlm.config.stage import Augment
from avlm.data.media.augment import augment_features, augment_image
from avlm.data.media.features import levelled
from avlm.data.media.pictures import PreparedImage, changed, in_patches, in_tiles, normalise, normalise_into
from avlm.data.media.reader import Prepared, PreparedVideo
from avlm.data.text.pieces import Piece
from avlm.data.text.templates import pieces, wrap_tokens
from avlm.data.text.tokens import Tokens
from avlm.data.text.turns import state_classes
from avlm.errors import ConfigError, DataError, LayoutError, MediaError
from avlm.layout import Facts, ImageFacts, Load, Segment, load, segments
from avlm.samples import IGNORE, Colours, Counts, Encoded, Heard, Place, Row, Sample

Supervise = Literal["answers", "everything", "words"]
Pixels = Literal["normalised", "bytes"]
"""Whether pictures and frames are as the encoder takes them, or still a byte for each colour, a quarter of that to hand
on; then they are normalised where they are put side by side."""


def encode(
    sample: Sample,
    tokens: Tokens,
    media: MediaSpec,
    prepared: Sequence[Prepared],
    *,
    supervise: Supervise = "answers",
    prompt_only: bool = False,
    augment: tuple[Augment, np.random.Generator] | None = None,
    pixels: Pixels = "normalised",
) -> Encoded:
    """Write a sample down for the model.

    Args:
        sample: The conversation.
        tokens: Tokenizer and template.
        media: How each medium is counted.
        prepared: The sample's media, in reading order.
        supervise: Learn the answers, every token of text, or nothing but what each medium shows or says.
        prompt_only: Stop where the model is to speak; nothing is learned.
        augment: Changes to make to the media, with their generator.
        pixels: How its pictures and frames are left.

    Returns:
        Ids with placeholders written out, labels, reserved places, and the tensors for the encoders.

    Raises:
        DataError: The conversation cannot be written down.
        MediaError: A medium does not fit the model.
    """
    facts = [item.facts for item in prepared]
    out = lay_out(sample, tokens, media, facts, supervise=supervise, prompt_only=prompt_only)
    add_tensors(out, prepared, media, augment, pixels)
    return out


def lay_out(
    sample: Sample,
    tokens: Tokens,
    media: MediaSpec,
    facts: Sequence[Facts],
    *,
    supervise: Supervise = "answers",
    prompt_only: bool = False,
) -> Encoded:
    """Write a sample down but for the tensors, from what is known of its media without decoding them; see `encode`.

    Args:
        facts: Of the sample's media, in reading order.
    """
    if supervise == "words":
        return _lay_out_words(sample, tokens, media, facts)
    reserved = wrap_tokens(media)
    written = pieces(sample, tokens.tokenizer, tokens.template, prompt_only=prompt_only, reserved=reserved)
    learned: Supervise | Literal["nothing"] = "nothing" if prompt_only else supervise
    return lay_out_pieces(sample, written, tokens, media, facts, supervise=learned)


def lay_out_pieces(
    sample: Sample,
    written: Sequence[Piece],
    tokens: Tokens,
    media: MediaSpec,
    facts: Sequence[Facts],
    *,
    supervise: Supervise | Literal["nothing"],
) -> Encoded:
    """Write a conversation down that has been rendered already; see `lay_out`."""
    out = Encoded(sample.id, [], [])
    answers = [turn for turn in sample.turns if turn.role == "assistant"]
    states = iter(zip(answers, state_classes(sample), strict=True))
    before = ""
    for is_answer, run in itertools.groupby(written, key=lambda piece: piece.answer):
        if not is_answer:
            before = _write_prompt(out, list(run), tokens, media, facts, sample, supervise, before)
            continue
        for piece in run:
            ids = tokens.after(before, piece.text)
            turn, state = next(states)
            if turn.learned:
                out.states.append((len(out.ids) - 1, state))  # the prompt is never empty: it has a role in it
            out.ids += ids
            out.labels += ids if turn.learned and supervise != "nothing" else [IGNORE] * len(ids)
            before = piece.text
    return out


def _lay_out_words(sample: Sample, tokens: Tokens, media: MediaSpec, facts: Sequence[Facts]) -> Encoded:
    """Media alone, each with what it shows or says."""
    out = Encoded(sample.id, [], [], words=[list(tokens.ids(text)) for text in shown(sample)])
    for number, item in enumerate(facts):
        runs = _place(out, number, item, media, sample, tokens)
        start = len(out.ids)
        out.ids += [tokens.placeholders[s.kind] for s in runs if s.kind != "text" for _ in range(s.count)]
        out.spans.append((start, len(out.ids)))
    out.labels = [IGNORE] * len(out.ids)
    return out


def shown(sample: Sample) -> list[str]:
    """What each medium shows or says: its `alt`, and where that is not known the first thing answered."""
    answer = next((turn.text() for turn in sample.turns if turn.role == "assistant" and turn.learned), "")
    return [item.alt or answer for item in sample.media()]


def _write_prompt(
    out: Encoded,
    prompt: Sequence[Piece],
    tokens: Tokens,
    media: MediaSpec,
    facts: Sequence[Facts],
    sample: Sample,
    supervise: Supervise | Literal["nothing"],
    before: str,
) -> str:
    """Append a stretch of prompt, each medium's placeholder written out as often as `layout` says; returns its text."""
    text = ""
    waiting: list[tuple[Segment, ...]] = []
    for piece in prompt:
        if piece.media is None:
            text += piece.text
            continue
        waiting.append(_place(out, piece.media, facts[piece.media], media, sample, tokens))
        text += tokens.stand_in
    place = tokens.stand_in_id
    ids = tokens.after(before, text)
    if ids.count(place) != len(waiting):
        raise ConfigError(
            f"the tokenizer reads {ids.count(place)} tokens {tokens.stand_in} in a prompt with {len(waiting)} "
            f"media. Make {tokens.stand_in} a special token of the tokenizer, with no place in the template"
        )

    def write(written: Sequence[int]) -> None:
        out.ids += written
        out.labels += written if supervise == "everything" else [IGNORE] * len(written)

    done = 0
    for runs in waiting:
        at = ids.index(place, done)
        write(ids[done:at])
        done, start = at + 1, len(out.ids)
        wrap = _wrap(runs, media)
        write([] if wrap is None else [tokens.token_id(wrap[0])])
        own = segment_ids(runs, tokens)
        out.ids += own
        out.labels += [IGNORE] * len(own)
        write([] if wrap is None else [tokens.token_id(wrap[1])])
        out.spans.append((start, len(out.ids)))
    write(ids[done:])
    return text


def _place(
    out: Encoded, number: int, facts: Facts, media: MediaSpec, sample: Sample, tokens: Tokens
) -> tuple[Segment, ...]:
    """Reserve the places of a medium that comes next."""
    runs = _segments(facts, media, sample, tokens)
    out.places.append(Place(sample.id, number, runs))
    if isinstance(facts, ImageFacts):
        out.tiles.append(load(facts, media).tiles)
    return runs


def segment_ids(runs: Sequence[Segment], tokens: Tokens) -> list[int]:
    """All ids of a medium: its placeholders, and its words between them."""
    found: list[int] = []
    for segment in runs:
        if segment.kind == "text":
            found += tokens.ids(segment.text)
        else:
            found += [tokens.placeholders[segment.kind]] * segment.count
    return found


def _wrap(runs: Sequence[Segment], media: MediaSpec) -> Wrap | None:
    """Tokens around one medium: those of pictures around whatever is seen, a video's sound included."""
    part = media.vision if any(s.kind in ("image", "video") for s in runs) else media.audio
    return None if part is None else part.wrap


def _segments(facts: Facts, media: MediaSpec, sample: Sample, tokens: Tokens) -> tuple[Segment, ...]:
    try:
        found = tuple(segments(facts, media))
    except LayoutError as error:
        raise MediaError(str(error), where=sample.where, sample_id=sample.id) from None
    for segment in found:
        if segment.kind != "text" and segment.kind not in tokens.placeholders:
            raise MediaError(
                f"a {segment.kind} has no place in the text, because the model's tokenizer has no token that stands "
                f"for it. Leave it out, or use a model that was composed for {segment.kind}",
                where=sample.where,
                sample_id=sample.id,
            )
    return found


def counted(encoded: Encoded, facts: Sequence[Facts], media: MediaSpec) -> Counts:
    """What a sample takes, its tensors aside.

    Args:
        facts: Of all media of the sample, those that were cut off included.
    """
    places = encoded.places if encoded.rejected is None else [*encoded.places, *encoded.rejected.places]
    loads = [load(facts[place.item], media) for place in places]
    whole = loads[0] if len(loads) == 1 else sum(loads, Load())
    return Counts(encoded.room(), encoded.num_targets(), whole, encoded.cut)


def add_tensors(
    out: Encoded,
    prepared: Sequence[Prepared],
    media: MediaSpec,
    augment: tuple[Augment, np.random.Generator] | None = None,
    pixels: Pixels = "normalised",
) -> None:
    """Pixels and sound features in the order in which their places are read."""
    vision = media.vision
    if pixels == "bytes" and vision is not None and vision.max_patches is None:
        out.colours = vision.mean, vision.std
    for place in out.places:
        item = prepared[place.item]
        if isinstance(item, PreparedImage):
            _add_image(out, item, vision, augment)
        elif isinstance(item, PreparedVideo) and place.count("video"):
            for frame in item.frames:
                frame = frame if augment is None else augment_image(frame, *augment)
                out.frames += _as_input(out, frame[None], vision)
        if not isinstance(item, PreparedImage) and item.sound and place.count("audio"):
            assert media.audio is not None
            out.sounds += [_changed(chunk, media.audio, augment) for chunk in item.sound]
            out.chunks.append(len(item.sound))


def _changed(chunk: Heard, spec: AudioSpec, augment: tuple[Augment, np.random.Generator] | None) -> Heard:
    """A chunk at the level that its encoders want, changed on the way as the stage wishes."""
    features = chunk.features if augment is None else augment_features(chunk.features, spec.features, *augment)
    beside = chunk.beside
    if beside is not None:
        assert spec.beside is not None
        beside = _changed(beside, spec.beside, augment)
    return Heard(levelled(features, spec), chunk.frames, beside)


def _add_image(
    out: Encoded, item: PreparedImage, spec: VisionSpec | None, augment: tuple[Augment, np.random.Generator] | None
) -> None:
    """A picture's tiles or patches, and its size where the layout depends on that."""
    assert spec is not None
    if augment is not None:
        item = changed(item, spec, lambda pixels: augment_image(pixels, *augment))
    out.images += _as_input(out, in_tiles(item, spec), spec)
    if spec.sized:
        out.image_sizes.append(item.facts.size_px)


def _as_input(out: Encoded, tiles: Tensor, spec: VisionSpec | None) -> list[Tensor]:
    """Squares, normalised or as they are, or the patches of them."""
    assert spec is not None
    if out.colours is not None:
        return list(tiles)
    if spec.max_patches is None:
        return list(normalise(tiles, spec))
    return [in_patches(tile, spec.cell_px) for tile in normalise(tiles, spec)]


def with_media_of(encoded: Encoded, other: Encoded) -> Encoded:
    """A sample that was laid out without tensors, with those of another one with the same media."""
    return replace(
        encoded,
        images=other.images,
        image_sizes=other.image_sizes,
        frames=other.frames,
        colours=other.colours,
        sounds=other.sounds,
        chunks=other.chunks,
    )


def only_last_answer(encoded: Encoded) -> Encoded:
    """A sample of which nothing but the last answer is learned."""
    begins = encoded.states[-1][0] + 1
    return replace(encoded, labels=[IGNORE] * begins + encoded.labels[begins:])


def up_to_last_word(encoded: Encoded) -> Encoded:
    """A sample without what stands behind the last token that is learned: an answer to go on with."""
    end = 1 + max(i for i, label in enumerate(encoded.labels) if label != IGNORE)
    return replace(encoded, ids=encoded.ids[:end], labels=encoded.labels[:end])


def cut(encoded: Encoded, capacity: int) -> Encoded:
    """The beginning of a sample that is longer than a row: what fits, up to the last token that is learned there.

    No medium is cut: one that does not fit whole goes with everything behind it. A teacher is cut to the same targets.

    Args:
        encoded: With its tensors, or without.
        capacity: Tokens that it may take of a row.

    Raises:
        DataError: Nothing that is learned fits.
    """
    if encoded.room() <= capacity:
        return encoded
    if encoded.rejected is not None:
        raise DataError(
            f"has a pair of answers that take {encoded.room()} tokens together, and a row holds {capacity}; a pair is "
            "compared whole. Raise the stage's row_tokens, or leave the row out",
            sample_id=encoded.id,
        )
    versions = [encoded] if encoded.teacher is None else [encoded, encoded.teacher]
    ends = [_learned_end(version, capacity) for version in versions]
    targets = min(_targets_before(version, end) for version, end in zip(versions, ends, strict=True))
    if not targets:
        raise DataError(
            f"has {encoded.room()} tokens, and nothing that is learned is within the first {capacity}, which a row "
            "holds. Raise the stage's row_tokens, or shorten what comes before its first answer",
            sample_id=encoded.id,
        )
    if encoded.teacher is not None:
        ends = [_end_of_target(version, targets) for version in versions]
    shorter, *teacher = [_beginning(version, end) for version, end in zip(versions, ends, strict=True)]
    shorter.teacher = teacher[0] if teacher else None
    shorter.cut = encoded.room() - shorter.room()
    return shorter


def _learned_end(encoded: Encoded, capacity: int) -> int:
    """How many tokens of a sample remain: what fits, without half a medium and without an end that teaches nothing."""
    end = min(capacity, len(encoded))
    end = next((start for start, stop in encoded.spans if start < end < stop), end)
    if encoded.words:  # learned beside the row, by media
        return end
    return next((i + 1 for i in reversed(range(1, end)) if encoded.labels[i] != IGNORE), 0)


def _targets_before(encoded: Encoded, end: int) -> int:
    if encoded.words:
        return sum(len(words) for words, (_, stop) in zip(encoded.words, encoded.spans, strict=True) if stop <= end)
    return sum(label != IGNORE for label in encoded.labels[1:end])


def _end_of_target(encoded: Encoded, number: int) -> int:
    """The position behind the target of this number, counted from 1."""
    learned = (i + 1 for i in range(1, len(encoded)) if encoded.labels[i] != IGNORE)
    return next(itertools.islice(learned, number - 1, None))


def _beginning(encoded: Encoded, end: int) -> Encoded:
    """The first tokens of a sample, with the media that are whole in them."""
    kept = sum(stop <= end for _, stop in encoded.spans)
    places = encoded.places[:kept]
    pictures = sum(place.count("image") > 0 for place in places)
    heard = encoded.chunks[: sum(place.count("audio") > 0 for place in places)]
    return replace(
        encoded,
        ids=encoded.ids[:end],
        labels=encoded.labels[:end],
        places=places,
        spans=encoded.spans[:kept],
        tiles=encoded.tiles[:pictures],
        images=encoded.images[: sum(encoded.tiles[:pictures])],
        image_sizes=encoded.image_sizes[:pictures],
        frames=encoded.frames[: sum(s.kind == "video" for place in places for s in place.segments)],
        sounds=encoded.sounds[: sum(heard)],
        chunks=heard,
        words=encoded.words[:kept],
        states=[(at, state) for at, state in encoded.states if at + 1 < end],
        teacher=None,
    )


def pack(samples: Sequence[Encoded]) -> Row:
    """Lay samples end to end; of a pair of answers the worse one behind the better."""
    samples = [version for s in samples for version in ((s,) if s.rejected is None else (s, s.rejected))]
    starts = itertools.accumulate((len(s) for s in samples), initial=0)
    teachers = [s.teacher for s in samples if s.teacher is not None]
    return Row(
        input_ids=_end_to_end([s.ids for s in samples]),
        labels=_end_to_end([[IGNORE, *s.labels[1:]] for s in samples]),
        position_ids=torch.cat([torch.arange(len(s)) for s in samples])[None],
        lengths=[len(s) for s in samples],
        ids=[s.id for s in samples],
        places=[p for s in samples for p in s.places],
        words=[w for s in samples for w in s.words],
        chunks=[c for s in samples for c in s.chunks],
        states=[(at + start, state) for s, start in zip(samples, starts, strict=False) for at, state in s.states],
        teacher=pack(teachers) if teachers else None,
        **_stacked(samples),
    )


def _end_to_end(lists: Sequence[list[int]]) -> Tensor:
    """int64 [1, all of them]. NumPy reads lists several times as fast as torch does."""
    return torch.from_numpy(np.concatenate([np.array(one, np.int64) for one in lists]))[None]


def pad(
    samples: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "left", width: int = 0
) -> dict[str, Tensor]:
    """Lay samples side by side, padded to the longest, or to a width: a batch for `generate` or for a Trainer."""
    longest = max(width, *(len(s) for s in samples))
    ids = torch.full((len(samples), longest), pad_id)
    mask = torch.zeros((len(samples), longest), dtype=torch.long)
    labels = torch.full((len(samples), longest), IGNORE)
    for i, s in enumerate(samples):
        at = slice(longest - len(s), longest) if side == "left" else slice(0, len(s))
        ids[i, at], mask[i, at], labels[i, at] = torch.tensor(s.ids), 1, torch.tensor(s.labels)
    tensors = {k: v for k, v in _stacked(samples).items() if v is not None}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **tensors}


def _stacked(samples: Sequence[Encoded]) -> dict[str, Any]:
    colours = samples[0].colours
    assert all(s.colours == colours for s in samples), "samples of one row are of one model"
    images = [t for s in samples for t in s.images]
    frames = [t for s in samples for t in s.frames]
    sounds = [chunk for s in samples for chunk in s.sounds]
    sizes = [size for s in samples for size in s.image_sizes]
    return {
        "pixel_values": _side_by_side(images, colours),
        "image_sizes": torch.tensor(sizes) if sizes else None,
        "pixel_values_videos": _side_by_side(frames, colours),
        **_padded(sounds, "input_features"),
        **_padded([chunk.beside for chunk in sounds if chunk.beside is not None], "input_features_beside"),
    }


def _side_by_side(pictures: Sequence[Tensor], colours: Colours | None) -> Tensor | None:
    """Squares of one size, or lists of patches padded with zeros to the longest.

    Args:
        colours: Of pictures that are not normalised yet.
    """
    if not pictures:
        return None
    if colours is not None:
        found = torch.empty(len(pictures), *pictures[0].shape, dtype=torch.float32)
        for picture, place in zip(pictures, found, strict=True):  # one by one, while it is in the processor's cache
            normalise_into(place.numpy(), picture.numpy(), *colours)
        return found
    return pad_sequence(list(pictures), batch_first=True) if pictures[0].ndim == 2 else torch.stack(list(pictures))


def _padded(sounds: Sequence[Heard], name: str) -> dict[str, Tensor | None]:
    """Chunks of sound side by side, and a mask of the frames that are heard."""
    if not sounds:
        return {name: None, f"{name}_mask": None}
    padded = pad_sequence([chunk.features.T for chunk in sounds], batch_first=True).transpose(1, 2).contiguous()
    heard = torch.tensor([chunk.frames for chunk in sounds])
    return {name: padded, f"{name}_mask": torch.arange(padded.shape[2]) < heard[:, None]}
