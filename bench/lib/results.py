"""From samples to ratios.

On a shared machine a rate means little by itself: the host gives and takes. What is reported is the ratio to
the stock server of the same round, measured within seconds of it, and the median and range of these ratios
over the rounds.
"""

import math
import statistics
from operator import attrgetter
from typing import Dict, List, Optional, Tuple

from .load import Sample
from .workloads import ALL

REFERENCE = "stock"
Key = Tuple[str, int, str]  # workload, clients, mode


def _spread(values: List[float]) -> Dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Results:
    def __init__(self, machine: dict):
        self.machine = machine
        self.samples: Dict[Key, List[Sample]] = {}
        self.module: Dict[Key, List[dict]] = {}
        self.single_client: Dict[str, List[float]] = {}  # transactions a second of one client on the stock server

    def add_round(self, workload: str, clients: int, samples: Dict[str, Sample], module: Dict[str, dict]) -> None:
        """All modes of a cell in one round: only complete rounds are kept, so the lists of a cell's modes
        match.
        """
        for mode, sample in samples.items():
            self.samples.setdefault((workload, clients, mode), []).append(sample)
        for mode, counters in module.items():
            self.module.setdefault((workload, clients, mode), []).append(counters)

    def cells(self) -> List[Tuple[str, int]]:
        seen = []
        for workload, clients, _ in self.samples:
            if (workload, clients) not in seen:
                seen.append((workload, clients))
        return seen

    def modes(self) -> List[str]:
        return list(dict.fromkeys(mode for _, _, mode in self.samples))

    def _ratios(self, key: Key, figure: str) -> Optional[List[float]]:
        workload, clients, mode = key
        stock = self.samples.get((workload, clients, REFERENCE))
        if mode == REFERENCE or not stock or key not in self.samples:
            return None
        value = attrgetter(figure)
        pairs = [(value(mine), value(theirs)) for mine, theirs in zip(self.samples[key], stock)]
        ratios = [mine / theirs for mine, theirs in pairs if theirs > 0]
        return ratios or None

    def ratio(self, workload: str, clients: int, mode: str) -> Optional[dict]:
        key = (workload, clients, mode)
        tps = self._ratios(key, "tps")
        if tps is None:
            return None
        entry = {"workload": workload, "clients": clients, "mode": mode, "vs": REFERENCE,
                 "median": statistics.median(tps), "min": min(tps), "max": max(tps), "loses": round(statistics.median(tps), 2) < 1}
        for name, figure in (("cpu", "cpu_seconds_per_1000_tx"), ("latency_p99", "latency_p99_ms"),
                             ("sleeps", "sleeps_per_1000_tx"), ("longest_wait", "longest_wait_ms")):
            values = self._ratios(key, figure)
            if values:
                entry[name] = _spread(values)
        if self.machine.get("beside"):
            other = self._ratios(key, "beside.tps")
            entry["beside"] = {**self.machine["beside"], **_spread(other)}
            for name, figure in (("cpu", "beside.cpu_seconds_per_1000_tx"), ("p99", "beside.latency_p99_ms")):
                entry["beside"][name] = statistics.median(self._ratios(key, figure) or [0.0])
            entry["total"] = _spread([math.sqrt(mine * theirs) for mine, theirs in zip(tps, other)])
        return entry

    def ratios(self) -> List[dict]:
        found = (self.ratio(*key) for key in self.samples)
        return [entry for entry in found if entry]

    def ideal_operations(self, workload: str) -> Optional[float]:
        """Acquires a second that no waiting algorithm can exceed on this machine.

        One client alone reaches T1. More clients reach at most that on every CPU, and at most one hold after
        the other with the lock's line moving in between; but never less than one client, which could always
        work alone.
        """
        lock = ALL[workload].lock
        single = self.single_client.get(workload)
        if lock is None or not single:
            return None
        t1 = statistics.median(single) * lock.operations()
        cpus = self.machine["cpus"]
        serial = 1e9 / lock.serial_ns(self.machine["line_cost_ns"], cpus)
        return max(t1, min(cpus * t1, serial))

    def efficiency(self, key: Key) -> Optional[List[float]]:
        ideal = self.ideal_operations(key[0])
        if ideal is None:
            return None
        operations = ALL[key[0]].lock.operations()
        return [sample.tps * operations / ideal for sample in self.samples[key]]

    def as_json(self) -> dict:
        cells = []
        for key, samples in self.samples.items():
            cell = {"workload": key[0], "clients": key[1], "mode": key[2]}
            for figure in ("tps", "cpu_seconds_per_1000_tx", "latency_p99_ms", "sleeps_per_1000_tx", "longest_wait_ms"):
                cell[figure] = [getattr(sample, figure) for sample in samples]
            if samples[0].beside:
                cell["beside"] = {figure: [getattr(sample.beside, figure) for sample in samples] for figure in
                                  ("tps", "cpu_seconds_per_1000_tx", "latency_p99_ms", "sleeps_per_1000_tx")}
            efficiency = self.efficiency(key)
            if efficiency:
                cell["efficiency"] = efficiency
            if ALL[key[0]].lock:
                cell["operations_per_tx"] = ALL[key[0]].lock.operations()
            if key in self.module:
                cell["module"] = self.module[key]
            cells.append(cell)
        ideals = {w: self.ideal_operations(w) for w in self.single_client}
        return {"machine": self.machine, "cells": cells, "ratios": self.ratios(),
                "single_client_tps": self.single_client, "ideal_operations_per_second": ideals}
