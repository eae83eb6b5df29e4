"""Starting processes that end with us, and reading what a process tree has used from /proc."""

import ctypes
import grp
import os
import pwd
import signal
import subprocess
import time
from typing import Dict, List, Optional

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_TICK = os.sysconf("SC_CLK_TCK")


def server_user() -> Optional[str]:
    """The user for servers, or None for our own: the server refuses to run as root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return "nobody"  # PostgreSQL is not installed: the servers are copies that were brought along


def server_group() -> str:
    """The group that the servers' user has, or ours."""
    user = server_user()
    return grp.getgrgid(pwd.getpwnam(user).pw_gid if user else os.getegid()).gr_name


def _identity() -> dict:
    user = server_user()
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": os.getgrouplist(user, entry.pw_gid)}


def environment() -> Dict[str, str]:
    """Ours without what would lead a PostgreSQL program somewhere else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    kept["LC_ALL"] = "C"
    return kept


def start(args: List[str], death_signal: int, as_server_user: bool = True, **options) -> subprocess.Popen:
    """Starts a process in a session of its own (a Ctrl-C is for us alone) that gets death_signal should we
    die.
    """

    parent = os.getpid()

    def die_with_parent():
        _libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:  # it died before
            os._exit(1)

    identity = _identity() if as_server_user else {}
    return subprocess.Popen(args, stdin=subprocess.DEVNULL, env=environment(), start_new_session=True,
                            preexec_fn=die_with_parent, **identity, **options)


def run(args: List[str], as_server_user: bool = True, **options) -> subprocess.CompletedProcess:
    identity = _identity() if as_server_user else {}
    return subprocess.run(args, stdin=subprocess.DEVNULL, env=environment(), text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **identity, **options)


def stop(process: subprocess.Popen, first: int, patience: float = 10) -> None:
    """Ends a process: `first`, then SIGQUIT (a server's immediate stop), then SIGKILL."""
    for sig in (first, signal.SIGQUIT, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(sig)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _stat(pid: int) -> Optional[List[str]]:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()
    except OSError:
        return None


def children(parent: int) -> List[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            stat = _stat(int(name))
            if stat and int(stat[1]) == parent:
                found.append(int(name))
    return found


def _own_cpu_seconds(pid: int) -> float:
    try:
        # To the nanosecond where the kernel keeps it; otherwise in clock ticks.
        with open(f"/proc/{pid}/schedstat") as f:
            return int(f.read().split()[0]) / 1e9
    except (OSError, IndexError, ValueError):
        stat = _stat(pid)
        return (int(stat[11]) + int(stat[12])) / _TICK if stat else 0.0


def _voluntary_switches(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                if line.startswith("voluntary_ctxt_switches:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


class Usage:
    """What a server has used up to now: CPU of the whole tree, and how often each child went to sleep. With `only`: of these
    processes alone, which must live until the next such look.
    """

    def __init__(self, roots: List[int], only: Optional[List[int]] = None):
        self.when = time.time()
        self.cpu_seconds = 0.0
        self.switches: Dict[int, int] = {}
        for root in roots if only is None else ():
            stat = _stat(root)
            # A child that ends moves its time here.
            if stat:
                self.cpu_seconds += (int(stat[13]) + int(stat[14])) / _TICK
            self.cpu_seconds += _own_cpu_seconds(root)
        for pid in [pid for root in roots for pid in children(root)] if only is None else only:
            self.cpu_seconds += _own_cpu_seconds(pid)
            self.switches[pid] = _voluntary_switches(pid)

    def sleeps_since(self, before: "Usage") -> int:
        return sum(n - before.switches.get(pid, 0) for pid, n in self.switches.items())
