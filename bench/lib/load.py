"""One measured run: pgbench against a server, for a window of time in the middle of which nothing starts
or ends.

pgbench makes all its connections first; the window opens after a warm-up and closes before pgbench is told to
stop. Rates come from the per-transaction log: a transaction that is only partly inside the window counts with
that part, so that a few long transactions are counted as exactly as many short ones.
"""

import glob
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import List, Tuple

from . import processes
from .cluster import last_line
from .errors import BenchError
from .workloads import Workload

WARM_UP = 0.15
CONNECT_TIMEOUT = 60
# A run may outlast its window by the transactions under way when it ends.
FINISH_TIMEOUT = 120


@dataclass
class Sample:
    tps: float
    cpu_seconds_per_1000_tx: float
    latency_p99_ms: float
    sleeps_per_1000_tx: float
    longest_wait_ms: float  # for the generator's lock, of the whole run; 0: another workload
    transactions: int


def measure(server, pgbench: str, workload: Workload, clients: int, seconds: float, log_dir: str,
            protocol: str = "prepared") -> Sample:
    """`server` is a Cluster or a Pgbouncer."""
    prefix = os.path.join(log_dir, "transactions")
    script = os.path.join(log_dir, os.path.basename(workload.script()))
    _publish(workload.script(), script)

    variables = {"clients": clients}
    if workload.lock:
        variables.update(workload.lock.variables())
    args = [pgbench, "-n", "-M", protocol, "-c", str(clients), "-j", "1", "-T", str(int(seconds) + CONNECT_TIMEOUT),
            "-l", "--log-prefix", prefix, "-f", script, "-U", "postgres"]
    for name, value in variables.items():
        args += ["-D", f"{name}={value}"]
    args += server.address() + ["postgres"]

    if workload.lock:
        server.longest_wait()  # from now on
    roots = server.pids()
    idle_children = sum(len(processes.children(pid)) for pid in roots)
    with open(os.path.join(log_dir, "pgbench.err"), "w+") as errors:
        process = processes.start(args, signal.SIGTERM, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            _wait_until_connected(process, clients)
            time.sleep(WARM_UP)
            before = processes.Usage(roots)
            time.sleep(seconds)
            after = processes.Usage(roots)
            if process.poll() is None:
                # As its own timer would: finish what is under way, then end.
                process.send_signal(signal.SIGALRM)
            try:
                code = process.wait(FINISH_TIMEOUT)
            except subprocess.TimeoutExpired:
                raise BenchError(f"{workload.name} with {clients} clients did not end within {FINISH_TIMEOUT} s")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        message = errors.read()
    logs = glob.glob(prefix + ".*")
    try:
        if code != 0 or "aborted" in message:
            raise BenchError(f"{workload.name} with {clients} clients failed: {last_line(message)}")
        finished = read_log(logs)
    finally:
        for path in logs:
            os.unlink(path)
    _wait_until_idle(roots, idle_children)

    count, latencies = in_window(finished, before.when, after.when)
    if count <= 0:
        raise BenchError(f"{workload.name} with {clients} clients: no transaction in {seconds} s")
    cpu = after.cpu_seconds - before.cpu_seconds
    return Sample(tps=count / (after.when - before.when), cpu_seconds_per_1000_tx=1000 * cpu / count,
                  latency_p99_ms=percentile(latencies, 99) / 1000,
                  sleeps_per_1000_tx=1000 * after.sleeps_since(before) / count,
                  longest_wait_ms=server.longest_wait() if workload.lock else 0.0, transactions=len(latencies))


def read_log(paths: List[str]) -> List[Tuple[float, int]]:
    """(end in seconds since 1970, latency in microseconds) of every transaction."""
    finished = []
    for path in paths:
        with open(path) as log:
            for line in log:
                # client, transaction, latency, script, seconds, microseconds
                fields = line.split()
                finished.append((int(fields[4]) + int(fields[5]) / 1e6, int(fields[2])))
    return finished


def in_window(finished: List[Tuple[float, int]], begin: float, end: float) -> Tuple[float, List[int]]:
    """How many transactions fell into the window (with fractions), and the latencies of those that touched
    it.
    """
    count = 0.0
    latencies = []
    for stop, latency in finished:
        length = max(latency, 1) / 1e6
        inside = min(stop, end) - max(stop - length, begin)
        if inside > 0:
            count += inside / length
            latencies.append(latency)
    return count, latencies


def percentile(values: List[int], percent: float) -> float:
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]) if ordered else 0.0


def _publish(source: str, copy: str) -> None:
    with open(source) as f:
        text = f.read()
    with open(copy, "w") as f:
        f.write(text)
    os.chmod(copy, 0o644)


def _wait_until_connected(process: subprocess.Popen, clients: int) -> None:
    """pgbench connects one client after the other before it starts the load: its sockets tell how far it
    is.
    """
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return
        sockets = 0
        try:
            for fd in os.scandir(f"/proc/{process.pid}/fd"):
                sockets += os.readlink(fd.path).startswith("socket:")
        except OSError:
            pass
        if sockets >= clients:
            return
        time.sleep(0.005)
    raise BenchError(f"{clients} clients could not connect within {CONNECT_TIMEOUT} s")


def _wait_until_idle(roots: List[int], idle_children: int) -> None:
    """Until this run's backends are gone: they would take CPU from the next run. A pool keeps its own."""
    for _ in range(100):
        if sum(len(processes.children(pid)) for pid in roots) <= idle_children:
            return
        time.sleep(0.01)
