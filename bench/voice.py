"""False and missed wake-ups on held-out timelines, and how long an answer goes on behind a question that interrupts it.

    python bench/voice.py MODEL TIMELINES [TIMELINES ...] --out bench/results

Each TIMELINES is a folder that ``avlm data voice`` made: voices, noises and talk that no training row has. Model time:
0.5 ms for a token that is read, 50 ms for one that is made; answers are spoken by espeak-ng and last as long as that
takes, so that there is something to be interrupted. What is judged is what happens: a sound counts as taken for a
question if it is answered or stops an answer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from harness import Figures, judged, machine, summary, written

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
MOST = 0.05
"""Of the questions may be missed, and of everything else taken for one."""
STOP_MS = 300
"""An answer stops so soon behind the last sample of a question that came into it."""


def measure(engine: Engine, timelines: Path, threshold: float = 0.5) -> Rates:
    """All timelines of a folder, one session each."""
    rates, voice = Rates(), EspeakVoice()
    for path in sorted(timelines.glob("*.jsonl")):
        mind = ModelMind(engine, ask=ASK, sampling=Sampling(max_tokens=32))
        moments, rendered = open_timeline(path)
        session = Session(mind, threshold=threshold, costs=COSTS, voice=voice)
        rates += score(moments, rendered, list(play(session, moments, rendered, path.parent)))
    return rates


def rows(where: str, rates: Rates) -> list[list[str]]:
    """Lines of the table: what, how many, of how many, the figure and its bar."""
    asked, other = len(rates.stops_ms) + rates.unstopped, rates.passed + rates.disturbed
    slowest = max(rates.stops_ms, default=0.0)
    return [
        [f"{where}: questions that nothing came of", str(rates.missed), str(rates.questions),
         f"{100 * rates.missed_rate:.1f} %", judged(f"{100 * MOST:g} %", rates.missed_rate <= MOST)],
        [f"{where}: others that were taken for a question", str(rates.false), str(rates.backgrounds),
         f"{100 * rates.false_rate:.1f} %", judged(f"{100 * MOST:g} %", rates.false_rate <= MOST)],
        [f"{where}: questions that came into an answer and stopped it", str(len(rates.stops_ms)), str(asked),
         f"{slowest:.0f} ms at most", judged(f"{STOP_MS} ms", 0 < slowest <= STOP_MS)],
        [f"{where}: others that came into an answer and left it alone", str(rates.passed), str(other), "", ""],
    ]  # fmt: skip


def main() -> None:
    """Print the figures, and write the table if a folder for it is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("timelines", type=Path, nargs="+")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for folder in given.timelines:
        if not any(folder.glob("*.jsonl")):
            parser.error(f"{folder} is no folder of timelines, and of none nothing is told. Give `avlm data voice`'s")
    table = Figures("voice", "Who was meant: a model that listens all the time, on held-out timelines",
                    ["what", "how many", "of", "figure", "bar"])  # fmt: skip
    engine = Engine(*load_model(given.model), slots=1)
    for folder in given.timelines:
        began, rates = time.process_time(), measure(engine, folder, given.threshold)
        where = f"{len(list(folder.glob('*.jsonl')))} timelines, seed {seed(folder)}"
        print(f"{where}: {rates.summary()}; {time.process_time() - began:.0f} s of processor time")
        for line in rates.wrong:
            print(f"  {line}")
        table.rows += rows(where, rates)
    print(f"\n{table.text()}")
    if given.out is not None:
        written(table, given.out, machine())
        (given.out / "bars.md").write_text(summary(given.out))


def seed(timelines: Path) -> str:
    """What the timelines were drawn with."""
    about = timelines.parent / "voice.json"
    return str(json.loads(about.read_text())["settings"]["seed"]) if about.is_file() else "unknown"


if __name__ == "__main__":
    main()
