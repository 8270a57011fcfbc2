"""Memory that is freed stays with the process, until it is asked to give it back."""

import platform
import subprocess
import sys

import pytest

from avlm.models.memory import give_memory_back, keep_freed_memory

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
PROGRAM = """
import resource, sys
import torch
from avlm.models.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
c = torch.ones(32 * 2**20 // 4)
for step in range(40):
    if step == 32:
        before = faults()
    r = c + c
    del r
print(faults() - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@GLIBC
def test_a_large_tensor_is_not_given_back_and_asked_for_again() -> None:
    """Eight times 32 MB are 65,536 pages of 4 kB; each that comes new from the system is a fault.

    The first steps do not count: until the heap has found places that fit, an allocation may still make it grow.
    """
    assert 8 * faults("keep") < faults("as it is")


@GLIBC
def test_what_is_free_in_the_middle_of_memory_goes_back() -> None:
    """In a process of its own, whose memory nobody else moves."""
    script = """
import os
from pathlib import Path
from avlm.models.memory import give_memory_back, keep_freed_memory
keep_freed_memory()
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
before = held()
blocks = [bytes(20_000) for _ in range(5_000)]
last = bytes(20_000)
del blocks
free = held() - before
give_memory_back()
print(free, held() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    free, left = map(int, done.stdout.split())
    assert free > 80 and left < 20


def test_nothing_happens_where_the_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("was asked"))
    give_memory_back()
    keep_freed_memory()
