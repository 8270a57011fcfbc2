"""Every layout of a video goes through a model as it was written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from avlm.data.encode import pack
from avlm.data.processor import AvlmProcessor
from avlm.samples import Sample

ORDERS = ["interleaved", "video_audio", "audio_video", "video", "audio"]


@pytest.mark.parametrize("clock", [False, True])
@torch.no_grad()
def test_packed_videos_give_the_numbers_of_each_alone_in_every_order(
    clock: bool, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    model.eval()
    losses = []
    for order in ORDERS:
        video = {"fps": 1, "order": order, "clock": clock}
        own = AvlmProcessor(processor.tokenizer, {**processor.media, "video": video}, processor.chat_template)
        samples = [
            make_sample("video", "image", seed=1, seconds=0.5),
            make_sample("audio", "video", seed=2, seconds=0.9),
        ]
        encoded = [own.encode(sample) for sample in samples]
        row = pack(encoded)
        media = ("pixel_values", "pixel_values_videos", "input_features", "input_features_mask")
        inputs = {name: getattr(row, name) for name in media if getattr(row, name) is not None}
        packed = model(
            row.input_ids, position_ids=row.position_ids, row_lengths=row.lengths, places=row.places, **inputs
        )
        alone = [model(**{k: v for k, v in own.collate([one]).items() if k != "labels"}).logits[0] for one in encoded]
        torch.testing.assert_close(packed.logits[0], torch.cat(alone), rtol=1e-5, atol=1e-5)
        losses.append(alone[0][-1].tolist())
    assert all(a != b for i, a in enumerate(losses) for b in losses[:i])  # the order matters to the model
