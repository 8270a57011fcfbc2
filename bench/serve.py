"""A server under load: many clients against one at a time, and ten thousand requests without growth of memory.

    python bench/serve.py [--model DIR] [--clients 32] [--each 4] [--requests 10000] [--out FOLDER]

throughput  answers of the same length to the same questions, one client that waits for each against many at once; the
            two take turns, and a figure is the best of the rounds. Every answer of the many must be the one that was
            given alone: none is lost, and none is another's.
memory      what the server and its workers hold while requests of every kind come: text, pictures, sounds, streams,
            clients that leave, requests that are refused. Told are the median about the first tenth of them, when
            caches are full, and that of the last tenth, since what a step needs comes and goes. Counted are resident
            pages of no file, those that processes share once: libraries are shared with whatever else runs.

The server is a process of its own, started by `avlm serve`. Without ``--model`` it is a small model of random weights,
whose answers end at their length. The clients share the machine with it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from harness import Figures, judged, machine, written
from PIL import Image

TOKENS = 32
"""Of each answer."""
LONGEST = 300
"""Of one that nobody waits for."""
TIMES = 3.0
GROWTH = 0.02
"""Wanted: so many times the throughput, and at most so much more memory at the end than after a tenth."""
KEPT_MB = 64
"""What the server may remember between requests: little, so that it is full by the time that memory is looked at."""
WORDS = "What is number 0 1 2 3 4 5 6 7 8 9 and what do you hear or see here? red blue green"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path) -> None:
    """A small model with eyes and ears, of random weights."""
    from avlm.config.connectors import MlpConnector
    from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
    from avlm.convert.compose import compose
    from avlm.convert.weights import save_model

    llama = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    llama |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    eyes = {"model_type": "siglip_vision_model", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    eyes |= {"num_attention_heads": 4, "image_size": 112, "patch_size": 14}
    ears = {"model_type": "whisper", "d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4}
    ears |= {"encoder_ffn_dim": 256, "num_mel_bins": 80, "max_source_positions": 500}
    config = ModelConfig(
        language=LanguagePart(random=llama, chat_template=TEMPLATE, vocabulary=2000),
        vision=VisionPart(encoder=Source(random=eyes)),
        audio=AudioPart(encoder=Source(random=ears), connector=MlpConnector(stack=4)),
    )
    made = compose(config, seed=0, texts=[WORDS] * 30)
    made.model.generation_config.eos_token_id = None
    save_model(made.model, made.processor, folder)


@contextmanager
def serving(model: Path, *settings: str) -> Iterator[tuple[int, str]]:
    """The server's process and its address."""
    command = [sys.executable, "-m", "avlm", "serve", str(model), "--port", "0", *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the server did not start"
        yield process.pid, found[0]
    finally:
        process.terminate()
        process.wait(60)


def resident(process: int) -> int:
    """Bytes in memory of a process and those that it started, shared ones once (Linux' PSS), without files."""
    total = 0
    for one in (process, *_below(process)):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def _below(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_below(child)]
    return found


# ---------------------------------------------------------------- requests


def _picture(seed: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + _written(file)}}


def _sound(seed: int) -> dict[str, Any]:
    import soundfile

    file = io.BytesIO()
    wave = 0.1 * np.random.default_rng(seed).standard_normal(16_000).astype(np.float32)
    soundfile.write(file, wave, 16_000, format="WAV")
    return {"type": "input_audio", "input_audio": {"data": _written(file), "format": "wav"}}


