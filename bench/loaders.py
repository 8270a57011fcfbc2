"""Samples a second out of a loader, against Energon's, WebDataset's and Hugging Face's, from the same shards.

Every side reads the same tars, decodes a picture of 640 x 480 and five seconds of sound, makes CLIP-336's pixels and
Whisper's log-mel at its true length, turns the words of the JSON into tokens, and hands out batches of eight. The peers
do that with the tools that their users take: their own decoders, and transformers' processors. Then they do it with
avlm's functions, so that what is left is the loaders alone. All have the same number of workers, with one thread each.

Counted is what comes steadily: from behind the batches that were made while the first one was waited for. How long the
first one takes stands apart.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
import webdataset
from harness import Line, Table
from material import RATE_HZ, WORDS, shards, shards_of
from megatron import energon
from megatron.energon.cli.main import main as energon_command
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, WhisperFeatureExtractor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from avlm.config.data import DataConfig
from avlm.config.media import AudioSpec, MediaSpec, Reduction, VisionSpec
from avlm.config.stage import Stage, TrainPart
from avlm.data.decoding.decode import decode_audio, decode_image
from avlm.data.loader import StepLoader
from avlm.data.media.features import sound_features
from avlm.data.media.pictures import normalise, prepare_image
from avlm.data.processor import AvlmProcessor
from avlm.data.sources import open_source
from avlm.data.text.vocabulary import make_tokenizer
from avlm.samples import MediaItem

COUNT, BATCH, ROUNDS, WORKERS = 320, 8, 3, (0, 1, 2)
AHEAD = 8
"""Batches that may have been made while the first one was waited for; no side keeps more of them waiting."""
BAR = 1.5
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MEDIA = MediaSpec(
    vision=VisionSpec(image_size_px=336, cell_px=14, mean=tuple(OPENAI_CLIP_MEAN), std=tuple(OPENAI_CLIP_STD)),
    audio=AudioSpec(reduction=Reduction(stack=4)),
)
TOKENIZER = make_tokenizer([WORDS, "user: assistant: system:"], 400)
CLIP = CLIPImageProcessor(size={"height": 336, "width": 336}, do_center_crop=False)
WHISPER = WhisperFeatureExtractor()

Example = dict[str, Tensor]
Files = dict[str, Any]
"""A sample as a peer's reader gives it: ``jpg``, ``wav`` and ``json``, decoded or not."""


# ---------------------------------------------------------------- what is made of a sample


def usual(sample: Files) -> Example:
    """With transformers' processors, of what the peer's own decoders gave."""
    pixels = CLIP(sample["jpg"], return_tensors="pt")["pixel_values"][0]
    mel = WHISPER(sample["wav"], sampling_rate=RATE_HZ, padding="longest", return_tensors="pt")["input_features"][0]
    return {"pixels": pixels, "mel": mel, "ids": ids(sample["json"])}


def with_avlm(sample: Files) -> Example:
    """With avlm's decoders and preprocessing, of the files' bytes; the JSON is decoded or not."""
    assert MEDIA.vision is not None and MEDIA.audio is not None
    picture = decode_image(MediaItem("image", data=sample["jpg"]))
    wave = decode_audio(MediaItem("audio", data=sample["wav"]), RATE_HZ).waveform
    pixels = normalise(prepare_image(picture, MEDIA.vision), MEDIA.vision)
    return {"pixels": pixels, "mel": sound_features(wave, MEDIA.audio), "ids": ids(sample["json"])}


def ids(told: Any) -> Tensor:
    """Tokens of what is asked and answered."""
    told = json.loads(told) if isinstance(told, bytes) else told
    asked, answered = told["messages"]
    return torch.tensor(TOKENIZER(f"user: {asked['content'][-1]['text']}\nassistant: {answered['content']}").input_ids)


def together(examples: list[Example]) -> Example:
    """A batch, padded to its longest."""
    return {
        "pixels": torch.stack([e["pixels"] for e in examples]),
        "mel": pad_sequence([e["mel"].T for e in examples], batch_first=True),
        "ids": pad_sequence([e["ids"] for e in examples], batch_first=True),
    }


