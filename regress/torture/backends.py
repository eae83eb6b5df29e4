"""Torture of a server with the module: sessions that take and check LWLocks in all ways (server/torture.h) beside
a real load, while this process torments them and watches for lost wake-ups.

A run is a series of rounds, each with a server of its own, on another source of the mirror. In the middle of a round
processes of the server are killed, after which it restarts by itself as it always does.
"""

import os
import random
import re
import select
import shutil
import signal
import subprocess
import time
from typing import Dict, List, Optional

from lib import processes
from lib.cluster import ModuleCluster

PATIENCE = 1.0  # a sleeper on a free lock, in seconds in which nobody was stopped
STALL = 30.0  # a burst, or an answer of the server
RAN = 10_000_000  # ns on a CPU after which a process no longer owes anything from before
RESTART_TIMEOUT = 90

CONF = """
max_connections = 120
restart_after_crash = on
autovacuum = on
autovacuum_naptime = 1s
checkpoint_timeout = 30s
fsync = off
log_error_verbosity = verbose
"""
LOAD_SETUP = """
CREATE TABLE IF NOT EXISTS torture_log (id bigserial PRIMARY KEY, who int, v text);
CREATE TABLE IF NOT EXISTS torture_hot (id int PRIMARY KEY, n bigint);
INSERT INTO torture_hot SELECT g, 0 FROM generate_series(1, 100) g ON CONFLICT DO NOTHING;
CREATE SEQUENCE IF NOT EXISTS torture_seq
"""
LOAD = """
\\set id random(1, 100)
INSERT INTO torture_log (who, v) VALUES (:client_id, repeat('x', 50));
SELECT count(nextval('torture_seq')) FROM generate_series(1, 20);
UPDATE torture_hot SET n = n + 1 WHERE id = :id;
"""

# What the server's log may say when sessions are cancelled and ended, processes are killed, and the server restarts:
# query_canceled, admin_shutdown, crash_shutdown, cannot_connect_now, and a connection that is gone.
EXPECTED = ("57014", "57P01", "57P02", "57P03", "08006", "08P01", "08003")
TROUBLE = re.compile(r"(?:ERROR|FATAL|PANIC):  (\w{5}):|TRAP:|stuck spinlock|lock_generator: violation|"
                     r"terminated by signal (?!9\b)")


class Violation(Exception):
    pass


class Totals:
    def __init__(self):
        self.counts: Dict[str, int] = dict.fromkeys(
            ("acquires", "contended", "bursts", "rounds", "kills", "terminations", "cancels", "stops", "moves",
             "renices", "mode switches", "mirror reloads", "violations"), 0)
        self.longest: Dict[str, float] = dict.fromkeys(("exclusive", "shared", "until free", "variable"), 0.0)
        self.seconds = 0.0

    def lines(self) -> List[str]:
        lines = [f"seconds: {self.seconds:.0f}"] + [f"{k}: {v}" for k, v in self.counts.items() if k != "violations"]
        lines += [f"longest wait, {k}, ms: {v:.3f}" for k, v in self.longest.items()]
        return lines + [f"violations: {self.counts['violations']}"]


