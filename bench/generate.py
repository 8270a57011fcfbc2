"""Answers: tokens a second beside transformers' `generate` on the same weights, and the second question's first token.

The models are made on the spot, in float32: the shape of the demo's (four layers of width 128 and few tokens to choose
from), where a step is all calls, and a larger one, where reading the weights is most of it. Peers are the
whole model's `generate`, as transformers gives it to any model of its kind, and the language model's own, which is
handed the embeddings of the prompt and has nothing else to do. Both sides say the same tokens, greedily, with no end.
An answer is timed as a whole, prompt and encoders included, and behind its first token, which is decoding alone.
Beside decoding stands the least that one token can cost: reading every matrix of the language model once. The peer's
time for a token by that is the greatest ratio that anybody can reach who computes in these weights.

Eight prompts are questions about a picture, a sound, both, or nothing, of different lengths; transformers gets them
padded side by side, as its documentation has it. The first token of a question about a picture is timed from the
picture's file to the token, decoding included; then another question about the same picture is asked.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Case, Figures, Line, Table, judged, timed
from material import photo
from PIL import Image as PILImage
from torch import Tensor
from transformers.generation import BaseStreamer

from avlm.config.io import build
from avlm.config.model import ModelConfig
from avlm.convert.compose import Composed, compose
from avlm.inference.engine import Engine
from avlm.inference.sampling import Sampling
from avlm.samples import Encoded, MediaItem, Picture, Sample, Sound, Text, Turn

TOKENS = 64
ROUNDS = 5
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
LANGUAGES: dict[str, dict[str, Any]] = {
    f"{layers} layers of {width}": {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    for layers, width, inner, heads in ((4, 128, 384, 4), (8, 512, 1376, 8))
}
SIGHT = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14, "projection_dim": 64}
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
HEARING = {
    "model_type": "whisper", "d_model": 96, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 192,
    "num_mel_bins": 80, "max_source_positions": 1500,
}  # fmt: skip


def made(language: dict[str, Any]) -> Composed:
    """A model that sees and hears, with weights drawn at random."""
    llama = {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": True, **language}
    config = {
        "language": {"random": llama, "chat_template": TEMPLATE, "vocabulary": 600},
        "vision": {"encoder": {"random": {**SIGHT, **SMALL}}},
        "audio": {"encoder": {"random": HEARING}, "connector": {"kind": "mlp", "stack": 4}},
    }
    texts = [f"What is number {i}, and what do you hear? It is red, blue, or green." for i in range(50)]
    found = compose(build(ModelConfig, config), seed=0, texts=texts)
    found.model.eval()
    found.model.generation_config.eos_token_id = None
    found.processor.tokenizer.eos_token = None  # nobody ends before the others
    return found


def question(number: int) -> Sample:
    """One of the mixed questions."""
    rng = np.random.default_rng(number)
    parts: list[Any] = []
    if number % 4 in (0, 2):
        parts.append(MediaItem("image", decoded=Picture(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8))))
    if number % 4 in (1, 2):
        wave = 0.1 * rng.standard_normal(16_000 * (1 + number % 3)).astype(np.float32)
        parts.append(MediaItem("audio", decoded=Sound(wave, 16_000)))
    return Sample(str(number), (Turn("user", (*parts, Text("What is number 7? " + "It is red. " * number))),))


class Watch(BaseStreamer):  # type: ignore[misc]
    """When tokens came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, and then with each token."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""

    def behind_first(self) -> float:
        """Seconds from the first token of an answer to its last one."""
        return self.at[-1] - self.at[-TOKENS]


def answer(composed: Composed, prompts: list[Encoded], watch: Watch) -> list[list[int]]:
    """Ours: through the engine, as a conversation or the server, with nothing remembered."""
    engine = Engine(*composed, slots=len(prompts), kept_bytes=0)
    asked = [engine.join(engine.prompts.of_encoded(prompt), Sampling(max_tokens=TOKENS)) for prompt in prompts]
    while engine.busy:
        engine.step()
        watch.at.append(time.perf_counter())
    return [request.tokens for request in asked]


def whole(composed: Composed, prompts: list[Encoded], watch: Watch) -> list[list[int]]:
    """transformers' generate on the whole model."""
    batch = composed.processor.collate(prompts)
    del batch["labels"]
    never = composed.model.placeholder_ids()
    ids = composed.model.generate(
        **batch, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, suppress_tokens=never, streamer=watch
    )
    return ids[:, batch["input_ids"].shape[1] :].tolist()


def alone(composed: Composed, prompts: list[Encoded], watch: Watch) -> list[list[int]]:
    """transformers' generate on the language model, which is handed embeddings."""
    batch = composed.processor.collate(prompts)
    mask = batch.pop("attention_mask")
    del batch["labels"]
    with torch.inference_mode():
        embeds = composed.model.model.embed(**batch)[0]
        ids = composed.model.language_model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0,
            eos_token_id=None, suppress_tokens=composed.model.placeholder_ids(), streamer=watch,
        )  # fmt: skip
    return ids.tolist()


PEERS = {"generate": whole, "generate of the language model": alone}
Side = Callable[[Composed, list[Encoded], Watch], list[list[int]]]


