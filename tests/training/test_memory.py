"""Memory that is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from avlm.training.memory import keep_freed_memory
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
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to keep memory")
def test_a_large_tensor_is_not_given_back_and_asked_for_again() -> None:
    """Eight times 32 MB are 65,536 pages of 4 kB; each that comes new from the system is a fault.

    The first steps do not count: until the heap has found places that fit, an allocation may still make it grow.
    """
    assert 8 * faults("keep") < faults("as it is")
