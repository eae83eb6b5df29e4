"""The comparison of locks: measurements by build/micro, and what is made of them.

As in results.py, what counts is a ratio within a round: here to the best peer of the cell, the lock of others
that had the highest median rate there. A cell is a kind of tasks, how many, and a section.
"""

import json
import statistics
import subprocess
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional

from .errors import BenchError
from .start import built

KINDS = ("threads", "processes")
SPINLOCK = "test_and_set"
OF_BEST_PEER = 0.95
OF_SPINLOCK = 2.0  # with more tasks than CPUs
NOT_HERE = 3       # exit code of build/micro


class Cell(NamedTuple):
    kind: str
    count: int
    section: str

    def __str__(self) -> str:
        return f"{self.section} {self.kind} {self.count}"


@dataclass(frozen=True)
class Lock:
    name: str
    ours: bool
    processes: bool
    about: str

    def plays(self, cell: Cell) -> bool:
        return cell.kind == "threads" or self.processes


class NotHere(BenchError):
    """A lock that this machine cannot offer."""


class Program:
    """build/micro."""

    def __init__(self):
        listed = [json.loads(_run("--list")) for _ in range(3)]
        self.locks = {entry["name"]: Lock(**entry) for entry in listed[0]["locks"]}
        self.sections = listed[0]["sections"]
        # Whatever else ran meanwhile only ever makes a turn longer.
        self.ns_per_turn = min(entry["ns_per_turn"] for entry in listed)

    def measure(self, cell: Cell, lock: str, seconds: float) -> Dict[str, float]:
        return json.loads(_run("--lock", lock, f"--{cell.kind}", str(cell.count), "--section", cell.section,
                               "--seconds", str(seconds), "--ns-per-turn", str(self.ns_per_turn),
                               patience=60 + 2 * seconds))

    def why_not(self, lock: str) -> Optional[str]:
        try:
            self.measure(Cell("threads", 1, self.sections[0]), lock, 0.001)
        except NotHere as error:
            return str(error)
        return None


def _run(*args: str, patience: float = 60) -> str:
    what = "micro " + " ".join(args)
    try:
        done = subprocess.run([built("micro"), *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{what}: does not end")
    except OSError as error:
        raise BenchError(f"{built('micro')}: {error.strerror}")
    if done.returncode == 0:
        return done.stdout
    why = done.stderr.strip().partition(": ")[2] or f"exit code {done.returncode}"
    raise NotHere(why) if done.returncode == NOT_HERE else BenchError(f"{what}: {why}")


def uncontended(locks: List[str], seconds: float) -> Dict[str, Dict[str, float]]:
    """Nanoseconds to take and give back, by lock and kind of tasks: medians of repetitions in random order."""
    chosen = "|".join(locks)
    done = subprocess.run([built("uncontended"), f"--benchmark_filter=^({chosen})/", "--benchmark_format=json",
                           f"--benchmark_min_time={seconds}", "--benchmark_repetitions=5",
                           "--benchmark_enable_random_interleaving=true"],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode != 0:
        raise BenchError(f"uncontended: exit code {done.returncode}")
    costs: Dict[str, Dict[str, float]] = {}
    for entry in json.loads(done.stdout)["benchmarks"]:
        if entry.get("aggregate_name") == "median" and not entry.get("error_occurred"):
            lock, _, kind = entry["run_name"].partition("/")
            costs.setdefault(lock, {})[kind] = entry["cpu_time"]
    return costs


class Comparison:
    def __init__(self, machine: dict, locks: List[Lock]):
        self.machine = machine
        self.locks = {lock.name: lock for lock in locks}
        self.samples: Dict[Cell, Dict[str, List[dict]]] = {}
        self.uncontended: Dict[str, Dict[str, float]] = {}

    def add_round(self, cell: Cell, samples: Dict[str, dict]) -> None:
        """All locks of a cell in one round."""
        for lock, sample in samples.items():
            self.samples.setdefault(cell, {}).setdefault(lock, []).append(sample)

    def values(self, cell: Cell, lock: str, figure: str) -> List[float]:
        return [sample[figure] for sample in self.samples[cell].get(lock, [])]

    def median(self, cell: Cell, lock: str, figure: str) -> Optional[float]:
        values = self.values(cell, lock, figure)
        return statistics.median(values) if values else None

    def best_peer(self, cell: Cell) -> Optional[str]:
        peers = [name for name in self.samples[cell] if not self.locks[name].ours]
        return max(peers, key=lambda name: self.median(cell, name, "operations_per_second"), default=None)

    def ratio(self, cell: Cell, lock: str, other: Optional[str]) -> Optional[dict]:
        """Of rates, within a round. A lock that got nothing done counts as if it had done one operation."""
        if other is None:
            return None
        least = 1 / self.machine["seconds"]
        ratios = [mine / max(theirs, least) for mine, theirs in zip(self.values(cell, lock, "operations_per_second"),
                                                                   self.values(cell, other, "operations_per_second"))]
        return {"lock": lock, "vs": other, "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}

    def ours(self) -> Optional[str]:
        """The one that has to meet the targets: with the best source of those that were measured."""
        return next((name for name in ("adaptive_bpf", "adaptive_rseq", "adaptive_off") if name in self.locks), None)

    def targets(self) -> List[dict]:
        """Of every cell: what was wanted, and whether it was had."""
        ours, found = self.ours(), []
        for cell in self.samples if ours else ():
            wanted = [(self.best_peer(cell), OF_BEST_PEER)]
            if cell.count > self.machine["cpus"] and SPINLOCK in self.samples[cell]:
                wanted.append((SPINLOCK, OF_SPINLOCK))
            for other, least in wanted:
                ratio = self.ratio(cell, ours, other) if ours in self.samples[cell] else None
                if ratio:
                    found.append({**cell._asdict(), **ratio, "wanted": least, "met": round(ratio["median"], 2) >= least})
        return found

    def as_json(self) -> dict:
        cells, ratios = [], []
        for cell, by_lock in self.samples.items():
            peer = self.best_peer(cell)
            for lock, samples in by_lock.items():
                cells.append({**cell._asdict(), "lock": lock,
                              **{figure: [sample[figure] for sample in samples] for figure in samples[0]}})
                ratio = self.ratio(cell, lock, peer)
                if ratio:
                    ratios.append({**cell._asdict(), **ratio})
        return {"machine": self.machine, "cells": cells, "ratios": ratios, "targets": self.targets(),
                "uncontended_ns": self.uncontended}
