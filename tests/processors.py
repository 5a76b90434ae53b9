"""Repeats the tests marked `trains` as other processors would run them: other kernels, seeds and thread counts.

The order of floating-point sums differs between processors, and training enlarges that difference. What these tests
claim must hold on all of them. Without `--second` each seed runs under every instruction set that this processor has,
with one and two threads in turn.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import torch

TESTS = Path(__file__).parent

# Tests that compare runs with each other, in processes that are killed, stopped or several: what they claim does not
# depend on the instruction set, and `--second` leaves them out
OF_RUNS = {"test_killing.py", "test_stopping.py", "test_sharding.py", "test_distributed.py", "test_shards_buckets.py"}

# Instruction sets that can be forced, with the limits for oneDNN and MKL, which choose kernels for themselves
FORCED = {"default": ("SSE41", "SSE4_2"), "avx2": ("AVX2", "AVX2")}
ALL = (*FORCED, "avx512")  # from the plainest on


def found() -> str:
    """The instruction set that torch's kernels choose here."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    return best if best in ALL else "default"


def run(instructions: str | None, seed: int, threads: int, *, without: Collection[str] = ()) -> bool:
    """Whether the marked tests hold, those of some files left out; without `instructions` the libraries choose."""
    own = {"METR_TEST_SEED": str(seed), "METR_TEST_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    if instructions is not None:
        onednn, mkl = FORCED[instructions]
        own |= {"ATEN_CPU_CAPABILITY": instructions, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
    print(f"-- {instructions or 'as it is'}, seed {seed}, threads {threads}", flush=True)
    marked = [
        str(path)
        for path in sorted(TESTS.rglob("test_*.py"))
        if path.name not in without and "mark.trains" in path.read_text("utf-8")
    ]
    workers = str(min(8, max(1, (os.cpu_count() or 1) // threads)))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "trains", "-n", workers, "--dist", "worksteal", *marked]
    return subprocess.run(command, env={**os.environ, **own}, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 on")
    what = "only seed 0, with the next plainer instructions, without tests of several or stopped processes"
    parser.add_argument("--second", action="store_true", help=what)
    arguments = parser.parse_args()
    best = found()
    here = ALL[: ALL.index(best) + 1]
    for name in ALL[len(here) :]:
        print(f"SKIPPED {name}: this processor has {best} at most")
    if arguments.second:
        plan = [(here[max(0, len(here) - 2)], 0, 1)]
    else:
        settings = [None, *here[:-1]]  # None: the best, with whatever oneDNN and MKL add to it
        plan = [
            (name, seed, 1 + (seed + number) % 2)
            for seed in range(arguments.seeds)
            for number, name in enumerate(settings)
        ]
    without = OF_RUNS if arguments.second else ()
    failed = [one for one in plan if not run(*one, without=without)]
    for name, seed, threads in plan:
        result = "FAILED" if (name, seed, threads) in failed else "passed"
        print(f"{result} {name or f'{best} (as it is)'}, seed {seed}, threads {threads}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
