"""Prove on a model at hand what has to hold for any: `avlm check MODEL`.

Each check is an equality or a fact that users of such models have lost work over elsewhere. The media are made here, of
several sizes and lengths, so nothing but the model directory is needed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avlm.config.media import VideoSpec
from avlm.config.stage import Stage
from avlm.convert.verifying import check_sums, suspects
from avlm.convert.weights import load_model, save_model
from avlm.data.encode import pack
from avlm.data.processor import AvlmProcessor
from avlm.errors import AvlmError
from avlm.inference.engine import end_tokens
from avlm.inference.generate import generate
from avlm.inference.sampling import Sampling
from avlm.layout import frame_times_s
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import IGNORE, Clip, Encoded, MediaItem, Picture, Row, Sample, Sound, Text, Turn
from avlm.training.loss import row_loss
from avlm.training.stages import part_modules, prepare, set_modes

SIZES = ((64, 64), (48, 96), (120, 50))
"""Height and width of the pictures that are made."""
SECONDS = (0.5, 1.3, 2.0)
"""Lengths of the sounds."""
CHUNK = 2**22
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference that counts as equal, relative to the largest value: what rounding does at each precision."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found."""

    name: str
    ok: bool
    found: str
    seconds: float


Found = tuple[bool, str]


class Checks:
    """All checks of one model.

    Args:
        model, processor: As `load_model` gives them. The weights are as before when a check is done.
        seed: Of the media.
        folder: Where the model was read from, for its checksums.
    """

    def __init__(
        self,
        model: AvlmForConditionalGeneration,
        processor: AvlmProcessor,
        seed: int = 0,
        *,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self.model, self.processor = model.eval(), processor
        spec = processor.media_spec()
        self.kinds = [
            k for k, there in (("image", spec.vision), ("audio", spec.audio), ("video", spec.vision)) if there
        ]
        self.samples = list(_samples(self.kinds, np.random.default_rng(seed), spec.video))
        self.encoded = [processor.encode(sample) for sample in self.samples]
        self.prompts = [processor.encode(sample, prompt_only=True) for sample in self.samples]
        self.tolerance = TOLERANCE.get(model.dtype, 1e-1)

    def run(self, progress: Callable[[str], None] = lambda name: None) -> Iterator[Result]:
        """Run every check; one that fails does not keep the others from running."""
        for name, check in self.all().items():
            progress(name)
            began = time.perf_counter()
            try:
                with torch.random.fork_rng(devices=[]):
                    ok, found = check()
            except Exception as error:  # whatever a broken model does is what was to be found out
                name_of = "" if isinstance(error, AvlmError) else f"{type(error).__name__}: "
                ok, found = False, f"{name_of}{error}"
            yield Result(name, ok, found, time.perf_counter() - began)

    def all(self) -> dict[str, Callable[[], Found]]:
        """Every check by its name."""
        return {
            **({} if self.folder is None else {"files are as written": self.files}),
            "weights are numbers": self.weights,
            "counts equal embeddings": self.counts,
            "batch equals single": self.batch,
            "packed equals alone": self.packed,
            "cached equals uncached": self.cached,
            "media matter": self.media,
            "first answer token is learned": self.targets,
            "frozen stays frozen": self.frozen,
            "saved equals loaded": self.saved,
        }

    def files(self) -> Found:
        """The files of weights have the checksums that were written with them; a difference raises."""
        assert self.folder is not None
        compared = check_sums(self.folder)
        return True, f"{compared} compared" if compared else "no checksums were written with them"

    def weights(self) -> Found:
        """No weight is a NaN or an infinity, no buffer a NaN (limits may be infinite); all-zero tensors are told."""
        found = suspects(self.model)
        if found.lost:
            return False, f"{len(found.lost)} tensors hold values that are no numbers: {found.lost[0]}"
        zeros = f"; {len(found.zero)} tensors are all zero: {found.zero[0]}" if found.zero else ""
        return True, f"{sum(p.numel() for p in self.model.parameters()):,} parameters{zeros}"

    def counts(self) -> Found:
        """The places that the data side reserves are as many as the embeddings that come; a difference raises."""
        reserved = 0
        for encoded in self.encoded:
            self._logits(pack([encoded]))
            reserved += sum(s.count for place in encoded.places for s in place.segments if s.kind != "text")
        return True, f"{reserved} places"

    def batch(self) -> Found:
        """Prompts of different media, padded side by side, end in the logits that each has alone."""
        with torch.inference_mode():
            together = self._last_logits(self.prompts)
            alone = torch.cat([self._last_logits([prompt]) for prompt in self.prompts])
        return self._equal(together, alone)

    def packed(self) -> Found:
        """Samples end to end in one row have the logits that each has alone."""
        together = self._logits(pack(self.encoded))
        alone = torch.cat([self._logits(pack([encoded])) for encoded in self.encoded])
        return self._equal(together, alone)

    def cached(self) -> Found:
        """Greedy answers with the key-value cache are those without, and those of one prompt at a time."""
        sampling = Sampling(max_tokens=8)
        with_cache = generate(self.model, self.processor, self.prompts, sampling)
        without = generate(self.model, self.processor, self.prompts, sampling, use_cache=False)
        alone = [generate(self.model, self.processor, [prompt], sampling)[0] for prompt in self.prompts]
        same = sum(a == b == c for a, b, c in zip(with_cache, without, alone, strict=True))
        return same == len(without), f"{same} of {len(without)} answers"

    def media(self) -> Found:
        """The answer's logits change when a medium does."""
        still = []
        for sample, prompt in zip(self.samples, self.prompts, strict=True):
            if not sample.media():
                continue
            other = self.processor.encode(_with_other_media(sample), prompt_only=True)
            with torch.inference_mode():
                if torch.equal(self._last_logits([prompt]), self._last_logits([other])):
                    still.append("+".join(sorted(sample.kinds())))
        if still:
            return False, f"another {still[0]} gives the same logits"
        return True, f"{sum(bool(s.media()) for s in self.samples)} media exchanged" if self.kinds else "no media"

    def targets(self) -> Found:
        """What is learned is the answer from its first token to its end token, and nothing else."""
        ends = end_tokens(self.model, self.processor)
        for sample, encoded, prompt in zip(self.samples, self.encoded, self.prompts, strict=True):
            learned = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
            if learned[:1] != [len(prompt)]:
                return False, f"the first learned token is at {learned[:1]}, and the answer begins at {len(prompt)}"
            if encoded.ids[: len(prompt)] != prompt.ids:
                return False, "training and asking write the prompt down differently"
            if learned != list(range(learned[0], learned[-1] + 1)):
                return False, "some tokens of the answer are not learned"
            if any(encoded.labels[i] != encoded.ids[i] for i in learned):
                return False, "what is learned is not what is written"
            if encoded.ids[learned[-1]] not in ends:
                return False, "the end of the answer is not learned"
            answer = self.processor.tokenizer.decode([encoded.ids[i] for i in learned[:-1]]).strip()
            if answer != sample.turns[-1].text():
                return False, f"the learned tokens read {answer!r}, and the answer is {sample.turns[-1].text()!r}"
        return True, f"{sum(e.num_targets() for e in self.encoded)} target tokens"

    def frozen(self) -> Found:
        """A training step of the connectors (or, without any, of the language model) leaves every other bit alone."""
        modules = part_modules(self.model)
        trained = [p for p in modules if p.endswith("_connector")] or ["language"]
        stage = Stage.model_validate({"name": "check", "train": {p: {"lr": 1e-3} for p in trained}, "steps": 1})
        before = {name: tensor.clone() for p in trained for name, tensor in modules[p].state_dict(prefix=p).items()}
        others = self._sums(trained)
        parts = prepare(self.model, stage)
        try:
            set_modes(self.model, parts)
            parameters = [p for module in parts.values() for p in module.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=1e-2)
            torch.autograd.backward(row_loss(self.model, pack(self.encoded)) / len(self.encoded))
            without = sum(p.grad is None for p in parameters)
            optimizer.step()
            moved = [n for n, s in self._sums(trained).items() if s != others[n]]
        finally:
            self.model.eval().requires_grad_(False)
            for parameter in self.model.parameters():
                parameter.grad = None
            for part in trained:
                state = {n.removeprefix(part): t for n, t in before.items() if n.startswith(part)}
                modules[part].load_state_dict(state)
        if moved:
            return False, f"{len(moved)} tensors of frozen parts changed: {moved[0]}"
        if without:
            return False, f"{without} trained tensors got no gradient"
        return True, f"{len(others)} tensors kept their bits while {', '.join(trained)} learned"

    def saved(self) -> Found:
        """A saved and loaded model has the same tensors, bit for bit, and gives the same logits."""
        with tempfile.TemporaryDirectory() as folder:
            save_model(self.model, self.processor, Path(folder) / "model")
            model, processor = load_model(Path(folder) / "model")
            again = [processor.encode(sample) for sample in self.samples]
            if [e.ids for e in again] != [e.ids for e in self.encoded]:
                return False, "the loaded processor writes samples down differently"
            before, after = self.model.state_dict(), model.state_dict()
            changed = [n for n in before.keys() | after.keys() if not _same(before.get(n), after.get(n))]
            if changed:
                return False, f"{len(changed)} tensors changed: {min(changed)}"
            row = pack(self.encoded)
            return self._equal(_logits(model, row), self._logits(row))

    # ------------------------------------------------------------ how it is looked at

    def _logits(self, row: Row) -> Tensor:
        return _logits(self.model, row)

    def _last_logits(self, prompts: Sequence[Encoded]) -> Tensor:
        batch = self.processor.collate(prompts)
        del batch["labels"]
        logits: Tensor = self.model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        return logits

    def _equal(self, a: Tensor, b: Tensor) -> Found:
        difference = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
        return difference <= self.tolerance, f"largest difference {difference:.1e} of {self.tolerance:.0e} allowed"

    def _sums(self, trained: Sequence[str]) -> dict[str, int]:
        """A checksum of every tensor that is not trained, buffers among them."""
        skip = {id(t) for p in trained for t in part_modules(self.model)[p].state_dict(keep_vars=True).values()}  # type: ignore[index]
        state = self.model.state_dict(keep_vars=True)
        return {name: _bits(tensor.detach()) for name, tensor in state.items() if id(tensor) not in skip}


def _logits(model: AvlmForConditionalGeneration, row: Row) -> Tensor:
    with torch.inference_mode():
        output = model(**row.inputs())
    logits: Tensor = output.logits[0].float()
    return logits


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _bits(tensor: Tensor) -> int:
    """A sum over the bytes of a tensor, each weighed by its place, so that exchanged values are seen."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    total = 0
    for start in range(0, len(data), CHUNK):  # a table of a large vocabulary at once would take eight times its memory
        part = data[start : start + CHUNK].long()
        place = torch.arange(start, start + len(part), device=data.device) % 65_521 + 1
        total += int((part * place).sum())
    return total


def _samples(kinds: Sequence[str], rng: np.random.Generator, video: VideoSpec) -> Iterator[Sample]:
    """Questions of every kind of media, alone and together, of several sizes, and one of text alone."""
    for i, (size, seconds) in enumerate(zip(SIZES, SECONDS, strict=True)):
        made = {kind: _item(kind, size, seconds, video, rng) for kind in kinds}
        for kind, item in made.items():
            yield _sample(f"{kind}-{i}", [item], "red")
        if len(made) > 1 and i == 0:
            yield _sample("all", list(made.values()), "a red square and a bell")
    yield _sample("text", [], "blue")


def _sample(name: str, media: list[MediaItem], answer: str) -> Sample:
    question = Turn("user", (*media, Text("What is it?")))
    return Sample(name, (question, Turn("assistant", (Text(answer),))))


def _item(kind: str, size: tuple[int, int], seconds: float, video: VideoSpec, rng: np.random.Generator) -> MediaItem:
    if kind == "image":
        return MediaItem("image", decoded=_picture(size, rng))
    if kind == "audio":
        return MediaItem("audio", decoded=_sound(seconds, rng))
    frames = tuple(_picture(size, rng) for _ in frame_times_s(seconds, video))
    return MediaItem("video", decoded=Clip(frames, seconds, _sound(seconds, rng)))


def _picture(size: tuple[int, int], rng: np.random.Generator) -> Picture:
    return Picture(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def _sound(seconds: float, rng: np.random.Generator, rate_hz: int = 16_000) -> Sound:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    tone = np.sin(2 * np.pi * rng.uniform(200, 2000) * time_s) + 0.1 * rng.standard_normal(len(time_s))
    return Sound((0.3 * tone).astype(np.float32), rate_hz)


def _with_other_media(sample: Sample) -> Sample:
    """The same question about other media of the same sizes and lengths."""

    def other(part: Text | MediaItem) -> Text | MediaItem:
        if isinstance(part, Text):
            return part
        decoded = part.decoded
        if isinstance(decoded, Picture):
            return MediaItem(part.kind, decoded=Picture(255 - decoded.pixels))
        if isinstance(decoded, Sound):
            return MediaItem(part.kind, decoded=Sound(decoded.waveform[::-1].copy(), decoded.sample_rate_hz))
        frames = tuple(Picture(255 - frame.pixels) for frame in decoded.frames)
        sound = Sound(decoded.sound.waveform[::-1].copy(), decoded.sound.sample_rate_hz)
        return MediaItem(part.kind, decoded=Clip(frames, decoded.duration_s, sound))

    return Sample(sample.id, tuple(Turn(t.role, tuple(map(other, t.parts))) for t in sample.turns))
