"""Commands of ``avlm``, forked from a process that has everything imported: that takes most of a short one's time."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = """
import gc, json, os, sys
import torch
import avlm.cli, avlm.eval.benchmarks, avlm.eval.check, avlm.training.chain, avlm.training.report

torch.set_num_threads(1)
gc.collect()
gc.freeze()


def live(job):
    os.chdir(job["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job["told"][number - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, name, open(number, "w", closefd=False))
    sys.argv = ["avlm", *job["arguments"]]
    status = 1
    try:
        avlm.cli.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        live(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """``avlm ARGUMENTS``, one after the other.

    Args:
        scratch: A folder for what the processes print.
    """

    def __init__(self, scratch: Path) -> None:
        self.told = [str(scratch / "stdout"), str(scratch / "stderr")]
        self.root = subprocess.Popen(
            [sys.executable, "-c", ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.root.stdin is not None
        self.root.stdin.close()
        self.root.wait(20)

    def run(self, arguments: list[str], folder: Path) -> str:
        """One command in a folder, which has to end well; what it printed."""
        assert self.root.stdin is not None and self.root.stdout is not None
        job = {"arguments": arguments, "folder": str(folder), "told": self.told}
        self.root.stdin.write(json.dumps(job) + "\n")
        self.root.stdin.flush()
        status = self.root.stdout.readline().strip()
        stdout, stderr = (Path(told).read_text() for told in self.told)
        assert status == "0", f"avlm {shlex.join(arguments)}: {status}\n{stdout}\n{stderr}"
        return stdout