def _written(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()


def question(number: int, *media: dict[str, Any], tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    """The body of a request; every number asks something else."""
    content = [*media, {"type": "text", "text": f"What is number {number}?"}]
    return {"model": "avlm", "messages": [{"role": "user", "content": content}], "max_tokens": tokens, **more}


async def answered(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """What the model says."""
    answer = await client.post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@asynccontextmanager
async def clients(url: str, count: int) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:
        yield client


async def together(count: int, jobs: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Do all jobs, so many at once."""
    gate = asyncio.Semaphore(count)

    async def one(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    return await asyncio.gather(*map(one, jobs))


# ---------------------------------------------------------------- what is measured


async def throughput(url: str, count: int, each: int, rounds: int, media: bool) -> tuple[float, float, int]:
    """Answers a second, one at a time and many at once, and how many answers were not the same."""
    bodies = [question(i, *((_picture(i),) if media and i % 2 else ())) for i in range(count * each)]
    alone_bodies = bodies[: max(8, count // 2)]
    best_alone = best_many = 0.0
    wrong = 0
    async with clients(url, count) as client:

        def jobs(of: list[dict[str, Any]]) -> list[Callable[[], Awaitable[str]]]:
            return [lambda body=body: answered(client, body) for body in of]  # type: ignore[misc]

        await together(count, jobs(bodies[:count]))  # so that all is warm
        for _ in range(rounds):
            began = time.perf_counter()
            alone = await together(1, jobs(alone_bodies))
            best_alone = max(best_alone, len(alone) / (time.perf_counter() - began))
            began = time.perf_counter()
            many = await together(count, jobs(bodies))
            best_many = max(best_many, len(many) / (time.perf_counter() - began))
            assert len(many) == len(bodies)
            wrong += sum(one != other for one, other in zip(alone, many, strict=False))
    return best_alone, best_many, wrong


async def endure(url: str, process: int, requests: int, count: int) -> tuple[list[tuple[int, int]], int]:
    """Send requests of every kind; what the server held after how many, and how many were answered."""
    rng = random.Random(0)
    media = [_picture(i) for i in range(40)] + [_sound(i) for i in range(40)]
    samples: list[tuple[int, int]] = []
    done = good = 0
    async with clients(url, count) as client:

        async def one(number: int) -> None:
            nonlocal done, good
            how = rng.randrange(10)
            part = rng.choice(media) if how % 2 else None
            body = question(number, *((part,) if part else ()), tokens=8)
            if how == 8:  # a client that leaves
                async with client.stream(
                    "POST", "/chat/completions", json={**body, "stream": True, "max_tokens": LONGEST}
                ) as s:
                    async for _ in s.aiter_lines():
                        break
            elif how == 9:  # one that is refused
                broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                assert (await client.post("/chat/completions", json=question(number, broken))).status_code == 400
            elif how == 7:
                async with client.stream("POST", "/chat/completions", json={**body, "stream": True}) as s:
                    lines = [line async for line in s.aiter_lines() if line]
                assert lines[-1] == "data: [DONE]"
            else:
                await answered(client, body)
            good += 1
            done += 1
            if done % max(1, requests // 40) == 0:
                samples.append((done, resident(process)))

        # Keys and values of a running batch grow with its longest answers and stay: they are as large as they get now.
        longest = [question(-n, rng.choice(media), tokens=LONGEST) for n in range(count)]
        await together(count, [lambda body=body: answered(client, body) for body in longest])  # type: ignore[misc]
        await together(count, [lambda n=n: one(n) for n in range(requests)])  # type: ignore[misc]
    return samples, good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--each", type=int, default=4, help="requests of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000, help="for the memory; 0 leaves it out")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    speed = Figures(
        "serve", f"{asked.clients} clients at once against one at a time", ["what", "alone", "at once", "ratio", "bar"]
    )
    memory = Figures("serve_memory", "Memory of a server", ["requests", "resident, MB", "growth", "bar"])
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or Path(folder) / "model"
        if asked.model is None:
            make_model(model)
        settings = (f"slots={asked.clients}", f"waiting={4 * asked.clients}", f"kept_mb={KEPT_MB}")
        with serving(model, *settings) as (process, url):
            for name, media in (("answers/s, text", False), ("answers/s, every other with a picture", True)):
                alone, many, wrong = asyncio.run(throughput(url, asked.clients, asked.each, asked.rounds, media))
                verdict = judged(TIMES, many / alone >= TIMES)
                speed.rows.append([name, f"{alone:.2f}", f"{many:.2f}", f"{many / alone:.2f}", verdict])
                print(" ".join(speed.rows[-1]), f"({wrong} answers were others than alone)", flush=True)
                assert not wrong, "answers differ from those that were given alone"
        if asked.requests:
            with serving(model, *settings) as (process, url):
                samples, good = asyncio.run(endure(url, process, asked.requests, asked.clients))
            assert good == asked.requests, f"{asked.requests - good} requests were lost"
            start = median(held for done, held in samples if 0.05 <= done / asked.requests <= 0.15)
            end = median(held for done, held in samples if done / asked.requests > 0.9)
            for done, held in samples[:: max(1, len(samples) // 10)] + samples[-1:]:
                memory.rows.append([str(done), f"{held / 2**20:.1f}", f"{held / start - 1:+.3f}", ""])
            told = f"{asked.requests}, the median of the last tenth"
            memory.rows.append(
                [
                    told,
                    f"{end / 2**20:.1f}",
                    f"{end / start - 1:+.3f}",
                    judged(f"{GROWTH:g}", end / start - 1 <= GROWTH),
                ]
            )
            print(memory.text(), flush=True)
    for table in (speed, *((memory,) if asked.requests else ())):
        if asked.out is not None:
            written(table, asked.out, machine())
    print(json.dumps({"speed": speed.rows}))


if __name__ == "__main__":
    main()
