"""The feature cache: what frozen encoders make of a medium is computed once and found again on disk.

What is found is what would be made, to the bit: the key of a medium is the hash of all that its embeddings follow from,
and where the cache is in use every medium goes through its encoder alone (`models.features`), so neither the rest of a
batch nor a restart can be seen in it. Measuring decides only whether the disk is used, never how a medium is encoded:
the bits of a run do not hang on a stopwatch.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from avlm.config.features import FeatureCache
from avlm.config.stage import Stage
from avlm.data.loader import StepLoader
from avlm.models.features import Encode, EncoderPart, Medium
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.products import rounding
from avlm.training.console import tell
from avlm.training.segments import KEY_BYTES, Segments

ENCODERS: tuple[EncoderPart, ...] = ("vision", "audio", "audio_beside")
VERSION = "1"
"""Of what is kept and how it is made. Whatever changes that changes it, and what was kept before is not found."""

FOLDER = "features"
"""In the directory of a run that names no other."""
MEASURED = 6
"""Media of an encoder that are timed, behind a first one that warms it up."""
LOOKED_S = 1.0
"""Between two looks at what other processes keep."""
PROVEN = 2
"""Media that are found are made as well, until so many were the same to the bit."""
CHANGED = {
    "vision": ("shift", "flip", "jitter", "erase"),
    "audio": ("pitch", "tempo", "squeeze", "tilt", "noise", "mask_bins", "mask_frames"),
}
"""What changes a medium anew whenever it is read."""

MODULES = {"vision": "vision_tower", "audio": "audio_tower", "audio_beside": "audio_beside_tower"}


# ---------------------------------------------------------------- which encoders


def constant_parts(model: AvlmForConditionalGeneration, stage: Stage) -> list[EncoderPart]:
    """Encoders whose outputs are the same whenever a stage reads a medium: frozen, and shown the same each time."""
    found: list[EncoderPart] = []
    for part in ENCODERS:
        encoder = _encoder(model, part)
        sense = "vision" if part == "vision" else "audio"
        changed = any(getattr(stage.augment, name) for name in CHANGED[sense])
        if encoder is not None and not changed and not any(p.requires_grad for p in encoder.parameters()):
            found.append(part)
    return found


def _encoder(model: AvlmForConditionalGeneration, part: EncoderPart) -> PreTrainedModel | None:
    encoder: PreTrainedModel | None = getattr(model.model, MODULES[part])
    return encoder


def _spread(encoder: nn.Module | None) -> bool:
    """Whether this process holds only a share of its weights at the moment, so that it could not tell what they are."""
    return encoder is not None and any(isinstance(p, DTensor) for p in encoder.parameters())


# ---------------------------------------------------------------- keys


def encoder_digest(model: AvlmForConditionalGeneration, part: EncoderPart) -> str:
    """Hash of all that an encoder's embeddings follow from beside the medium: its weights and settings, what it is told
    of the media, the layer that is read, and what computes."""
    encoder = _encoder(model, part)
    assert encoder is not None
    spec = model.config.media_spec()
    heard = None if spec.audio is None else spec.audio if part == "audio" else spec.audio.beside
    wanted = spec.vision if part == "vision" else heard
    layer = {"vision": model.config.vision_layer, "audio": model.config.audio_layer}.get(part)
    settings = encoder.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype"):  # where it came from
        settings.pop(name, None)
    facts = {
        "version": VERSION,
        "settings": settings,
        "attention": encoder.config._attn_implementation,
        "spec": None if wanted is None else wanted.model_dump(mode="json", exclude={"reduction", "wrap", "beside"}),
        "layer": layer,
        "computed": computed_by(encoder),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor.detach().clone()))  # what NumPy has seen, torch cannot give back to the ranks
    return digest.hexdigest()


def computed_by(encoder: PreTrainedModel) -> list[object]:
    """What a matrix product's last bits hang on, as far as it can be told."""
    device = encoder.device
    facts: list[object] = [torch.__version__, transformers.__version__]
    if device.type == "cuda":
        rounded = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.allow_tf32
        return [*facts, torch.cuda.get_device_name(device), *rounded]
    # Which library multiplies follows from the rounding, too.
    return [*facts, device.type, torch.backends.cpu.get_cpu_capability(), rounding(), torch.get_num_threads()]


