"""One side of a race of training steps, in a process of its own: ``python bench/train_sides.py SIDE SPEC.json``.

It prepares itself, says ``ready``, and takes one optimizer step for each line that it is sent. Each step is answered
with a line of JSON: seconds, tokens that are no padding, loss, and the most memory that the process ever held.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from train_material import CELLS, LONGEST, MEDIAN, PICTURES, Talk, encoded, labels, operations, picture, talks

LORA = {"rank": 16, "alpha": 32.0}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LR = 1e-4


@dataclass(frozen=True, slots=True)
class Spec:
    """What a side is asked for."""

    model: str
    """Directory in its own format."""
    shape: str
    """The model's name among `MODELS`."""
    train: str
    """full, lora or connector; the connector is always trained."""
    samples: int
    """In one optimizer step."""
    equal: bool
    threads: int
    folder: str
    micro_batch: int = 4
    precision: str = "float32"
    stage: dict[str, Any] | None = None
    """More settings of avlm's stage."""
    run: dict[str, Any] | None = None
    """More settings of avlm's run."""


def main() -> None:
    """Take steps as they are asked for, until no more are."""
    side, spec = sys.argv[1], Spec(**json.loads(Path(sys.argv[2]).read_text()))
    torch.set_num_threads(spec.threads)
    torch.manual_seed(0)
    Path(spec.folder).mkdir()
    SIDES[side](spec, Turns())


class Turns:
    """The other end of the line: whoever races the sides."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print is no answer
        self.began = 0.0

    def wait(self) -> bool:
        """Until a step is wanted; False when no more are."""
        self._say("ready")
        wanted = sys.stdin.readline().strip() == "step"
        self.began = time.perf_counter()
        return wanted

    def done(self, tokens: int, loss: float, operations: float | None = None) -> None:
        """A step is over.

        Args:
            operations: Those that it could not do without, if that is to be told with what the machine can do.
        """
        seconds = time.perf_counter() - self.began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told = {"seconds": seconds, "tokens": tokens, "loss": loss, "peak_mb": peak}
        if operations is not None:
            told |= {"least_seconds": operations / matrix_peak()}
        self._say(json.dumps(told))

    def _say(self, line: str) -> None:
        print(line, file=self.out, flush=True)


def matrix_peak() -> float:
    """Operations a second of a float32 product, as large as this machine likes them."""
    side, best = 1536, 0.0
    a, b = torch.randn(side, side), torch.randn(side, side)
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def same_adapters(model: nn.Module) -> None:
    """Give adapters values that depend on their layer alone, so that both sides begin with the same."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            layer = name[name.index("layers.") : name.index(".lora_A.")]
            draw = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
            parameter.data = torch.randn(parameter.shape, generator=draw) / parameter.shape[1] ** 0.5


# ---------------------------------------------------------------- avlm


def of_avlm(spec: Spec, turns: Turns) -> None:
    """avlm's own loop over the samples."""
    from rich.console import Console

    from avlm.config.io import build
    from avlm.config.run import RunConfig
    from avlm.convert.weights import load_model
    from avlm.models.memory import keep_freed_memory
    from avlm.models.precision import cast_weights
    from avlm.training.trainer import Trainer

    keep_freed_memory()
    model, processor = load_model(spec.model)
    if spec.precision == "bfloat16":
        cast_weights(model, torch.bfloat16)
    language = {"lr": LR, "lora": LORA} if spec.train == "lora" else {"lr": LR}
    stage = {
        "name": "train",
        "train": {"vision_connector": {"lr": LR}, **({} if spec.train == "connector" else {"language": language})},
        "steps": 10_000,
        "batch_samples": spec.samples,
        "row_tokens": 1 + CELLS + (MEDIAN if spec.equal else LONGEST),  # what the longest sample there can be takes
        "schedule": {"kind": "constant", "warmup": 0.0},
        "optimizer": {"betas": [0.9, 0.98]},
        **(spec.stage or {}),
    }
    run = build(
        RunConfig,
        {"recipe": "bench", "out": spec.folder, "model": spec.model, "stages": [stage], "save": {"every_s": 1e9}}
        | {"features": {"use": "off"}}  # every step reads the same pictures, which no peer remembers
        | {"samples": {"prompts": 0}, "threads": spec.threads, **(spec.run or {})},
    )
    given = talks(spec.samples, equal=spec.equal, image_id=int(model.config.image_token_id))
    needed = operations(given, spec.shape, spec.train, int(LORA["rank"]))
    trainer = Trainer(
        run,
        run.stages[0],
        model,
        processor,
        InMemory(given, run.stages[0].row_tokens, turns),  # type: ignore[arg-type]
        (),
        Path(spec.folder),
        0,
        Console(quiet=True),
        on_step=lambda metrics: turns.done(metrics.tokens, metrics.loss, needed),
    )
    same_adapters(model)
    trainer.train()


class InMemory:
    """Stands in for avlm's loader: the same samples in every step, packed when a step is wanted."""

    def __init__(self, given: list[Talk], row_tokens: int, turns: Turns) -> None:
        from types import SimpleNamespace

        pictures = [picture(i) for i in range(PICTURES)]
        self.samples = [encoded(talk, i, pictures) for i, talk in enumerate(given)]
        self.row_tokens, self.turns = row_tokens, turns
        self.source = SimpleNamespace(errors=[], name="samples in memory")
        self.rows, self.left_out = range(len(given)), []
        self.plan = SimpleNamespace(opening_steps=0)

    def steps(self, first: int, last: int) -> Iterator[Any]:
        from avlm.data.encode import pack
        from avlm.data.loader import StepData
        from avlm.data.planning.packing import pack_rows

        for k in range(first, last):
            if not self.turns.wait():
                os._exit(0)  # what a run writes at its end is no part of a step
            rows = pack_rows([len(s) for s in self.samples], self.row_tokens)
            yield StepData(k, [pack([self.samples[i] for i in row]) for row in rows], num_samples=len(self.samples))


