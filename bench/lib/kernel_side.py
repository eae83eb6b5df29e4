"""The kernel's mirror of who is on a CPU: loaded for the comparison when we may, taken out again when we
loaded it.
"""

import os
import subprocess
from typing import Optional

BPF_FS = "/sys/fs/bpf"
PINS = os.path.join(BPF_FS, "schedmirror")


class KernelSide:
    def __init__(self, command: str, group: str):
        self.command = command
        self.group = group
        self.mounted = False
        self.loaded = False

    def load(self) -> Optional[str]:
        """None when the mirror is there, otherwise one line that says why it is not."""
        was_there = os.path.isdir(PINS) and bool(os.listdir(PINS))
        if os.geteuid() != 0:
            return None if was_there else "not root: the kernel side cannot be loaded (as root: schedmirror load)"
        if not os.access(self.command, os.X_OK):
            return f"{self.command} is missing (run: make)"
        if not os.path.ismount(BPF_FS):
            self.mounted = _run("mount", "-t", "bpf", "bpf", BPF_FS) is None
        # Changes nothing when it is loaded, and says so when what is loaded is of another version.
        problem = _run(self.command, "load", "--group", self.group)
        self.loaded = problem is None and not was_there
        return problem

    def unload(self) -> None:
        if self.loaded:
            _run(self.command, "unload")
            self.loaded = False
        if self.mounted:
            _run("umount", BPF_FS)
            self.mounted = False


def _run(*args: str) -> Optional[str]:
    try:
        done = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, start_new_session=True)
    except OSError as error:
        return f"{args[0]}: {error.strerror}"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else f"{args[0]} failed with exit code {done.returncode}"
