"""Media that go through an encoder one at a time: the same embeddings, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from avlm.config.io import build
from avlm.config.model import ModelConfig
from avlm.convert.compose import compose
from avlm.data.encode import pack
from avlm.errors import LayoutError
from avlm.models.features import Encode, EncoderPart, Medium
from avlm.samples import Row, Sample
from tests.conftest import LLAMA, TEMPLATE
from tests.families import AUDIO, VISION, WINDOWED


class Maker:
    """A store that has nothing and makes everything, and writes down what it was asked for."""

    def __init__(self, *parts: EncoderPart) -> None:
        self.parts = parts
        self.asked: list[tuple[EncoderPart, Medium]] = []
        self.made: list[Tensor] = []

    def keeps(self, part: EncoderPart) -> bool:
        return part in self.parts

    def recall(self, part: EncoderPart, media: Sequence[Medium], encode: Encode) -> list[Tensor]:
        self.asked += [(part, medium) for medium in media]
        made = [encode(medium) for medium in media]
        self.made += made
        return made


def composed(**parts: Any) -> Any:
    language = {"random": LLAMA, "chat_template": TEMPLATE, "vocabulary": 400}
    texts = [f"What is number {i}? red blue green" for i in range(30)]
    return compose(build(ModelConfig, {"language": language, **parts}), seed=0, texts=texts)


def seen(name: str, **settings: Any) -> Any:
    size = {"image_size_px": 64} if VISION[name]["model_type"] in ("bit", "convnext") else {}
    return composed(vision={"encoder": {"random": VISION[name]}, **size, **settings})


def heard(name: str, **settings: Any) -> Any:
    length = {"length": "window"} if name in WINDOWED else {}
    connector = {"kind": "mlp", "stack": 4}
    return composed(audio={"encoder": {"random": AUDIO[name]}, "connector": connector, **length, **settings})


def features(model: Any, row: Row, store: Maker | None) -> dict[str, Tensor]:
    """What the connectors make of a row, by kind."""
    model.eval()
    model.model.features = store
    inputs = {name: value for name, value in row.inputs().items() if name not in ("position_ids", "row_lengths")}
    with torch.no_grad():
        found: dict[str, Tensor] = model.model.embed(**inputs)[1]
    model.model.features = None
    return found


def same_in_any_company(made: Any, samples: list[Sample], *parts: EncoderPart) -> None:
    """Alone as in a row to 1e-5, and alone to the bit whatever else is in the row."""
    encoded = [made.processor.encode(sample) for sample in samples]
    row = pack(encoded)
    store = Maker(*parts)
    together, one_by_one = features(made.model, row, None), features(made.model, row, store)
    assert together.keys() == one_by_one.keys() != set()
    for kind, tokens in together.items():
        scale = float(tokens.abs().max())
        torch.testing.assert_close(one_by_one[kind], tokens, rtol=1e-4, atol=1e-4 * scale)
    again = Maker(*parts)
    features(made.model, pack(encoded[::-1]), again)
    features(made.model, pack(encoded[:1]), again)
    first, then = _by_medium(store), _by_medium(again)
    assert first.keys() == then.keys() and len(first) == len(store.asked)
    assert all(torch.equal(embeddings, then[medium]) for medium, embeddings in first.items())


def _by_medium(store: Maker) -> dict[tuple[Any, ...], Tensor]:
    """What was made of each medium; one that comes again must give the same bits."""
    found: dict[tuple[Any, ...], Tensor] = {}
    for (part, medium), made in zip(store.asked, store.made, strict=True):
        key = (part, *medium.facts, *medium.values.shape, medium.values.contiguous().numpy().tobytes())
        assert torch.equal(found.setdefault(key, made), made)
    return found


@pytest.mark.parametrize("name", VISION)
def test_pictures_one_by_one(name: str, make_sample: Callable[..., Sample]) -> None:
    made = seen(name)
    samples = [make_sample("image", seed=i) for i in range(3)]
    same_in_any_company(made, [*samples, make_sample("video", seed=5)], "vision")


TILINGS = [{"kind": "anyres", "pinpoints": [[28, 56], [56, 28], [56, 56]]}, {"kind": "internvl", "max_tiles": 4}]


@pytest.mark.parametrize("tiling", TILINGS, ids=["anyres", "internvl"])
def test_tiles_one_by_one(tiling: dict[str, Any], make_sample: Callable[..., Sample]) -> None:
    made = seen("CLIP", tiling=tiling)
    same_in_any_company(made, [make_sample("image", "image", seed=i) for i in range(2)], "vision")


@pytest.mark.parametrize("name", AUDIO)
def test_sounds_one_by_one(name: str, make_sample: Callable[..., Sample]) -> None:
    samples = [make_sample("audio", seed=i, seconds=0.4 + 0.07 * i) for i in range(3)]
    same_in_any_company(heard(name), samples, "audio")


def test_two_encoders_of_one_sound(make_sample: Callable[..., Sample]) -> None:
    made = heard("Whisper", beside={"random": AUDIO["BEATs"]})
    samples = [make_sample("audio", seed=i, seconds=0.4 + 0.07 * i) for i in range(3)]
    same_in_any_company(made, samples, "audio", "audio_beside")
    store = Maker("audio_beside")
    features(made.model, pack([made.processor.encode(sample) for sample in samples]), store)
    assert [part for part, _ in store.asked] == ["audio_beside"] * 3


def test_a_wrong_mask_is_told_of_the_clip_that_has_it(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    made = make_model("audio")
    row = pack([made.processor.encode(make_sample("audio", seed=i)) for i in range(2)])
    assert row.input_features_mask is not None
    row.input_features_mask[1] = ~row.input_features_mask[1]
    row.input_features_mask[1, -3:] = True
    for store in (None, Maker("audio")):
        with pytest.raises(LayoutError, match="clip 1 has a mask"):
            features(made.model, row, store)