# ---------------------------------------------------------------- transformers' Trainer


class InDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples as transformers' Trainer takes them."""

    def __init__(self, given: list[Talk], made: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.given, self.made = given, made
        self.pictures = [picture(i) for i in range(PICTURES)]

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, number: int) -> dict[str, Any]:
        talk = self.given[number]
        item = {"input_ids": torch.tensor(talk.ids), "labels": torch.tensor(labels(talk))}
        return self.made(item if talk.picture is None else {**item, "pixel_values": self.pictures[talk.picture]})


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as LLaVA's own collator makes it: padded at its end to its longest sample."""
    ids = pad_sequence([item["input_ids"] for item in items], batch_first=True, padding_value=0)
    batch = {
        "input_ids": ids,
        "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(item["input_ids"]) for item in items], batch_first=True),
    }
    pictures = [item["pixel_values"] for item in items if "pixel_values" in item]
    return {**batch, "pixel_values": torch.stack(pictures)} if pictures else batch


def of_transformers(spec: Spec, turns: Turns) -> None:
    """transformers' Trainer on its own LLaVA, with PEFT where adapters are trained."""
    from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

    model = LlavaForConditionalGeneration.from_pretrained(spec.model, dtype=getattr(torch, spec.precision))
    freeze(model, spec)
    more = {"train_sampling_strategy": "sequential"}
    _race(spec, turns, model, Trainer, TrainingArguments, padded, arguments=more)


def freeze(model: Any, spec: Spec) -> None:
    """Train the parts of transformers' LLaVA that are asked for, and no other."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if spec.train == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = rf".*language_model\..*\.({'|'.join(LINEAR)})"
        inject_adapter_in_model(LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=targets), model)
        same_adapters(model)
    elif spec.train == "full":
        for part in (model.model.language_model, model.lm_head):
            part.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)


def _race(
    spec: Spec,
    turns: Turns,
    model: Any,
    kind: type,
    settings: type,
    collate: Callable[..., Any] | None,
    *,
    arguments: dict[str, Any],
    items: Callable[[dict[str, Any]], dict[str, Any]] = lambda item: item,
    **more: Any,
) -> None:
    """A trainer of transformers' make, step by step."""
    from transformers import TrainerCallback

    given = talks(spec.samples, equal=spec.equal, image_id=int(model.config.image_token_id))
    tokens = sum(len(talk.ids) for talk in given)

    class Watched(kind):  # type: ignore[misc]
        """Tells the losses of a step's micro-batches, which the Trainer adds up."""

        loss = 0.0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            self.loss += float((found[0] if isinstance(found, tuple) else found).detach())
            return found

    class Waits(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not turns.wait():
                os._exit(0)
            trainer.loss = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.done(tokens, trainer.loss)

    chosen = settings(
        output_dir=spec.folder,
        per_device_train_batch_size=spec.micro_batch,
        gradient_accumulation_steps=spec.samples // spec.micro_batch,
        max_steps=10_000,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **arguments,
    )
    if collate is not None:
        more["data_collator"] = collate
    trainer = Watched(model=model, args=chosen, train_dataset=InDataset(given, items), **more)
    trainer.add_callback(Waits())
    trainer.train()


# ---------------------------------------------------------------- ms-swift


def of_swift(spec: Spec, turns: Turns) -> None:
    """ms-swift's trainer and collator: padded, with logits from a micro-batch's first target on.

    At a micro-batch of 1 nothing is padded, and logits are made at targets only.
    """
    from swift import Seq2SeqTrainer, Seq2SeqTrainingArguments, get_model_processor, get_template

    loaded, processor = get_model_processor(
        spec.model, torch_dtype=getattr(torch, spec.precision), device_map="cpu", model_type="llava1_5_hf",
        attn_impl="sdpa",
    )  # fmt: skip
    template = get_template(processor, template_type="llava1_5_hf")
    template.set_mode("train")
    template.init_processor(processor)
    freeze(loaded, spec)
    loaded.model_dir = spec.model
    settings = {"check_model": False, "train_dataloader_shuffle": False, "dataloader_num_workers": 0}
    kinds = Seq2SeqTrainer, Seq2SeqTrainingArguments, None  # the collator is its template's
    _race(spec, turns, loaded, *kinds, arguments=settings, items=_swift_item, template=template)


def _swift_item(item: dict[str, Any]) -> dict[str, Any]:
    """A sample as ms-swift's template encodes it."""
    made = {"input_ids": item["input_ids"].tolist(), "labels": item["labels"].tolist()}
    made["length"] = len(made["input_ids"])
    return {**made, "pixel_values": item["pixel_values"][None]} if "pixel_values" in item else made


SIDES: dict[str, Callable[[Spec, Turns], None]] = {
    "avlm": of_avlm,
    "transformers": of_transformers,
    "ms-swift": of_swift,
}


if __name__ == "__main__":
    main()
