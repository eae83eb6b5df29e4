"""How the programs here begin and end; and for those on the library: building what they run, a BPF file system
of their own, and a mirror in it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Callable, Optional

from .errors import BenchError
from .kernel_side import PINS, KernelSide
from .progress import Progress

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_AGAIN = "ADAPTIVE_BENCH_STARTED"


def build(*goals: str, setup=()) -> None:
    """Installs the packages that are missing and builds what is not up to date. Once: not in the process that
    in_own_bpffs() makes of this one. Not in a bundle (scripts/bundle), which has all that it needs.
    """
    if _AGAIN in os.environ or not os.path.isdir(os.path.join(ROOT, "src")):
        return
    # Not a part of a make that may be running us.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    for command in (["scripts/setup", *setup], ["make", "-s", "-f", "build.mk", *goals]):
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)
        if done.returncode != 0:
            raise BenchError(f"{' '.join(command)} failed")


def in_own_bpffs() -> None:
    """Runs this program again where /sys/fs/bpf is its own, so that no mirror of the machine is touched, and where all that
    it starts ends with it, however it ends.
    """
    if _AGAIN not in os.environ:
        os.environ[_AGAIN] = "1"
        runner = os.path.join(ROOT, "scripts", "private-bpffs")
        sys.stdout.flush()
        os.execv(runner, [runner, sys.executable, *sys.argv])


def built(name: str) -> str:
    return os.path.join(ROOT, "build", name)


def load_mirror(stack: ExitStack) -> Optional[str]:
    """None, or why the kernel keeps none. It is taken out with the stack, if it was not there before."""
    if os.geteuid() == 0 and "NO_BPF" in os.environ and not os.path.isdir(PINS):
        return os.environ["NO_BPF"]  # there is only the machine's own BPF file system, which is not ours
    kernel = KernelSide(built("schedmirror"), group="root")
    stack.callback(kernel.unload)
    return kernel.load()


def guarded(name: str, progress: Progress, body: Callable[[ExitStack], None]) -> int:
    """Runs the body; whatever ends it, a signal too, everything on its stack is taken down. The exit code."""
    stopping = []

    def end(signum, _frame):
        # The first signal ends the program; more must not disturb the clean-up.
        if not stopping:
            stopping.append(signum)
            raise KeyboardInterrupt

    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, end)
    stack = ExitStack()
    try:
        body(stack)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        progress.end()
        print(f"{name}: interrupted, taking everything down", file=sys.stderr)
        return 128 + stopping[0]
    except (BenchError, OSError) as error:
        progress.end()
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    finally:
        stopping.append(0)
        stack.close()


def publish(command: str, args, results, report) -> None:
    """Where the options --json and --report want it, and as text. `report`: the module that knows these results."""
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results.as_json(), f, indent=1)
            f.write("\n")
    print(report.text_table(results))
    if args.report:
        path = report.write(args.report, results, command + " " + " ".join(map(shlex.quote, sys.argv[1:])))
        print(f"report: {path}")
