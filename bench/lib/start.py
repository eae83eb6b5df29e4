"""What the programs on the library do before they begin: build what they run, and get a BPF file system of
their own.
"""

import os
import subprocess
import sys

from .errors import BenchError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_AGAIN = "ADAPTIVE_BENCH_STARTED"


def build(*goals: str, setup=()) -> None:
    """Installs the packages that are missing and builds what is not up to date. Once: not in the process that
    in_own_bpffs() makes of this one.
    """
    if _AGAIN in os.environ:
        return
    for command in (["scripts/setup", *setup], ["make", "-s", "-f", "src/build.mk", *goals]):
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        if done.returncode != 0:
            raise BenchError(f"{' '.join(command)} failed")


def in_own_bpffs() -> None:
    """Runs this program again where /sys/fs/bpf is its own, so that no mirror of the machine is touched."""
    if _AGAIN not in os.environ:
        os.environ[_AGAIN] = "1"
        runner = os.path.join(ROOT, "scripts", "private-bpffs")
        sys.stdout.flush()
        os.execv(runner, [runner, sys.executable, *sys.argv])


def built(name: str) -> str:
    return os.path.join(ROOT, "build", name)