def medium_key(digest: str, medium: Medium) -> bytes:
    """Of one medium as its encoder takes it."""
    values = medium.values
    found = hashlib.sha256(f"{digest} {values.dtype} {tuple(values.shape)} {medium.facts}\n".encode())
    found.update(_bytes(values))
    return found.digest()[:KEY_BYTES]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# ---------------------------------------------------------------- one encoder


@dataclass(slots=True)
class Times:
    """Seconds that media took, each counted once in all of them."""

    media: int = 0
    hashing: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0
    reading: float = 0.0

    def worth_it(self) -> bool:
        """Whether the disk pays for itself when each medium comes only once more."""
        return self.hashing * 2 + self.writing + self.reading < self.encoding


@dataclass
class KeptEncoder:
    """One encoder's outputs, found or made.

    Args:
        name: For messages.
        digest: Of the encoder.
        kept: Where its outputs are.
        measured: Whether the disk is used only where that is faster.
        say: Tells the user a sentence.
    """

    name: str
    digest: str
    kept: Segments
    measured: bool
    say: Callable[[str], None]
    on: bool = True
    """Whether the disk is used."""
    found: int = 0
    made: int = 0
    _proven: int = 0
    _warm: bool = False
    _decided: bool = False
    _warned: bool = False
    _looked: float = -math.inf
    _times: Times = field(default_factory=Times)

    def recall(self, media: Sequence[Medium], encode: Encode) -> list[Tensor]:
        """See `models.features.FeatureStore`."""
        self._look_around()
        known: dict[bytes, Tensor] = {}
        results = []
        for medium in media:
            if self.on:
                began = time.perf_counter()
                key = medium_key(self.digest, medium)
                hashing = time.perf_counter() - began
                if key not in known:
                    known[key] = self._one(key, medium, encode, hashing)
                embeddings = known[key]
            else:
                embeddings = self._make(medium, encode)[0]
            results.append(embeddings.to(medium.values.device))
        return results

    def _look_around(self) -> None:
        """See what other processes keep, now and then."""
        now = time.monotonic()
        if self.on and now - self._looked >= LOOKED_S:
            self._looked = now
            self.kept.refresh()

    def _one(self, key: bytes, medium: Medium, encode: Encode, hashing: float) -> Tensor:
        began = time.perf_counter()
        found = self.kept.read(key)
        reading = time.perf_counter() - began
        if found is None:
            return self._make_and_keep(key, medium, encode, hashing)
        if self._proven < PROVEN or (self.measured and not self._decided):
            return self._prove(found, medium, encode, hashing, reading)
        self.found += 1
        return found

    def _make(self, medium: Medium, encode: Encode) -> tuple[Tensor, float]:
        """Embeddings on the processor, and how long they took, with all that a device still had to do."""
        began = time.perf_counter()
        with torch.no_grad():
            made = encode(medium).detach().cpu().contiguous()
        self.made += 1
        return made, time.perf_counter() - began

    def _make_and_keep(self, key: bytes, medium: Medium, encode: Encode, hashing: float) -> Tensor:
        made, encoding = self._make(medium, encode)
        began = time.perf_counter()
        written = self.kept.write(key, made)
        writing = time.perf_counter() - began
        if not written:
            self._warn()
        elif self.measured and not self._decided:
            began = time.perf_counter()
            self.kept.read(key)
            self._count(hashing, encoding, writing, time.perf_counter() - began)
        return made

    def _prove(self, found: Tensor, medium: Medium, encode: Encode, hashing: float, reading: float) -> Tensor:
        """Make again what was found, to time it and to see that it is the same."""
        made, encoding = self._make(medium, encode)
        if not torch.equal(found, made):
            self.on, self._decided = False, True
            self.kept.close()
            self.say(
                f"{self.name}: what {self.kept.folder} holds is not what this machine makes, to the last bit, so it is "
                "not used. Name another folder with features.folder=DIR"
            )
            return made
        self._proven += 1
        self._count(hashing, encoding, 0.0, reading)
        return made

    def _count(self, hashing: float, encoding: float, writing: float, reading: float) -> None:
        """Decide once, behind a first medium that warmed everything up."""
        if self._decided or not self.measured:
            return
        if not self._warm:
            self._warm = True
            return
        t = self._times
        t.media += 1
        t.hashing, t.encoding = t.hashing + hashing, t.encoding + encoding
        t.writing, t.reading = t.writing + writing, t.reading + reading
        if t.media == MEASURED:
            self._decided = True
            self.on = t.worth_it()
            if not self.on:
                self.kept.close()
            ms = [f"{1000 * s / t.media:,.2f} ms" for s in (t.encoding, t.hashing + t.reading, t.writing)]
            how = "are kept in " + str(self.kept.folder.parent) if self.on else "are not kept"
            self.say(f"{self.name}: {how}; to encode one takes {ms[0]}, to find it {ms[1]}, to write it {ms[2]}")

    def _warn(self) -> None:
        """Once, why nothing more is written."""
        if self._warned or not (self.kept.full or self.kept.trouble):
            return
        self._warned = True
        where = self.kept.folder.parent
        if self.kept.trouble is not None:
            why = self.kept.trouble.strerror or str(self.kept.trouble)
            self.say(f"{self.name}: {where} cannot be written to ({why}); what is not there is encoded each time")
        else:
            self.say(
                f"{self.name}: {where} is full, and all in it is in use; what is not there is encoded each time. "
                "Make room on the disk, or raise features.disk_mb"
            )

    def close(self) -> None:
        """Tell what came of it."""
        self.kept.close()
        if self.on and self.found + self.made:
            damaged = f", {self.kept.damaged} were damaged" if self.kept.damaged else ""
            self.say(f"{self.name}: {self.found:,} found, {self.made:,} made{damaged}")


