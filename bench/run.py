"""Speed, side by side with a peer in one run, as ratios: ``make bench``.

Each line is what avlm does and what transformers does for the same input; the ratio is transformers' time by avlm's.
Timings alternate between the two, and the median of each is taken, so that a busy machine disturbs both alike.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import plan
import torch
from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM, WhisperFeatureExtractor

from avlm.config.media import AudioSpec, VisionSpec
from avlm.data.features import log_mel
from avlm.data.pictures import normalise, prepare_image
from avlm.models import attention
from avlm.samples import Picture

ROUNDS = 15


def compare(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of both, measured in turns."""
    ours(), theirs()
    mine, peer = [], []
    for _ in range(ROUNDS):
        for call, times in ((ours, mine), (theirs, peer)):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return statistics.median(mine), statistics.median(peer)


def images() -> tuple[float, float]:
    """A 640 x 480 picture to CLIP-336's input."""
    spec = VisionSpec(image_size_px=336, cell_px=14)
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    processor = CLIPImageProcessor(size={"height": 336, "width": 336}, do_center_crop=False)
    picture = Picture(pixels)
    return compare(
        lambda: normalise(prepare_image(picture, spec), spec), lambda: processor(pixels, return_tensors="pt")
    )


def sounds(seconds: float, window: bool) -> tuple[float, float]:
    """Sound to Whisper's log-mel: at its own length, or in the full window."""
    wave = np.random.default_rng(0).standard_normal(int(16_000 * seconds)).astype(np.float32)
    spec = AudioSpec(window_frames=3000 if window else None)
    extractor = WhisperFeatureExtractor()
    padding = "max_length" if window else "longest"
    return compare(
        lambda: log_mel(wave, spec),
        lambda: extractor(wave, sampling_rate=16_000, padding=padding, return_tensors="pt"),
    )


def rows() -> tuple[float, float]:
    """Forward and backward of a small Llama over samples of uneven length: one packed row against a padded batch."""
    torch.manual_seed(0)
    attention.register()
    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000
    )
    model = LlamaForCausalLM(config)
    lengths = [int(n) for n in np.random.default_rng(0).lognormal(4, 0.8, 16).clip(8, 512)]
    longest = max(lengths)
    samples = [torch.randint(0, 1000, (n,)) for n in lengths]
    row, positions = torch.cat(samples)[None], torch.cat([torch.arange(n) for n in lengths])[None]
    batch = torch.stack([torch.nn.functional.pad(s, (0, longest - len(s))) for s in samples])
    mask = torch.stack([(torch.arange(longest) < n).long() for n in lengths])

    def packed() -> None:
        model.set_attn_implementation(attention.NAME)
        kwargs = attention.packed_kwargs(lengths, torch.device("cpu"))
        blank = torch.zeros(1, 1, 1, 1)
        model(
            input_ids=row, position_ids=positions, attention_mask=blank, use_cache=False, **kwargs
        ).logits.sum().backward()

    def padded() -> None:
        model.set_attn_implementation("sdpa")
        model(input_ids=batch, attention_mask=mask, use_cache=False).logits.sum().backward()

    return compare(packed, padded)


def main() -> None:
    """Print the table."""
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'what':44} {'avlm ms':>9} {'transformers ms':>16} {'ratio':>6}")
    cases: list[tuple[str, Callable[[], tuple[float, float]]]] = [
        ("picture 640x480 to CLIP-336", images),
        ("log-mel of 2 s at its own length", lambda: sounds(2, window=False)),
        ("log-mel of 30 s, full window", lambda: sounds(30, window=True)),
        ("training step, 16 uneven samples", rows),
    ]
    for name, case in cases:
        ours, theirs = case()
        print(f"{name:44} {1000 * ours:9.2f} {1000 * theirs:16.2f} {theirs / ours:6.2f}")
    print()
    plan.main()


if __name__ == "__main__":
    main()
