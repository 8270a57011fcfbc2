"""Tokens of a sample inside a page: what each stands for, whether it is learned, and what the encoders really see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from avlm.config.media import MediaSpec
from avlm.data.media.pictures import PreparedImage, in_tiles
from avlm.data.media.reader import Prepared, PreparedAudio, PreparedVideo
from avlm.data.processor import AvlmProcessor
from avlm.data.showing.media import TILE_PX, painted, picture, strip
from avlm.data.showing.page import esc
from avlm.samples import IGNORE, Encoded, Heard

MOST_TOKENS = 3000
"""Runs of tokens that are shown of one sample."""
MOST_TILES = 12


def counts_of(encoded: Encoded) -> dict[str, int]:
    """Tokens in all, of each kind of medium, and those that are learned."""
    found = {"tokens": len(encoded.ids)}
    for kind in ("image", "audio", "video"):
        count = sum(place.count(kind) for place in encoded.places)
        if count:
            found[kind] = count
    found["learned"] = encoded.num_targets()
    return found


def tokens_html(encoded: Encoded, processor: AvlmProcessor) -> str:
    """Every token as it is read; those of a medium that follow each other as one."""
    kinds = {number: kind for kind, number in processor.tokens().placeholders.items()}
    parts = []
    for runs, (kind, learned, ids) in enumerate(_runs(encoded, kinds)):
        if runs == MOST_TOKENS:
            parts.append(f"<small>and more: {len(encoded.ids):,} in all</small>")
            break
        label = "learned" if learned else "given"
        if kind:
            parts.append(
                f'<span class="tok m {kind} {label}" title="{kind}: {len(ids)} tokens">{kind} {len(ids)}</span>'
            )
            continue
        text = processor.tokenizer.decode(ids)
        parts.append(f'<span class="tok {label}" title="token {ids[0]}, {label}">{_visible(str(text))}</span>')
    return f'<div class="tokens" dir="ltr">{"".join(parts)}</div>'


def _runs(encoded: Encoded, kinds: dict[int, str]) -> Iterator[tuple[str, bool, list[int]]]:
    """Kind of medium (or none), whether it is learned, and the ids: one of text, any number of a medium."""
    pairs = zip(encoded.ids, encoded.labels, strict=True)
    for kind, run in itertools.groupby(pairs, key=lambda pair: kinds.get(pair[0], "")):
        members = list(run)
        if kind:
            yield kind, False, [token for token, _ in members]
        else:
            for token, label in members:
                yield "", label != IGNORE, [token]


def _visible(text: str) -> str:
    """Spaces and line breaks that can be seen."""
    shown = esc(text.replace("\n", "\u23ce\n").replace("\t", "\u21e5"))
    return shown if shown.strip() else shown.replace(" ", "\u00b7")


def seen_html(prepared: Prepared, spec: MediaSpec, tokens: int) -> str:
    """What an encoder gets of a medium: tiles as they are cut, frames, or features of sound."""
    if isinstance(prepared, PreparedImage):
        assert spec.vision is not None
        tiles = [tile.permute(1, 2, 0).numpy() for tile in in_tiles(prepared, spec.vision)]
        high, wide = tiles[0].shape[:2]
        what = f"{_many(len(tiles), 'picture')} of {wide} \u00d7 {high} px"
        return _details(f"as the encoder sees it: {what}, {tokens} tokens", strip(tiles[:MOST_TILES], [], TILE_PX))
    if isinstance(prepared, PreparedVideo):
        frames = [frame.permute(1, 2, 0).numpy() for frame in prepared.frames]
        what = f"{_many(len(frames), 'frame')} and {_many(len(prepared.sound), 'chunk')} of sound"
        shown = strip(frames[:MOST_TILES], [], TILE_PX) if frames else ""
        return _details(f"as the encoders take it: {what}, {tokens} tokens", shown + _features(prepared.sound))
    assert isinstance(prepared, PreparedAudio)
    what = f"{_many(len(prepared.sound), 'chunk')} of features"
    return _details(f"as the encoder hears it: {what}, {tokens} tokens", _features(prepared.sound))


def _features(sound: Sequence[Heard]) -> str:
    shown = [feature_picture(chunk.features[:, : max(1, chunk.frames)]) for chunk in sound[:4]]
    images = [picture(pixels, 10_000, "features: time to the right, bins upwards") for pixels in shown]
    return "".join(
        image.replace(' class="pixels"', "", 1).replace("<img", '<img class="spectrogram"', 1) for image in images
    )


def feature_picture(features: Tensor) -> np.ndarray:
    """float [bins, frames] as a picture of at most 480 columns; samples of a wave as its outline."""
    values = features.float().numpy()
    if values.shape[0] == 1:
        values = _outline(values[0])
    elif values.shape[1] > 480:
        edges = np.linspace(0, values.shape[1], 481).astype(int)
        values = np.stack([values[:, a:b].mean(1) for a, b in itertools.pairwise(edges)], 1)
    low, high = float(values.min()), float(values.max())
    return painted((values[::-1] - low) / max(high - low, 1e-6))


def _outline(wave: np.ndarray) -> np.ndarray:
    parts = [float(np.abs(part).max()) for part in np.array_split(wave, min(480, len(wave)))]
    rows = np.abs(np.linspace(-1, 1, 80))[:, None]
    outline: np.ndarray = (rows <= np.array(parts) / max(*parts, 1e-6)).astype(np.float32)
    return outline


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{esc(summary)}</summary>{body}</details>"
