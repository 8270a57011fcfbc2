"""Speed, side by side with peers in one run, as ratios: ``make bench``.

    python bench/run.py [NAME ...] [--out FOLDER] [--threads N]

Each bench is a file of its own with a function `main` that returns tables, and runs in a process of its own with one
intra-op thread, as data workers do. ``--threads`` asks for another number. Tables are written, with the bars of all of
them in ``bars.md``; printed is a line for each bench, when it begins and when it is done.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

from harness import MISSED, machine, read, summary, written

HERE = Path(__file__).parent
BENCHES = ("images", "sounds", "video", "loaders", "index", "plan", "features", "watch", "generate")


def one(name: str, folder: Path) -> None:
    """Run one bench in this process; the last line that it prints names its tables."""
    import warnings

    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    tables = importlib.import_module(name).main()
    for table in tables:
        table.title += f" ({threads} intra-op thread{'' if threads == 1 else 's'})"
        written(table, folder, machine())
    print()
    print(*(table.name for table in tables))


def told(names: list[str], folder: Path) -> str:
    """How a bench ended, by the tables that it wrote."""
    verdicts = [verdict for name in names for verdict in read(folder / f"{name}.json").verdicts()]
    missed = [f"{what} ({verdict})" for what, verdict in verdicts if verdict.endswith(MISSED)]
    if not verdicts:
        return "no bars"
    return f"{len(verdicts) - len(missed)} of {len(verdicts)} bars reached" + "".join(f"; {one}" for one in missed)


def main() -> None:
    """Run what was asked for, each bench in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=BENCHES, metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        return one(asked.names[0], asked.out)
    began, failed = time.monotonic(), []
    for number, name in enumerate(asked.names, 1):
        print(f"[{number}/{len(asked.names)}] {name:9}", end="", flush=True)
        started = time.monotonic()
        tables = apart(name, asked.out, asked.threads)
        if tables is None:
            failed.append(name)
        else:
            print(f"{time.monotonic() - started:5.0f} s  {told(tables, asked.out)}", flush=True)
    (asked.out / "bars.md").write_text(summary(asked.out))
    print(f"{time.monotonic() - began:.0f} s, tables in {asked.out}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def apart(name: str, folder: Path, threads: int) -> list[str] | None:
    """Run a bench in a process of its own; the names of its tables, or None where it failed, which is printed."""
    told = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, name, "--here", "--out", str(folder)]
    done = subprocess.run(
        command, env={**os.environ, **told}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(f" failed:\n{done.stdout}", flush=True)
        return None
    return done.stdout.splitlines()[-1].split()


if __name__ == "__main__":
    main()
