"""A run's lives: `avlm` in processes that end at a chosen moment, forked from one that has everything imported.

The moments are counted: each time that Python touches the run's directory (opens, makes, renames, removes), and each of
the pieces in which this process writes a checkpoint's tensors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = """
import itertools, json, os, resource, signal, sys, threading, time
import torch
import avlm.cli, avlm.eval.benchmarks, avlm.training.chain, avlm.training.report
from avlm.training import checkpoint
from safetensors.torch import save

torch.set_num_threads(1)


def live(job, told):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(told, 1)  # a pipe, which has room when files have none
    os.dup2(told, 2)
    os.close(told)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    own, count = os.getpid(), itertools.count(1)

    def touch():
        if os.getpid() != own:
            return
        at = next(count)
        if at == job.get("at"):
            os.kill(own, job["number"])
        if at in job.get("full", ()):
            room = 2048 if at == job["full"][0] else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    def touches(event, arguments):
        if event == "open" or event.startswith(("os.", "shutil.")):
            inside = any(isinstance(a, (str, os.PathLike)) and job["out"] in os.fspath(a) for a in arguments)
            if inside or event in ("os.remove", "os.rmdir"):
                touch()

    def in_pieces(tensors, path):
        data = save(tensors)
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(data), len(data) // 16 + 1):
                touch()
                piece = data[start : start + len(data) // 16 + 1]
                while piece:
                    piece = piece[file.write(piece) :]

    checkpoint.save_file = in_pieces
    sys.addaudithook(touches)
    sys.argv = ["avlm", *job["arguments"]]
    status = 1
    try:
        avlm.cli.main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    print("touched", next(count) - 1, file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def keep(told, name):
    with open(told, "rb") as lines, open(name, "wb") as file:
        file.write(lines.read())


for line in sys.stdin:
    job = json.loads(line)
    began = time.monotonic()
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        live(job, tells)
    os.close(tells)
    keeper = threading.Thread(target=keep, args=(told, job["told"]))
    keeper.start()
    if "after_s" in job:
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() - began > job["after_s"]:
                os.kill(child, job["number"])
                break
            time.sleep(0.002)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - began
    keeper.join()
    print(json.dumps([status, seconds]), flush=True)
"""


@dataclass(frozen=True)
class Life:
    status: int
    seconds: float
    told: str

    def touched(self) -> int:
        return int(self.told.rsplit("touched", 1)[1])


class Lives:
    """Runs of ``avlm train CONFIG``, one after the other.

    Args:
        config: The run's settings as a file.
        scratch: A folder for what the processes tell.
    """

    def __init__(self, config: Path, scratch: Path) -> None:
        self.config, self.told = config, scratch / "told"
        self.root = subprocess.Popen(
            [sys.executable, "-c", ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.root.kill()
        self.root.communicate()

    def live(self, out: Path, *overrides: str, **end: Any) -> Life:
        """One life of the run in a directory.

        Args:
            end: ``at=N`` touches or ``after_s=S`` seconds, with ``number=SIGNAL``; ``full=(a, b)``: from touch a to
                touch b there is no room for files of more than 2 KB.
        """
        assert self.root.stdin is not None and self.root.stdout is not None
        self.told.unlink(missing_ok=True)
        arguments = ["train", str(self.config), f"out={out}", *overrides]
        job = {"out": str(out), "told": str(self.told), "arguments": arguments, **end}
        self.root.stdin.write(json.dumps(job) + "\n")
        self.root.stdin.flush()
        status, seconds = json.loads(self.root.stdout.readline())
        return Life(status, seconds, self.told.read_text())