class Control:
    """One psql that stays, for the watchdog and the settings. It may be killed like any other session."""

    END = "--end of answer--"

    def __init__(self, cluster):
        self.cluster = cluster
        self.process = None

    def ask(self, sql: str, timeout: float) -> Optional[List[List[str]]]:
        """The rows, or None without an answer."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.process = subprocess.Popen(
                [self.cluster.program("psql"), "-XAtq", "-F", "\t", "-U", "postgres", "-d", "postgres"] +
                self.cluster.address(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=processes.environment(), bufsize=0, start_new_session=True)
            self.left = b""
        try:
            self.process.stdin.write(f"{sql};\n\\echo {self.END}\n".encode())
        except OSError:
            self.close()
            return None
        deadline = time.monotonic() + timeout
        end = f"{self.END}\n".encode()
        while end not in self.left:
            ready = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))[0]
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not data:
                self.close()  # or the answer would be taken for that to the next question
                return None
            self.left += data
        answer, self.left = self.left.split(end, 1)
        return [line.split("\t") for line in answer.decode().splitlines()]

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


class Sessions:
    """Clients that come back when they have ended, however they ended."""

    def __init__(self, cluster, run_dir: str, torturers: int, loads: int, rng: random.Random):
        self.cluster, self.rng = cluster, rng
        self.running: List[Optional[subprocess.Popen]] = [None] * (torturers + loads)
        self.torturers = torturers
        self.again = True
        self.script = os.path.join(run_dir, "load.sql")
        with open(self.script, "w") as f:
            f.write(LOAD)
        os.chmod(self.script, 0o644)

    def _start(self, index: int) -> subprocess.Popen:
        if index < self.torturers:
            ms, seed = self.rng.randint(300, 6000), self.rng.getrandbits(62)
            args = [self.cluster.program("psql"), "-XAtq", "-U", "postgres", "-d", "postgres"] + self.cluster.address()
            args += ["-c", f"SELECT lock_generator_torture({ms}, {seed})"]
        else:
            args = [self.cluster.program("pgbench"), "-n", "-c", "2", "-T", str(self.rng.randint(1, 8)), "-f", self.script,
                    "-U", "postgres"] + self.cluster.address() + ["postgres"]
        return processes.start(args, signal.SIGTERM, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def tend(self) -> None:
        """Starts new ones for those that have ended."""
        for index, session in enumerate(self.running):
            if session is not None and session.poll() is not None:
                self.running[index] = None
            if self.running[index] is None and self.again:
                self.running[index] = self._start(index)

    def left(self) -> int:
        return sum(session is not None for session in self.running)

    def stop_load(self) -> None:
        self.again = False
        for session in self.running[self.torturers:]:
            if session is not None:
                session.terminate()

    def kill(self) -> None:
        for index, session in enumerate(self.running):
            if session is not None:
                session.kill()
                session.wait()
                self.running[index] = None


def _read(path: str) -> str:
    try:
        with open(path) as f:
            return f.read()
    except OSError:
        return ""


def scheduling_state(pid: int) -> str:
    return _read(f"/proc/{pid}/stat").rpartition(")")[2][1:2] or "?"


def run_time(pid: int) -> int:
    return int((_read(f"/proc/{pid}/schedstat").split() or ["0"])[0])


def sleeps(pid: int) -> str:
    return "".join(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", _read(f"/proc/{pid}/status"), re.M))


class Watchdog:
    """Looks for lost wake-ups: a process is asleep on a free lock, for more than a second in which nobody was stopped and
    nothing changed at this lock, and everybody who could still owe the wake-up has had a CPU or is asleep as well. And
    for a burst that does not end, and a server that does not answer.
    """

    QUESTION = ("SELECT 'totals', t.*, (SELECT coalesce(sum(contended), 0) FROM pg_stat_adaptive_lwlock) "
                "FROM lock_generator_torture_totals() t; SELECT 'lock', l.* FROM lock_generator_torture_locks() l")

    def __init__(self, cluster, control: Control):
        self.cluster, self.control = cluster, control
        self.ended: List[dict] = []  # the last totals before each restart
        self.totals: Optional[dict] = None
        self.restarted()

    def restarted(self) -> None:
        self.last = time.monotonic()
        self.answered = self.last
        self.stopped_ms = 0.0
        self.epoch, self.stuck = -1, 0.0
        self.suspicions: Dict[int, dict] = {}
        self.locks: List[List[str]] = []

    def look(self) -> None:
        answer = self.control.ask(self.QUESTION, 5)
        now = time.monotonic()
        rows = [row for row in answer or [] if row[0] == "totals" and len(row) == 14]
        if not rows:
            if now - self.answered > STALL:
                raise Violation(f"the server has not answered for {now - self.answered:.0f} s")
            return
        self.answered = now
        names = ("started", "epoch", "acquires", "tasks", "stops", "stopped_ms", "exclusive", "shared", "until free", "variable",
                 "violations", "violation", "contended")
        t = dict(zip(names, rows[0][1:]))
        if self.totals is not None and self.totals["started"] != t["started"]:
            self.ended.append(self.totals)
            self.suspicions, self.epoch, self.stopped_ms = {}, -1, float(t["stopped_ms"])
        self.totals = t
        self.locks = [row[1:] for row in answer if row[0] == "lock" and len(row) == 7]
        if int(t["violations"]):
            raise Violation(t["violation"] or "a violation without a text")

        # Only what passed while nobody was stopped.
        stopped = float(t["stopped_ms"])
        passed = max(0.0, now - self.last - (stopped - self.stopped_ms) / 1000)
        self.last, self.stopped_ms = now, stopped
        for number, name, state, held, holds, waiters in self.locks:
            self._look_at(int(number), name, state, held == "t", holds, waiters, passed)
        epoch = int(t["epoch"])
        self.stuck = self.stuck + passed if epoch == self.epoch and int(t["tasks"]) else 0.0
        self.epoch = epoch
        if self.stuck > STALL:
            raise Violation("a burst does not end")

    def _look_at(self, number, name, state, held, holds, waiters, passed) -> None:
        asleep = [int(w.split("/")[0]) for w in waiters.split() if w.endswith("/asleep")]
        if held or not asleep:
            self.suspicions.pop(number, None)
            return
        # The holds of the torture's locks are counted. At another lock it must be one and the same sleep, which a signal
        # interrupts as well.
        scene = (state, holds, waiters, None if number >= 0 else tuple(sleeps(pid) for pid in asleep))
        s = self.suspicions.get(number)
        if s is None or s["scene"] != scene:
            ran = {pid: run_time(pid) for pid in processes.children(self.cluster.process.pid)}
            self.suspicions[number] = {"scene": scene, "seconds": 0.0, "ran": ran}
            return
        s["seconds"] += passed
        if s["seconds"] > PATIENCE and (s["seconds"] > STALL or self._nobody_may_owe(s)):
            raise Violation(f"lost wake-up: asleep on free lock {number} ({name}) for {s['seconds']:.1f} s")

    def _nobody_may_owe(self, s: dict) -> bool:
        return all(pid not in s["ran"] or scheduling_state(pid) in "SDI" or run_time(pid) - s["ran"][pid] >= RAN
                   for pid in processes.children(self.cluster.process.pid))

    def show(self) -> List[str]:
        lines = [f"totals: {self.totals}"]
        for number, name, state, held, holds, waiters in self.locks:
            lines.append(f"lock {number} ({name}): {decoded(int(state), self.cluster.major)}, "
                         f"{'held' if held == 't' else 'free'}, taken {holds} times, queue: {waiters or 'empty'}")
        for pid in processes.children(self.cluster.process.pid):
            title = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
            lines.append(f"process {pid} {scheduling_state(pid)} in {_read(f'/proc/{pid}/wchan') or '?'}: {title}")
        return lines


def decoded(state: int, major: int) -> str:
    """The server's own flags are named; the module's bits, below them, are left as numbers."""
    top = 31 if major >= 18 else 30
    names = [name for bit, name in ((top, "has_waiters"), (top - 1, "release_ok"), (top - 2, "list_locked"))
             if state >> bit & 1]
    exclusive = 18 if major >= 18 else 24
    if state >> exclusive & 1:
        names.append("exclusive")
    others = [str(bit) for bit in range(exclusive + 1, top - 2) if state >> bit & 1]
    return f"{state:#010x} = {' '.join(names)} bits:{','.join(others) or '-'} shared:{state & ((1 << exclusive) - 1)}"


class Tormentor:
    """What a hostile scheduler and a careless administrator do. (Stops are made by a session of the server: only there the
    time in which somebody was stopped can be known exactly.)
    """

    def __init__(self, cluster, control: Control, schedmirror: Optional[str], rng: random.Random, totals: Totals):
        self.cluster, self.control, self.schedmirror, self.rng = cluster, control, schedmirror, rng
        self.counts = totals.counts
        self.cpus = sorted(os.sched_getaffinity(0))
        self.next_kill = time.monotonic() + rng.uniform(6, 15)
        self.reloading = None
        self.stopper = None

    def _children(self, clients_only: bool = False) -> List[int]:
        pids = processes.children(self.cluster.process.pid)
        return [pid for pid in pids if "[local]" in _read(f"/proc/{pid}/cmdline")] if clients_only else pids

    def _signal(self, pids: List[int], sig: int) -> bool:
        try:
            if pids:
                os.kill(self.rng.choice(pids), sig)
            return bool(pids)
        except ProcessLookupError:
            return False

    def act(self) -> bool:
        """True when it has killed a process, after which the server restarts."""
        self._keep_stopping()
        if self.reloading is not None and self.reloading.poll() is not None:
            self.reloading = None
        if time.monotonic() > self.next_kill:
            self.next_kill = time.monotonic() + self.rng.uniform(6, 20)
            return self.kill()
        action = self.rng.choices((self._move, self._renice, self._switch, self._reload, self._cancel, self._terminate, None),
                                  (20, 6, 4, 1, 4, 2, 30))[0]
        if action is not None:
            try:
                action()
            except (OSError, IndexError):  # the process has ended
                pass
        return False

    def _keep_stopping(self) -> None:
        if self.stopper is not None and self.stopper.poll() is None:
            return
        seed = self.rng.getrandbits(62)
        self.stopper = processes.start(
            [self.cluster.program("psql"), "-XAtq", "-U", "postgres", "-d", "postgres"] + self.cluster.address() +
            ["-c", f"SELECT lock_generator_torture_stops(3000, {seed})"],
            signal.SIGTERM, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> bool:
        killed = self._signal(self._children(), signal.SIGKILL)
        # The session that stops others may be among the dead.
        for pid in self._children():
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass
        self.counts["kills"] += killed
        return killed

    def _move(self) -> None:
        cpus = self.cpus if self.rng.random() < 0.3 else [self.rng.choice(self.cpus)]
        os.sched_setaffinity(self.rng.choice(self._children()), cpus)
        self.counts["moves"] += 1

    def _renice(self) -> None:
        # Beyond 10 nobody can tell a process that owes a wake-up from one that will never give it.
        if os.geteuid() != 0:
            return
        pid, nice = self.rng.choice(self._children()), self.rng.randint(-5, 10)
        os.setpriority(os.PRIO_PROCESS, pid, nice)
        # A backend is a session of its own, for which the kernel may keep another nice level.
        if os.path.exists(f"/proc/{pid}/autogroup"):
            with open(f"/proc/{pid}/autogroup", "w") as f:
                f.write(str(nice))
        self.counts["renices"] += 1

    def _switch(self) -> None:
        if self.rng.random() < 0.7:
            setting = f"adaptive_lwlock.mode = {self.rng.choice(('owner', 'owner', 'owner', 'blind', 'park'))}"
        else:
            setting = f"adaptive_lwlock.max_spin = {self.rng.choice((0, 5, 50, 200, 200, 1000))}"
        if self.control.ask(f"ALTER SYSTEM SET {setting}; SELECT pg_reload_conf()", 5) is not None:
            self.counts["mode switches"] += 1

    def _reload(self) -> None:
        if self.schedmirror is None or self.reloading is not None:
            return
        slots = self.rng.choice((10, 100, 1000))
        command = f"'{self.schedmirror}' unload; sleep 0.{self.rng.randint(0, 9)}; '{self.schedmirror}' load --slots {slots}"
        self.reloading = subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                          stderr=subprocess.DEVNULL, start_new_session=True)
        self.counts["mirror reloads"] += 1

    def _cancel(self) -> None:
        self.counts["cancels"] += self._signal(self._children(clients_only=True), signal.SIGINT)

    def _terminate(self) -> None:
        self.counts["terminations"] += self._signal(self._children(clients_only=True), signal.SIGTERM)

    def stop(self) -> None:
        if self.reloading is not None:
            self.reloading.wait()
        if self.stopper is not None:
            self.stopper.wait()  # it lasts for 3 s at most, then nobody is stopped any more


class Round:
    def __init__(self, cluster, run_dir: str, tasks: int, schedmirror: Optional[str], rng: random.Random, totals: Totals):
        self.cluster, self.totals = cluster, totals
        self.control = Control(cluster)
        self.watchdog = Watchdog(cluster, self.control)
        self.sessions = Sessions(cluster, run_dir, tasks, 2, rng)
        self.tormentor = Tormentor(cluster, self.control, schedmirror, rng, totals)

    def run(self, seconds: float) -> None:
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                self.sessions.tend()
                if time.monotonic() - self.watchdog.last > 0.2:
                    self.watchdog.look()
                if self.tormentor.act():
                    self._restart()
                time.sleep(self.tormentor.rng.uniform(0, 0.04))
            self._end_in_order()
        except Violation as violation:
            self.totals.counts["violations"] += 1
            print(f"torture of backends: {violation}")
            for line in self.watchdog.show():
                print("  " + line)
            print("  server log: " + self.cluster.log)
            raise
        finally:
            self.tormentor.stop()
            self.sessions.kill()
            self.control.close()
            self._add_totals()

    def _add_totals(self) -> None:
        for t in self.watchdog.ended + [self.watchdog.totals]:
            if t is None:
                continue
            for name in ("acquires", "contended", "stops"):
                self.totals.counts[name] += int(t[name])
            self.totals.counts["bursts"] += int(t["epoch"]) // 2
            for name in self.totals.longest:
                self.totals.longest[name] = max(self.totals.longest[name], float(t[name]))

    def _restart(self) -> None:
        """The server has lost a process and forgets everything in its shared memory."""
        self.control.close()
        deadline = time.monotonic() + RESTART_TIMEOUT
        while True:
            time.sleep(0.2)
            if self.cluster.process.poll() is not None:
                raise Violation("the server did not survive the death of a process")
            rows = self.control.ask("SELECT active FROM adaptive_lwlock_status()", 5)
            if rows == [["t"]]:
                break
            if time.monotonic() > deadline:
                raise Violation(f"the server did not restart within {RESTART_TIMEOUT} s")
        self.watchdog.restarted()

    def _end_in_order(self) -> None:
        self.tormentor.stop()
        self.sessions.stop_load()
        deadline = time.monotonic() + STALL + 30
        while self.sessions.left():
            self.sessions.tend()
            self.watchdog.look()
            if time.monotonic() > deadline:
                raise Violation(f"{self.sessions.left()} sessions do not end")
            time.sleep(0.1)
        self.watchdog.look()
        for number, name, state, held, _, waiters in self.watchdog.locks:
            if int(number) >= 0 and (held == "t" or waiters):
                raise Violation(f"lock {number} is left behind: {decoded(int(state), self.cluster.major)} {waiters}")
        broken = self.cluster.sql("SELECT count(*) FROM torture_log WHERE length(v) <> 50")
        if broken != "0":
            raise Violation(f"{broken} rows are not what was written")


def check_log(cluster) -> None:
    with open(cluster.log, errors="replace") as log:
        for line in log:
            found = TROUBLE.search(line)
            if found and found.group(1) not in EXPECTED:
                raise Violation("the server's log says: " + line.strip())


def torture(bindir: str, directory: str, seconds: float, tasks: int, seed: int, schedmirror: Optional[str],
            sources=("auto", "rseq", "auto", "off")) -> Totals:
    """Runs rounds until the time is over or something is wrong (then violations is not 0)."""
    rng = random.Random(seed)
    totals = Totals()
    began = time.monotonic()
    run_dir = os.path.join(directory, "run")
    data_dir = os.path.join(directory, "cluster")
    for path in (run_dir, data_dir):
        os.mkdir(path)
        if processes.server_user():
            shutil.chown(path, processes.server_user(), processes.server_group())
    cluster = ModuleCluster("torture", bindir, os.path.join(data_dir, "data"), run_dir)
    cluster.init(120)
    with open(os.path.join(cluster.data, "postgresql.conf"), "a") as conf:
        conf.write(CONF)
    try:
        while time.monotonic() - began < seconds - 5:
            source = sources[totals.counts["rounds"] % len(sources)]
            with open(os.path.join(cluster.data, "postgresql.conf"), "a") as conf:
                conf.write(f"adaptive_lwlock.sched_state = {source}\n")
            cluster.start(["lock_generator", "adaptive_lwlock"])
            cluster.major = int(cluster.sql("SHOW server_version_num")) // 10000
            cluster.sql("CREATE EXTENSION IF NOT EXISTS lock_generator", "CREATE EXTENSION IF NOT EXISTS adaptive_lwlock",
                        *LOAD_SETUP.strip().split(";\n"))
            status = cluster.status()
            if not status["active"]:
                raise Violation(f"the module is not active: {status['reason']}")
            left = seconds - (time.monotonic() - began)
            Round(cluster, run_dir, tasks, schedmirror, rng, totals).run(min(left if left < 70 else 60, left))
            cluster.stop()
            check_log(cluster)
            totals.counts["rounds"] += 1
    except Violation as violation:
        if not totals.counts["violations"]:
            totals.counts["violations"] = 1
            print(f"torture of backends: {violation}")
    finally:
        cluster.stop()
    totals.seconds = time.monotonic() - began
    return totals
