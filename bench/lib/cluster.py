"""Throw-away database clusters on unix sockets, and pgbouncer in front of one."""

import json
import os
import shutil
import signal
import time
from typing import List, Optional

from . import processes
from .errors import BenchError

# What a production server has where it bears on locks (fsync, synchronous_commit and full_page_writes stay
# on), and nothing that starts by itself in the middle of a run.
SETTINGS = """
listen_addresses = ''
shared_buffers = '128MB'
autovacuum = off
checkpoint_timeout = '1h'
min_wal_size = '512MB'
max_wal_size = '1GB'
max_parallel_workers_per_gather = 0
jit = off
log_min_messages = warning
log_checkpoints = off
log_error_verbosity = terse
"""
PORT = 5432
START_TIMEOUT = 60


class Cluster:
    def __init__(self, name: str, bindir: str, data: str, run_dir: str):
        self.name = name
        self.bindir = bindir
        self.data = data
        self.socket_dir = run_dir
        self.log = os.path.join(run_dir, "server.log")
        self.process = None

    def program(self, name: str) -> str:
        return os.path.join(self.bindir, name)

    def init(self, max_connections: int) -> None:
        done = processes.run([self.program("initdb"), "-A", "trust", "-U", "postgres", "--no-locale", "-E", "UTF8",
                              "--no-sync", "-D", self.data])
        if done.returncode != 0:
            raise BenchError("initdb failed: " + last_line(done.stderr))
        with open(os.path.join(self.data, "postgresql.conf"), "a") as conf:
            conf.write(SETTINGS)
            conf.write(f"max_connections = {max_connections}\n")

    def clone(self, other: "Cluster") -> None:
        """Takes over the data of a stopped cluster, byte for byte."""
        done = processes.run(["cp", "-a", other.data, self.data])
        if done.returncode != 0:
            raise BenchError("cannot copy the data directory: " + last_line(done.stderr))

    def start(self, preload: List[str]) -> None:
        with open(self.log, "ab") as log:
            self.process = processes.start(
                [self.program("postgres"), "-D", self.data, "-c", f"unix_socket_directories={self.socket_dir}",
                 "-c", f"port={PORT}", "-c", "shared_preload_libraries=" + ",".join(preload)],
                signal.SIGQUIT, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            if self.process.poll() is not None:
                raise BenchError(f"the {self.name} server did not start: {self.log_tail()}")
            if processes.run([self.program("pg_isready"), "-q", "-U", "postgres"] + self.address()).returncode == 0:
                return
            if time.monotonic() > deadline:
                raise BenchError(f"the {self.name} server was not ready after {START_TIMEOUT} s: {self.log_tail()}")
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            processes.stop(self.process, signal.SIGINT)
            self.process = None

    def log_tail(self) -> str:
        try:
            with open(self.log, errors="replace") as log:
                lines = [line.strip() for line in log if line.strip()]
        except OSError:
            lines = []
        return " | ".join(lines[-3:]) or "its log is empty"

    def _psql(self, args: List[str]) -> str:
        done = processes.run([self.program("psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "postgres"] +
                             self.address() + args)
        if done.returncode != 0:
            raise BenchError(f"{self.name} server: {last_line(done.stderr)}")
        return done.stdout.strip()

    def sql(self, *commands: str) -> str:
        return self._psql([part for command in commands for part in ("-c", command)])

    def sql_file(self, path: str) -> str:
        # The server's user need not be able to read the source tree.
        with open(path) as f:
            text = f.read()
        copy = os.path.join(self.socket_dir, os.path.basename(path))
        with open(copy, "w") as f:
            f.write(text)
        os.chmod(copy, 0o644)
        return self._psql(["-f", copy])

    def longest_wait(self) -> float:
        """For the generator's lock, in milliseconds, since this was last asked."""
        return float(self.sql("SELECT lock_generator_longest_wait()"))

    def pids(self) -> List[int]:
        return [self.process.pid]

    def address(self) -> List[str]:
        return ["-h", self.socket_dir, "-p", str(PORT)]


class ModuleCluster(Cluster):
    """A cluster with adaptive_lwlock, whose waiting mode changes at run time."""

    def status(self) -> dict:
        return json.loads(self.sql("SELECT row_to_json(s) FROM adaptive_lwlock_status() s"))

    def set_mode(self, mode: str) -> None:
        """A mode, or MODE:US for one with a max_spin of its own. Also sets the module's counters to zero."""
        name, _, budget = mode.partition(":")
        self.sql(f"ALTER SYSTEM SET adaptive_lwlock.mode = {name}",
                 f"ALTER SYSTEM SET adaptive_lwlock.max_spin = {budget or 'DEFAULT'}",
                 "SELECT pg_reload_conf()", "SELECT pg_stat_adaptive_lwlock_reset()")
        deadline = time.monotonic() + 10
        # The postmaster reads the file when its signal arrives; sessions made afterwards have the new settings.
        arrived = (f"SELECT bool_and(setting = CASE name WHEN 'adaptive_lwlock.mode' THEN '{name}'"
                   f" ELSE coalesce(nullif('{budget}', ''), boot_val) END) FROM pg_settings"
                   " WHERE name IN ('adaptive_lwlock.mode', 'adaptive_lwlock.max_spin')")
        while self.sql(arrived) != "t":
            if time.monotonic() > deadline:
                raise BenchError(f"the module server did not change its mode to {mode}")
            time.sleep(0.01)

    def statistics(self) -> dict:
        return json.loads(self.sql(
            "SELECT row_to_json(s) FROM (SELECT coalesce(sum(contended), 0) contended,"
            " coalesce(sum(spin_acquired), 0) spin_acquired, coalesce(sum(sleeps), 0) sleeps"
            " FROM pg_stat_adaptive_lwlock) s"))


class Pgbouncer:
    """Debian's pgbouncer in front of a cluster: transaction pooling, a small pool."""

    PORT = 6432

    def __init__(self, cluster: Cluster, run_dir: str, pool: int, max_clients: int):
        self.name = "pgbouncer"
        self.cluster = cluster
        self.run_dir = run_dir
        self.pool = pool
        self.max_clients = max_clients
        self.log = os.path.join(run_dir, "pgbouncer.log")
        self.process = None

    @staticmethod
    def find() -> Optional[str]:
        return shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")

    def start(self) -> None:
        users = os.path.join(self.run_dir, "users.txt")
        with open(users, "w") as f:
            f.write('"postgres" ""\n')
        conf = os.path.join(self.run_dir, "pgbouncer.ini")
        with open(conf, "w") as f:
            f.write(f"""[databases]
postgres = host={self.cluster.socket_dir} port={PORT} dbname=postgres
[pgbouncer]
listen_addr =
listen_port = {self.PORT}
unix_socket_dir = {self.run_dir}
auth_type = trust
auth_file = {users}
pool_mode = transaction
default_pool_size = {self.pool}
max_client_conn = {self.max_clients}
ignore_startup_parameters = extra_float_digits
log_connections = 0
log_disconnections = 0
""")
        os.chmod(users, 0o644)
        os.chmod(conf, 0o644)
        with open(self.log, "ab") as log:
            self.process = processes.start([self.find(), conf], signal.SIGTERM, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT
        while processes.run([self.cluster.program("pg_isready"), "-q"] + self.address()).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                with open(self.log, errors="replace") as log:
                    raise BenchError("pgbouncer did not start: " + last_line(log.read()))
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            processes.stop(self.process, signal.SIGTERM)
            self.process = None

    def pids(self) -> List[int]:
        # Its own CPU is part of the price.
        return self.cluster.pids() + [self.process.pid]

    def address(self) -> List[str]:
        return ["-h", self.run_dir, "-p", str(self.PORT)]


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