def least_s(composed: Composed) -> float:
    """Seconds that it takes to read every matrix of the language model once: summed, or times a vector by torch or by
    NumPy, whichever is fastest; the best of many rounds."""
    weights = [p.detach() for p in composed.model.language_model.parameters() if p.ndim == 2]
    vectors = {weight.shape[1]: torch.randn(weight.shape[1]) for weight in weights}
    arrays = {width: vector.numpy() for width, vector in vectors.items()}
    ways: tuple[Callable[[Tensor], Any], ...] = (
        lambda weight: weight.sum(),
        lambda weight: torch.mv(weight, vectors[weight.shape[1]]),
        lambda weight: weight.numpy() @ arrays[weight.shape[1]],
    )
    best = float("inf")
    with torch.inference_mode():
        for way in ways:
            for _ in range(50):
                began = time.perf_counter()
                for weight in weights:
                    way(weight)
                best = min(best, time.perf_counter() - began)
    return best


def speed(composed: Composed, name: str, count: int) -> Case:
    """So many answers at once, ours and theirs."""
    prompts = [composed.processor.encode(question(i), prompt_only=True) for i in range(count)]
    sides: dict[str, Side] = {"": answer, **PEERS}

    def same() -> None:
        found = [side(composed, prompts, Watch()) for side in sides.values()]
        assert all(one == found[0] for one in found), "the sides say different tokens"

    ours, *peers = (lambda side=side: side(composed, prompts, Watch()) for side in sides.values())  # type: ignore[misc]
    what = "one answer" if count == 1 else f"{count} answers, media mixed"
    return Case(
        f"{name}: {what}",
        ours,
        dict(zip(PEERS, peers, strict=True)),
        rounds=ROUNDS,
        bar=1.5,
        check=same,
        unbarred=("generate of the language model",),
    )


def decoding(composed: Composed, name: str) -> Case:
    """One answer behind its first token."""
    prompts = [composed.processor.encode(question(0), prompt_only=True)]

    def took(side: Side) -> float:
        watch = Watch()
        side(composed, prompts, watch)
        return watch.behind_first()

    return Case(
        f"{name}: one answer behind its first token",
        lambda: took(answer),
        {peer: (lambda side=side: took(side)) for peer, side in PEERS.items()},  # type: ignore[misc]
        rounds=ROUNDS,
        bar=1.5,
        unbarred=("generate of the language model",),
        tells=True,
    )


def first_tokens(composed: Composed, folder: Path) -> list[float]:
    """Seconds to the first token of a question about a picture, and of another about the same one."""
    path = folder / "picture.jpg"
    pixels = np.asarray(photo(640, 480))
    engine = Engine(*composed)
    found: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 2):
        noise = np.random.default_rng(turn).integers(0, 30, pixels.shape, dtype=np.uint8)
        PILImage.fromarray(pixels // 2 + noise).save(path)  # a picture that was never seen before
        for times, text in zip(found, ("What is number 7?", "And what do you hear, red or blue?"), strict=True):
            began = time.perf_counter()
            request = engine.join(
                Sample("0", (Turn("user", (MediaItem("image", path), Text(text))),)), Sampling(max_tokens=1)
            )
            while request.finish is None:
                engine.step()
            times.append(time.perf_counter() - began)
    return [min(times[2:]) for times in found]


def limits(composed: Composed, name: str, lines: list[Line]) -> list[list[str]]:
    """How near decoding is to the least that it can cost, and the ratio to each peer that this allows."""
    read_s = least_s(composed)
    size = sum(p.numel() for p in composed.model.language_model.parameters()) * 4 / 1e6
    rows = []
    for line in lines:
        ours_s, peer_s = (seconds / (TOKENS - 1) for seconds in (line.ours, line.peer))
        ours = [f"{1e3 * ours_s:.2f}", f"{ours_s / read_s:.2f}"]
        theirs = [line.peer_name, f"{1e3 * peer_s:.2f}", f"{line.ratio:.2f}", f"{peer_s / read_s:.2f}"]
        rows.append([name, f"{size:.0f}", f"{1e3 * read_s:.2f}", *ours, *theirs, ""])
    return rows


def main() -> list[Table | Figures]:
    """Run the bench."""
    table = Table(
        "generate",
        f"{TOKENS} tokens of an answer, greedily, prompt and encoders included but where told",
        "ms",
        ["The bar is against `generate` of the whole model; the language model's alone is told for comparison."],
    )
    costs = Figures(
        "generate_limit",
        "A token behind the first: what reading the weights has to do with it",
        ["model", "weights, MB", "ms to read them", "avlm, ms a token", "times", "peer", "peer, ms a token", "ratio",
         "the limit", "bar"],
    )  # fmt: skip
    first = Figures(
        "generate_first",
        "First token of a second question about the same picture",
        ["model", "first, ms", "second, ms", "share", "bar"],
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, language in LANGUAGES.items():
            composed = made(language)
            for count in (1, 8):
                table.lines += timed(speed(composed, name, count))
            lines = timed(decoding(composed, name))
            table.lines += lines
            costs.rows += limits(composed, name, lines)
            one, two = first_tokens(composed, Path(folder))
            figures = [f"{1e3 * one:.1f}", f"{1e3 * two:.1f}", f"{two / one:.2f}"]
            first.rows.append([name, *figures, judged("at most 0.3", two <= 0.3 * one)])
    return [table, costs, first]
