"""False and missed wake-ups on held-out timelines, and how long an answer goes on behind a question that interrupts it.

    python bench/voice.py MODEL TIMELINES

TIMELINES is the folder that ``avlm data voice`` made: voices, noises and talk that no training row has. Model time:
0.5 ms for a token that is read, 50 ms for one that is made; answers are spoken by espeak-ng and last as long as that
takes, so that there is something to be interrupted. What is judged is what happens: a sound counts as taken for a
question if it is answered or stops an answer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from avlm.convert.weights import load_model
from avlm.data.voice.build import ASK
from avlm.inference.engine import Engine
from avlm.inference.live.drive import open_timeline, play
from avlm.inference.live.mind import ModelMind
from avlm.inference.live.score import Rates, score
from avlm.inference.live.session import Costs, Session
from avlm.inference.live.voice import EspeakVoice
from avlm.inference.sampling import Sampling

COSTS = Costs(prompt_token_ms=0.5, token_ms=50.0)


def measure(model: str, timelines: Path, threshold: float = 0.5) -> Rates:
    """All timelines of a folder, one session each."""
    engine = Engine(*load_model(model), slots=1)
    rates, voice = Rates(), EspeakVoice()
    for path in sorted(timelines.glob("*.jsonl")):
        mind = ModelMind(engine, ask=ASK, sampling=Sampling(max_tokens=32))
        moments, rendered = open_timeline(path)
        session = Session(mind, threshold=threshold, costs=COSTS, voice=voice)
        rates += score(moments, rendered, list(play(session, moments, rendered, path.parent)))
    return rates


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("timelines", type=Path)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began = time.process_time()
    rates = measure(given.model, given.timelines, given.threshold)
    print(rates.summary())
    for line in rates.wrong:
        print(f"  {line}")
    facts = {"missed": rates.missed, "questions": rates.questions, "false": rates.false, "others": rates.backgrounds}
    facts |= {"interruptions": len(rates.stops_ms), "slowest_stop_ms": max(rates.stops_ms, default=None)}
    facts |= {"unstopped": rates.unstopped, "cpu_s": round(time.process_time() - began, 1)}
    if given.out is not None:
        given.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
