"""Model FLOPs utilisation of a training step on one NVIDIA GPU, and where the rest of the time goes.

    python bench/gpu.py [CASE ...] [--steps 8] [--out FOLDER]

Written without a GPU at hand: no figure of it has been taken yet, and no table lies in ``results/``. It draws the
weights itself, in the shapes of an 8-billion Llama (with 32,000 words) and CLIP-L, so nothing is downloaded; random
weights compute as fast as released ones. Each case trains a few steps in bfloat16 on samples as long as LLaVA-1.5's,
counts the operations of a step as torch counts them (which leaves out what it does not know, such as attention in a
kernel of its own), and divides by the device's own matrix peak, measured with the same library in the same minute. The
profile names the kernels that take the most time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"num_key_value_heads": 8}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CASES: dict[str, dict[str, Any]] = {
    "connector": {"vision_connector": {"lr": 1e-3}},
    "lora": {"vision_connector": {"lr": 1e-4}, "language": {"lr": 1e-4, "lora": {"rank": 128, "alpha": 256}}},
}
SAMPLES, ROW_TOKENS = 64, 8192
"""Samples are packed into rows of so many tokens, one row at a time."""


def peak() -> float:
    """The device's bfloat16 matrix peak as a large product reaches it, in operations a second."""
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        torch.cuda.synchronize()
        best = max(best, 5 * 2 * side**3 / (time.perf_counter() - began))
    return best


def case(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Seconds a step, and what share of the peak they are, without the first two."""
    from train_material import MODELS, encoded, make_model, picture, talks

    from avlm.config.stage import Stage
    from avlm.data.encode import pack
    from avlm.data.planning.packing import pack_rows
    from avlm.models.precision import cast_weights
    from avlm.training.loss import row_loss
    from avlm.training.stages import make_optimizer, prepare, set_modes

    MODELS["8b"] = {"tower": CLIP_L, "language": LLAMA_8B}
    model, _ = make_model("8b", folder)
    cast_weights(model, torch.bfloat16)
    model.to("cuda")
    stage = Stage.model_validate({"name": name, "train": CASES[name], "steps": steps, "row_tokens": ROW_TOKENS})
    trained = prepare(model, stage)
    optimizer = make_optimizer(trained, stage)
    set_modes(model, trained)
    given = talks(SAMPLES, equal=False, image_id=int(model.config.image_token_id))
    pictures = [picture(i) for i in range(8)]
    samples = [encoded(talk, i, pictures) for i, talk in enumerate(given)]
    rows = [pack([samples[i] for i in row]) for row in pack_rows([len(s) for s in samples], ROW_TOKENS)]
    for row in rows:
        for field in ("input_ids", "labels", "position_ids", "pixel_values"):
            value = getattr(row, field)
            setattr(row, field, None if value is None else value.to("cuda"))

    def step() -> None:
        for row in rows:
            (row_loss(model, row) / SAMPLES).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    step()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    top, best = peak(), min(seconds)
    return {
        "case": name,
        "seconds": best,
        "tokens_per_s": sum(len(talk.ids) for talk in given) / best,
        "counted_flops": counter.get_total_flops(),
        "peak_flops_per_s": top,
        "utilisation": counter.get_total_flops() / best / top,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
        "profile": seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=20),
    }


def main() -> None:
    """Print each case, and write them all."""
    import tempfile

    from harness import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py: there is no CUDA device here, and nothing else is measured. Run it on one")
    device = torch.cuda.get_device_name()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.cases:
            found.append(case(name, asked.steps, Path(folder)))
            print(f"{name}: {found[-1]['utilisation']:.1%} of {found[-1]['peak_flops_per_s'] / 1e12:.0f} TFLOP/s,")
            print(f"  {found[-1]['tokens_per_s']:.0f} tokens/s, {found[-1]['peak_gb']:.1f} GB\n{found[-1]['profile']}")
            torch.cuda.empty_cache()
    path = asked.out / "gpu" / f"{device.replace(' ', '_').lower()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": {**machine(), "device": device}, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
