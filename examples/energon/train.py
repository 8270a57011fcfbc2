"""Train `avlm.8b` on Energon datasets: each is gone through once and written as rows, and those are trained on.

    python examples/energon/train.py --data runs/energon/data/talks runs/energon/data/captions --out runs/energon/run

A dataset is a folder that was prepared, or a metadataset's YAML file. Its samples go through the task encoder of
talks.py. Rows are JSON lines with their media in files beside them: they can be looked at, and a run on them resumes
to the bit. A sample that cannot be read stops the script; Energon by itself prints such a sample and goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import prepare
import talks
from megatron import energon

import avlm
from avlm.errors import DataError
from avlm.samples import Sample, Text


def samples(dataset: Path, split: str) -> Iterator[Sample]:
    """Every sample of a split, once, in its order.

    Training datasets of Energon begin again for ever and blend; one for validation ends. Without worker processes
    nothing has to be sent from one to another, which hangs where a type cannot be sent.
    """
    here = energon.WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=energon.reraise_exception)
    rows = energon.get_val_dataset(
        dataset, split_part=split, worker_config=here, batch_size=None, task_encoder=talks.ToSamples()
    )
    for row in energon.get_loader(rows):
        yield replace(row.sample, id=f"{dataset.stem}/{row.sample.id}")


def as_row(sample: Sample, number: int, out: Path) -> dict[str, Any]:
    """A sample as a JSON row; its media are written as they are, and told apart by what is in them."""
    messages = []
    for turn in sample.turns:
        content: list[dict[str, str]] = []
        for part in turn.parts:
            if isinstance(part, Text):
                content.append({"type": "text", "text": part.text})
                continue
            path = Path("media") / f"{number:06d}-{len(messages)}-{len(content)}.{part.kind}"
            (out / path).write_bytes(part.data or b"")
            content.append({"type": part.kind, "path": str(path)})
        messages.append({"role": turn.role, "content": content})
    return {"id": sample.id, "task": sample.task, "messages": messages}


def write(datasets: list[Path], split: str, out: Path) -> Path:
    """The rows of a split of all datasets; the file is there when all of them are."""
    folder, rows = out / split, out / split / "rows.jsonl"
    (folder / "media").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for dataset in datasets:
        before = len(lines)
        try:
            for sample in samples(dataset, split):
                lines.append(json.dumps(as_row(sample, len(lines), folder)) + "\n")
        except DataError as error:
            raise SystemExit(f"{dataset}: {error}") from None
        print(f"{dataset}: {len(lines) - before} samples of {split}")
    rows.write_text("".join(lines))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="Energon datasets; default: prepare.py's")
    parser.add_argument("--out", type=Path, default=Path("runs/energon/run"))
    parser.add_argument("--size", choices=("twin", "full"), default="twin")
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    given = parser.parse_args(arguments)
    datasets = given.data or prepare.write(given.out.with_name("data"))
    for dataset in datasets:
        if not dataset.is_file() and not (dataset / ".nv-meta").is_dir():
            raise SystemExit(f"{dataset}: has no .nv-meta, so it is no Energon dataset. Run `energon prepare` on it")
    rows = given.out.with_name("rows")
    train, held = (write(datasets, split, rows) for split in ("train", "val"))
    print(train.read_text().splitlines()[-1])
    run = avlm.recipe(
        "avlm.8b",
        f"data.train={train}",
        f"data.eval={held}",
        f"out={given.out}",
        *(f"stages.{name}.steps={given.steps}" for name in ("vision-alignment", "audio-alignment", "finetune")),
        "samples.prompts=0",
        size=given.size,
    )
    print(f"trained: {avlm.train(run)}")


if __name__ == "__main__":
    main()
