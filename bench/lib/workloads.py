"""What can be measured: pgbench scripts on real tables, and the generator's known loads on one lock.

Files in bench/workloads: NAME.sql is the pgbench script, NAME.setup.sql makes its tables once, NAME.reset.sql
brings them back to the same state before each run, outside the measured time.
"""

import math
import os
from dataclasses import dataclass, field
from typing import Dict, Optional

DIRECTORY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "workloads")


@dataclass(frozen=True)
class Lock:
    """A load on one lock. Times in nanoseconds; `sleep` and `compute`: one acquire in `every` does so for
    `us` inside the lock.
    """

    hold: int
    out: int
    shared_pct: int = 0
    sleep_every: int = 0
    sleep_us: int = 0
    compute_every: int = 0
    compute_us: int = 0
    min_ms: float = 2.0

    def operations(self) -> int:
        """Acquires of one query (and transaction)."""
        return math.ceil(self.min_ms * 1e6 / (self.hold + self.out))

    def mean_hold_ns(self) -> float:
        hold = float(self.hold)
        if self.sleep_every:
            hold += 1000.0 * self.sleep_us / self.sleep_every
        if self.compute_every:
            hold += 1000.0 * self.compute_us / self.compute_every
        return hold

    def serial_ns(self, line_cost_ns: float, cpus: int) -> float:
        """The least time an acquire keeps the lock from others: what bounds the rate of acquires on `cpus`
        CPUs.

        Exclusive holds follow each other, and between two holders the lock's line must move. Shared holds
        overlap, on as many CPUs as there are; taking one still writes the line.
        """
        exclusive = 1 - self.shared_pct / 100
        return self.mean_hold_ns() * (exclusive + (1 - exclusive) / cpus) + line_cost_ns

    def variables(self) -> Dict[str, object]:
        return {
            "hold_ns": self.hold,
            "out_ns": self.out,
            "min_ms": self.min_ms,
            "shared_pct": self.shared_pct,
            "sleep_every": self.sleep_every,
            "sleep_us": self.sleep_us,
            "compute_every": self.compute_every,
            "compute_us": self.compute_us,
        }


@dataclass(frozen=True)
class Workload:
    name: str
    about: str
    setup: str = ""  # base name of the set-up file; several workloads may share one
    writes: bool = False  # fills the WAL: a checkpoint goes before each run
    lock: Optional[Lock] = field(default=None)

    def script(self) -> str:
        return os.path.join(DIRECTORY, ("lock_generator" if self.lock else self.name) + ".sql")

    def setup_file(self) -> Optional[str]:
        name = "lock_generator" if self.lock else self.setup
        return os.path.join(DIRECTORY, name + ".setup.sql") if name else None

    def reset_file(self) -> Optional[str]:
        path = os.path.join(DIRECTORY, self.name + ".reset.sql")
        return path if os.path.exists(path) else None


def _generated(name: str, about: str, **times) -> Workload:
    return Workload(name, about, lock=Lock(**times))


ALL = {
    w.name: w
    for w in (
        Workload("select_only", "one row by primary key", setup="accounts"),
        Workload("tpcb", "a bank transaction: three updates, a select, an insert", setup="accounts", writes=True),
        Workload("nextval", "1000 numbers from one sequence", setup="nextval", writes=True),
        Workload("hot_insert", "100 rows into one table with a sequence for its key", setup="hot_insert", writes=True),
        Workload("wal_emit", "100 WAL messages of 32 bytes", writes=True),
        Workload("partition_select", "a look-up in 32 partitions", setup="partition_select"),
        Workload("subxact", "80 updates, each in a subtransaction", setup="subxact", writes=True),
        Workload("buffer_churn", "rows of a table twice the shared buffers", setup="buffer_churn"),
        _generated("lock_short", "50 ns inside, 50 ns outside", hold=50, out=50),
        _generated("lock_even", "100 ns inside, 400 ns outside", hold=100, out=400),
        _generated("lock_long", "1000 ns inside, 1000 ns outside", hold=1000, out=1000),
        _generated("lock_saturated", "1000 ns inside, 50 ns outside", hold=1000, out=50),
        _generated("bimodal_io", "100/400 ns, and a sleep of 200 us inside one time in 100",
                   hold=100, out=400, sleep_every=100, sleep_us=200),
        _generated("bimodal_cpu", "500/1000 ns, and 100 us of computing inside one time in 50",
                   hold=500, out=1000, compute_every=50, compute_us=100),
        _generated("shared_mix", "200/200 ns, 90 % shared", hold=200, out=200, shared_pct=90),
    )
}

# What `make bench` runs: the cells whose gain is promised, and the saturated lock, where spinning has the
# most to lose.
QUICK = {
    "lock_short": [2, 16, 64],
    "lock_saturated": [2, 16],
    "lock_even": [4, 16],
    "bimodal_cpu": [4, 16],
    "bimodal_io": [16],
    "nextval": [2, 8, 32],
    "hot_insert": [2, 8, 32],
    "select_only": [1],
}
