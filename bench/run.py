"""Speed, side by side with peers in one run, as ratios: ``make bench``.

    python bench/run.py [NAME ...] [--out FOLDER] [--threads N]

Each bench is a file of its own with a function `main` that returns tables, and runs in a process of its own with one
intra-op thread, as data workers do. ``--threads`` asks for another number. Tables are printed and written.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BENCHES = ("images", "sounds", "video", "loaders", "plan", "features")


def one(name: str, folder: Path) -> None:
    """Run one bench in this process."""
    import warnings

    import torch
    from harness import machine, written
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    for table in importlib.import_module(name).main():
        table.title += f" ({threads} intra-op thread{'' if threads == 1 else 's'})"
        written(table, folder, machine())
        print(table.text(), flush=True)


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
    threads = {"OMP_NUM_THREADS": str(asked.threads), "MKL_NUM_THREADS": str(asked.threads)}
    for name in asked.names:
        command = [sys.executable, __file__, name, "--here", "--out", str(asked.out)]
        if subprocess.run(command, env={**os.environ, **threads}).returncode:
            failed.append(name)
    print(f"{time.monotonic() - began:.0f} s, tables in {asked.out}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