def heard(data: bytes) -> np.ndarray:
    wave, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return wave


# ---------------------------------------------------------------- the loaders


def of_avlm(folder: Path, workers: int) -> Iterable[Any]:
    """Packed rows of conversations, in an order that differs in every epoch."""
    processor = AvlmProcessor(TOKENIZER, MEDIA.model_dump(mode="json"), TEMPLATE)
    stage = Stage(
        name="bench", train={"language": TrainPart(lr=1)}, steps=COUNT // BATCH, batch_samples=BATCH, row_tokens=8192
    )
    source = open_source(shards_of(folder))
    return StepLoader(source, stage, processor, DataConfig(workers=workers, cache_mb=0), seed=0).steps(0, stage.steps)


def of_webdataset(folder: Path, workers: int, make: Callable[[Files], Example]) -> Iterable[Example]:
    found = webdataset.WebDataset([str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False)
    if make is usual:
        found = found.decode("pil", webdataset.handle_extension("wav", heard))
    batches = found.map(make).batched(BATCH, collation_fn=together)
    return webdataset.WebLoader(batches, batch_size=None, num_workers=workers)


def of_datasets(folder: Path, workers: int, make: Callable[[Files], Example]) -> Iterable[Example]:
    """As a table, which is read in any order; the sound stays bytes, because `Audio` wants torchcodec."""
    features = datasets.Features(
        {
            "jpg": datasets.Image(decode=make is usual),
            "wav": datasets.Value("binary"),
            "json": datasets.Json(),
            "__key__": datasets.Value("string"),
            "__url__": datasets.Value("string"),
        }
    )
    table = datasets.load_dataset(
        "webdataset", data_files=str(folder / "*.tar"), split="train", features=features, cache_dir=folder / "cache"
    )

    def made(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        examples = []
        for i in range(len(batch["jpg"])):
            sample = {key: batch[key][i] for key in ("jpg", "wav", "json")}
            if make is usual:
                sample["wav"] = heard(sample["wav"])
            else:
                sample["jpg"] = sample["jpg"]["bytes"]
            examples.append(make(sample))
        return {key: [e[key] for e in examples] for key in examples[0]}

    return DataLoader(
        table.with_transform(made), batch_size=BATCH, num_workers=workers, collate_fn=together, shuffle=True
    )


@energon.edataclass
class Talk(energon.Sample):
    """A sample of the shards."""

    files: dict


@energon.stateless
@energon.cooker
def cooked(files: energon.CrudeSample) -> Talk:
    return Talk(**energon.basic_sample_keys(files), files={key: files[key] for key in ("jpg", "wav", "json")})


class Usual(energon.DefaultTaskEncoder):
    """Energon's own decoders, and transformers' processors."""

    cookers = [energon.Cooker(cooked)]
    decoder = energon.SampleDecoder(image_decode="pil")

    @energon.stateless
    def encode_sample(self, sample: Talk) -> Example:
        (wave,) = sample.files["wav"].get_audio().audio_clips  # int16, as FFmpeg decodes a WAV file of 16 bits
        return usual({**sample.files, "wav": (wave.float() / 32_768).mean(0).numpy()})

    @energon.stateless
    def batch(self, samples: list[Example]) -> Example:
        return together(samples)


class WithAvlm(Usual):
    """Energon reads, avlm makes."""

    decoder = None

    @energon.stateless
    def encode_sample(self, sample: Talk) -> Example:
        return with_avlm(sample.files)


def of_energon(folder: Path, workers: int, make: Callable[[Files], Example]) -> Iterable[Example]:
    found = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Usual() if make is usual else WithAvlm(),
    )
    return energon.get_loader(found)


def prepared_for_energon(folder: Path) -> None:
    energon_command(
        ["prepare", "--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers",
         "1", "--no-progress", str(folder)],
        standalone_mode=False,
    )  # fmt: skip


# ---------------------------------------------------------------- the race

PEERS: dict[str, Callable[[Path, int, Callable[[Files], Example]], Iterable[Example]]] = {
    "Energon": of_energon,
    "WebDataset": of_webdataset,
    "datasets": of_datasets,
}


def drained(batches: Iterable[Any]) -> tuple[float, float]:
    """Seconds to the first batch, and samples a second behind those that were made while it was waited for."""
    began = time.perf_counter()
    found: Iterator[Any] = iter(batches)
    next(found)
    first = time.perf_counter() - began
    for _ in range(AHEAD):
        next(found)
    began, rest = time.perf_counter(), COUNT // BATCH - AHEAD - 1
    for _ in range(rest):
        next(found)
    rate = rest * BATCH / (time.perf_counter() - began)
    if isinstance(found, Generator):
        found.close()  # ends its workers; others end theirs when they are dropped
    return first, rate


def race(folder: Path, workers: int) -> list[Line]:
    sides: dict[str, Callable[[], Iterable[Any]]] = {"": lambda: of_avlm(folder, workers)}
    for name, opened in PEERS.items():
        sides[name] = lambda opened=opened: opened(folder, workers, usual)
        sides[f"{name}, with avlm's preprocessing"] = lambda opened=opened: opened(folder, workers, with_avlm)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    starts: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, rate = drained(sides[name]())
            rates[name].append(rate)
            starts[name].append(start)
    ours = rates.pop("")
    what = f"{workers} worker{'' if workers == 1 else 's'}, first batch after {statistics.median(starts['']):.2f} s"
    return [
        Line(
            what,
            max(ours),
            f"{name}, first batch after {statistics.median(starts[name]):.2f} s",
            max(theirs),
            max(ours) / max(theirs),
            [a / b for a, b in zip(ours, theirs, strict=True)],
            None if "avlm" in name else BAR,
        )
        for name, theirs in rates.items()
    ]


def main() -> list[Table]:
    table = Table("loaders", "Loaders: JPEG of 640 x 480 and WAV of 5 s, in batches of 8", "samples/s")
    table.notes.append("Each side with its users' usual tools; then the peers' readers with avlm's preprocessing.")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        shards(folder, COUNT)
        prepared_for_energon(folder)
        alike(folder)
        for workers in WORKERS:
            table.lines += race(folder, workers)
    return [table]


def alike(folder: Path) -> None:
    """Raise if a side gives another number of samples, or other pictures, sounds and words than ours."""
    row = next(iter(of_avlm(folder, 0))).rows[0]
    assert row.pixel_values is not None and row.input_features is not None
    assert row.pixel_values.shape == (BATCH, 3, 336, 336) and row.input_features.shape[2] == 500
    with tarfile.open(min(folder.glob("*.tar"))) as tar:
        first = {ending: tar.extractfile(f"000000.{ending}").read() for ending in ("jpg", "wav", "json")}
    expected = with_avlm({**first, "json": json.loads(first["json"])})
    for opened in PEERS.values():
        for make in (usual, with_avlm):
            seen = [one for _, batch in zip(range(COUNT // BATCH), opened(folder, 0, make)) for one in apart(batch)]
            pixels, mel, ids = min((differences(one, expected) for one in seen), key=lambda found: found[0])
            assert len(seen) == COUNT, (opened, len(seen))
            assert pixels < 0.04 and mel < 1e-3 and ids == 0, (opened, make, pixels, mel, ids)


def apart(batch: Example) -> list[Example]:
    return [{key: values[i] for key, values in batch.items()} for i in range(len(batch["pixels"]))]


def differences(found: Example, expected: Example) -> tuple[float, float, float]:
    """The greatest ones of pixels, of the sound's features, and of the words."""
    mel, ids = expected["mel"].T, expected["ids"]
    return (
        float((found["pixels"] - expected["pixels"]).abs().max()),
        float((found["mel"][: len(mel)] - mel).abs().max()),
        float((found["ids"][: len(ids)] - ids).abs().max()),
    )
