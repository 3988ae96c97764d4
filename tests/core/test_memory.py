"""Freed memory is kept: once warm, training costs no page faults."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from convscope.core.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
network = torch.nn.Sequential(torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.BatchNorm2d(16))
images = torch.randn(4, 16, 512, 512)  # 64 MiB, and so is every activation
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(images).sum().backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[2:]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_steps_of_training_cost_no_page_faults() -> None:
    def faults(word: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("leave") > 1000
    assert faults("keep") < 100
