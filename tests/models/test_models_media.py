"""A row's media apart from the row: encoded in any company, they are what the model makes of them itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from avlm.data.encode import pack
from avlm.layout import work
from avlm.models.features import Encode, EncoderPart, Medium
from avlm.models.media import embeddings, positions_of, row_media, work_by_place
from avlm.samples import Row, Sample
from tests.families import AUDIO, VISION
from tests.models.test_one_by_one import TILINGS, heard, seen


class Given:
    """A store that has exactly what was made before, in order."""

    def __init__(self, made: dict[EncoderPart, list[Tensor]]) -> None:
        self.made = made

    def keeps(self, part: EncoderPart) -> bool:
        return True

    def recall(self, part: EncoderPart, media: Sequence[Medium], encode: Encode) -> list[Tensor]:
        return [self.made[part].pop(0) for _ in media]


def embedded(model: Any, row: Row) -> dict[str, Tensor]:
    inputs = {name: value for name, value in row.inputs().items() if name not in ("position_ids", "row_lengths")}
    found: dict[str, Tensor] = model.model.embed(**inputs)[1]
    return found


def same_apart(made: Any, rows: list[Row]) -> None:
    """Media of all rows end to end through their encoders, and back to their rows."""
    model = made.model.eval()
    with torch.no_grad():
        expected = [embedded(model, row) for row in rows]
        by_row = [row_media(model.model, row) for row in rows]
        together = {part: [medium for media in by_row for medium in media[part]] for part in by_row[0]}
        # the last one first, so that whatever is padded is padded to another one's length
        all_made = {p: embeddings(model.model, p, media[::-1])[::-1] for p, media in together.items() if media}
        store = Given(all_made)
        model.model.features = store
        found = [embedded(model, row) for row in rows]
        model.model.features = None
    assert not any(store.made.values()), "every embedding was asked for"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for kind, tokens in theirs.items():
            torch.testing.assert_close(ours[kind], tokens, rtol=1e-4, atol=1e-4 * float(tokens.abs().max()))


def row_of(made: Any, *samples: Sample) -> Row:
    return pack([made.processor.encode(sample) for sample in samples])


@pytest.mark.parametrize("name", VISION)
def test_pictures_and_frames(name: str, make_sample: Callable[..., Sample]) -> None:
    made = seen(name)
    rows = [row_of(made, make_sample("image", seed=0), make_sample("video", seed=5)), row_of(made, make_sample())]
    same_apart(made, [*rows, row_of(made, make_sample("image", "image", seed=2))])


@pytest.mark.parametrize("tiling", TILINGS, ids=["anyres", "internvl"])
def test_tiles(tiling: dict[str, Any], make_sample: Callable[..., Sample]) -> None:
    made = seen("CLIP", tiling=tiling)
    same_apart(made, [row_of(made, make_sample("image", "image", seed=i)) for i in range(2)])


@pytest.mark.parametrize("name", AUDIO)
def test_sounds(name: str, make_sample: Callable[..., Sample]) -> None:
    made = heard(name)
    samples = [make_sample("audio", seed=i, seconds=0.4 + 0.07 * i) for i in range(4)]
    same_apart(made, [row_of(made, *samples[:3]), row_of(made, samples[3])])


def test_two_encoders_of_one_sound(make_sample: Callable[..., Sample]) -> None:
    made = heard("Whisper", beside={"random": AUDIO["BEATs"]})
    same_apart(made, [row_of(made, make_sample("audio", seed=i, seconds=0.4 + 0.2 * i)) for i in range(2)])


def test_work_is_that_of_all_weights_at_all_places_and_thrice_where_they_learn(
    make_sample: Callable[..., Sample],
) -> None:
    made = seen("CLIP")
    inner = made.model.model
    medium = row_media(inner, row_of(made, make_sample("image")))["vision"][0]
    (state,) = embeddings(inner, "vision", [medium])
    weights = sum(p.numel() for p in inner.vision_tower.parameters())
    assert positions_of(inner, "vision", medium) == work(len(state))
    inner.requires_grad_(False)
    assert work_by_place(inner, "vision") == weights
    inner.vision_tower.requires_grad_(True)
    assert work_by_place(inner, "vision") == 3 * weights
    assert work_by_place(inner, "audio") == 0
