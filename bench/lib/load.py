"""One measured run: pgbench against a server, for a window of time in the middle of which nothing starts
or ends; or against several servers at once, which run in slices of time, one at a time.

pgbench makes all its connections first; the window opens after a warm-up and closes before pgbench is told to
stop. Rates come from the per-transaction log: a transaction that is only partly inside the window counts with
that part, so that a few long transactions are counted as exactly as many short ones.
"""

import bisect
import glob
import os
import signal
import subprocess
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import List, Optional, Set, Tuple

from . import processes
from .cluster import last_line
from .errors import BenchError
from .workloads import Workload

WARM_UP = 0.15
CONNECT_TIMEOUT = 60
LASTING = 86400  # we end it
# After a slice: until the servers are done with what was under way when pgbench was stopped.
SETTLE = 0.02
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
    beside: Optional["Sample"] = None  # of the load that ran at the same time


class Pgbench:
    """A load on a server (a Cluster or a Pgbouncer), from all clients being connected to close()."""

    def __init__(self, server, program: str, workload: Workload, clients: int, log_dir: str, protocol: str = "prepared"):
        self.what = f"{workload.name} with {clients} clients"
        self.roots = server.pids()
        self.clients = clients
        self.children_before = self._children()
        self.prefix = os.path.join(log_dir, f"transactions_{server.name}_{workload.name}")
        script = os.path.join(log_dir, os.path.basename(workload.script()))
        _publish(workload.script(), script)

        variables = {"clients": clients}
        if workload.lock:
            variables.update(workload.lock.variables())
        # One thread of pgbench drives some four CPUs of backends.
        threads = max(1, min(clients, len(os.sched_getaffinity(0)) // 4))
        args = [program, "-n", "-M", protocol, "-c", str(clients), "-j", str(threads), "-T", str(LASTING),
                "-l", "--log-prefix", self.prefix, "-f", script, "-U", "postgres"]
        for name, value in variables.items():
            args += ["-D", f"{name}={value}"]
        args += server.address() + ["postgres"]
        self.errors = open(self.prefix + ".err", "w+")
        # A signal that also ends a stopped process.
        self.process = processes.start(args, signal.SIGKILL, stdout=subprocess.DEVNULL, stderr=self.errors)
        try:
            _wait_until_connected(self.process, clients)
        except BaseException:
            self.close()
            raise

    def backends(self) -> List[int]:
        """Of this load, where one process serves one connection. The server may still be about to fork some."""
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while len(found := self._children() - self.children_before) < self.clients:
            if time.monotonic() > deadline:
                raise BenchError(f"{self.what}: {len(found)} backends")
            time.sleep(0.005)
        return sorted(found)

    def _children(self) -> Set[int]:
        return {child for pid in self.roots for child in processes.children(pid)}

    def send(self, sig: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(sig)

    def finish(self) -> List[Tuple[float, int]]:
        """Ends the load, a stopped one too, as its own timer would, with what is under way. Returns every transaction:
        read_log().
        """
        self.send(signal.SIGALRM)
        self.send(signal.SIGCONT)
        try:
            code = self.process.wait(FINISH_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.what} did not end within {FINISH_TIMEOUT} s")
        self.errors.seek(0)
        message = self.errors.read()
        if code != 0 or "aborted" in message:
            raise BenchError(f"{self.what} failed: {last_line(message)}")
        finished = read_log(self._logs())
        self.close()
        _wait_until_idle(self.roots, len(self.children_before))
        return finished

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.errors.close()
        for path in self._logs():
            os.unlink(path)

    def _logs(self) -> List[str]:
        return glob.glob(self.prefix + ".[0-9]*")


def measure(server, program: str, workload: Workload, clients: int, seconds: float, log_dir: str, protocol: str = "prepared",
            beside: Optional[Tuple[Workload, int]] = None) -> Sample:
    """CPU and sleeps are the server's. With another load (a workload and its clients) at the same time, `beside` the first in the sample,
    they are those of each load's own backends.
    """
    if workload.lock:
        server.longest_wait()  # from now on
    with ExitStack() as stack:
        loads, backends = [], []
        for which in [(workload, clients)] + ([beside] if beside else []):
            loads.append(stack.enter_context(closing(Pgbench(server, program, *which, log_dir, protocol))))
            backends.append(loads[-1].backends() if beside else None)
        time.sleep(WARM_UP)
        before = [processes.Usage(load.roots, own) for load, own in zip(loads, backends)]
        time.sleep(seconds)
        after = [processes.Usage(load.roots, own) for load, own in zip(loads, backends)]
        for load in loads:
            load.send(signal.SIGALRM)
        finished = [load.finish() for load in loads]
    samples = list(map(_of_window, loads, before, after, finished))
    if workload.lock:
        samples[0].longest_wait_ms = server.longest_wait()
    samples[0].beside = samples[1] if beside else None
    return samples[0]


def _of_window(load: Pgbench, before: processes.Usage, after: processes.Usage, finished: List[Tuple[float, int]]) -> Sample:
    count, latencies = in_window(finished, before.when, after.when)
    if count <= 0:
        raise BenchError(f"{load.what}: no transaction in {after.when - before.when:.1f} s")
    cpu = after.cpu_seconds - before.cpu_seconds
    return Sample(tps=count / (after.when - before.when), cpu_seconds_per_1000_tx=1000 * cpu / count,
                  latency_p99_ms=percentile(latencies, 99) / 1000,
                  sleeps_per_1000_tx=1000 * after.sleeps_since(before) / count,
                  longest_wait_ms=0.0, transactions=len(latencies))


def measure_in_slices(clusters: List, program: str, workload: Workload, clients: int, seconds: float, slice_seconds: float,
                      log_dir: str) -> List[Sample]:
    """A sample of each cluster, `seconds` long, all from the same time: every cluster has its load, and one after the other
    has the machine for `slice_seconds` while the other loads are stopped. What lasts for longer than a slice disturbs
    all of them alike.

    No latencies and waits: they would contain the stops. What is under way when a load is stopped, at most a transaction
    a client, is finished outside the slice and counted in the next one: a difference comes out too small by their share
    in a slice, so a slice should be long against a transaction of all the clients.
    """
    with ExitStack() as stack:
        loads = []
        for cluster in clusters:
            loads.append(stack.enter_context(closing(Pgbench(cluster, program, workload, clients, log_dir))))
            time.sleep(WARM_UP)
            loads[-1].send(signal.SIGSTOP)
        time.sleep(SETTLE)
        slices = {load: [] for load in loads}
        for turn in range(max(1, round(seconds / slice_seconds))):
            first = turn % len(loads)
            for load in loads[first:] + loads[:first]:
                before = processes.Usage(load.roots)
                begin = time.time()
                load.send(signal.SIGCONT)
                time.sleep(slice_seconds)
                load.send(signal.SIGSTOP)
                end = time.time()
                time.sleep(SETTLE)
                slices[load].append((begin, end, before, processes.Usage(load.roots)))
        return [_of_slices(load, slices[load], load.finish()) for load in loads]


def _of_slices(load: Pgbench, slices: List, finished: List[Tuple[float, int]]) -> Sample:
    ends = sorted(end for end, _ in finished)
    count = sum(bisect.bisect(ends, after.when) - bisect.bisect(ends, begin) for begin, _, _, after in slices)
    if count == 0:
        raise BenchError(f"{load.what}: no transaction ended in {len(slices)} slices: longer ones (--slices), or more (--seconds)")
    seconds = sum(end - begin for begin, end, _, _ in slices)
    cpu = sum(after.cpu_seconds - before.cpu_seconds for _, _, before, after in slices)
    sleeps = sum(after.sleeps_since(before) for _, _, before, after in slices)
    return Sample(tps=count / seconds, cpu_seconds_per_1000_tx=1000 * cpu / count, latency_p99_ms=0.0,
                  sleeps_per_1000_tx=1000 * sleeps / count, longest_wait_ms=0.0, transactions=count)


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