# ---------------------------------------------------------------- all of a stage


class KeptFeatures:
    """The store of a stage (`models.features.FeatureStore`).

    Args:
        model: Whose encoders are asked for.
        parts: Encoders whose outputs are constant.
        settings: Of the cache.
        folder: Where it is.
        say: Tells the user a sentence.
    """

    def __init__(
        self,
        model: AvlmForConditionalGeneration,
        parts: Sequence[EncoderPart],
        settings: FeatureCache,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.parts = model, tuple(parts)
        self.settings, self.folder, self.say = settings, folder, say
        self.encoders: dict[EncoderPart, KeptEncoder] = {}

    def keeps(self, part: EncoderPart) -> bool:
        encoder = _encoder(self.model, part)
        return part in self.parts and encoder is not None and not encoder.training and not _spread(encoder)

    def recall(self, part: EncoderPart, media: Sequence[Medium], encode: Encode) -> list[Tensor]:
        if part not in self.encoders:  # its weights are hashed when the first medium comes, if one does
            self.encoders[part] = self._open(part)
        return self.encoders[part].recall(media, encode)

    def _open(self, part: EncoderPart) -> KeptEncoder:
        digest = encoder_digest(self.model, part)
        kept = Segments(self.folder / digest[:32], self.settings.disk_mb * 2**20)
        return KeptEncoder(f"features of {part}", digest, kept, self.settings.use == "auto", self.say)

    def close(self) -> None:
        """Give the files back and tell what came of it."""
        for encoder in self.encoders.values():
            encoder.close()


@contextmanager
def kept_features(
    model: AvlmForConditionalGeneration,
    stage: Stage,
    settings: FeatureCache,
    loader: StepLoader,
    steps: int,
    out: Path,
    console: Console,
) -> Iterator[None]:
    """While the block runs, the model finds again what its frozen encoders made, where the settings want that.

    To be begun when everything is frozen that will be. Each process looks and keeps for itself, and no other waits for
    it: an encoder whose weights are spread over processes is asked for while all of it is gathered (`sharded`).

    Args:
        steps: Of the stage.
        out: The run's directory.
    """
    parts = [] if settings.use == "off" else constant_parts(model, stage)
    if settings.use == "auto" and parts and not loader.plan.reads_again(steps):
        parts = []
    folder = cache_folder(settings, out)
    store = KeptFeatures(model, parts, settings, folder, lambda sentence: tell(console, f"{stage.name}: {sentence}"))
    model.model.features = store if parts else None
    try:
        yield
    finally:
        model.model.features = None
        store.close()


def cache_folder(settings: FeatureCache, out: Path) -> Path:
    """Where a run in this directory keeps features."""
    return out / FOLDER if settings.folder is None else Path(settings.folder)


def drop_features(settings: FeatureCache, out: Path) -> None:
    """Remove what a run that is done kept in its own directory."""
    if settings.folder is None:
        shutil.rmtree(out / FOLDER, ignore_errors=True)
