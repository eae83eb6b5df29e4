"""The table for the terminal and report.html: a page that stands alone, plots included."""

import html
import io
import json
import os
import statistics
from typing import List, Optional, Tuple

from .results import REFERENCE, Results
from .workloads import ALL

COLORS = {"stock": "#7f7f7f", "park": "#4878cf", "blind": "#e8a33d", "owner": "#2f9e44", "control": "#c0b283",
          "pgbouncer": "#9b59b6"}
MODES = {
    "stock": "a server without the module",
    "park": "the module's copy of the server's own algorithm: queue and sleep at once",
    "blind": "spin for a while without looking at the owner, then sleep",
    "owner": "spin as long as the lock's owner is on a CPU, then sleep",
    "control": "a second server without the module, with the same data: what it differs by is chance",
    "pgbouncer": "stock behind pgbouncer: transaction pooling, a pool of two connections per CPU, unnamed statements",
}
LOSS = "▼"


def about_mode(mode: str) -> str:
    name, _, budget = mode.partition(":")
    return MODES[name] + (f"; at most {budget} us (adaptive_lwlock.max_spin)" if budget else "")


def color(mode: str) -> str:
    """A mode with a budget of its own is lighter than the mode."""
    name, _, budget = mode.partition(":")
    return COLORS[name] + ("90" if budget else "")


# ---- text ----

def text_table(results: Results) -> str:
    compared = [mode for mode in results.modes() if mode != REFERENCE]
    beside = results.machine.get("beside")
    head = ["workload", "clients"] + ([f"{REFERENCE} tps"] if REFERENCE in results.modes() else [])
    for mode in compared:
        head += [f"{mode} tps ratio", "cpu"] + (["beside", "p99", "cpu", "total"] if beside else [])
    efficient = bool(results.single_client)
    if efficient:
        head += ["efficiency " + "/".join(results.modes())]
    rows = [head]
    for workload, clients in results.cells():
        row = [workload, str(clients)]
        if REFERENCE in results.modes():
            row.append(_median(results, workload, clients, REFERENCE, "tps"))
        for mode in compared:
            entry = results.ratio(workload, clients, mode)
            if entry is None:
                row += [_median(results, workload, clients, mode, "tps")] + [""] * (5 if beside else 1)
            else:
                row += [_range(entry) + (" " + LOSS if entry["loses"] else "  "), _cpu(entry)]
                if beside:
                    row += [f"{entry['beside'][figure]:.2f}" for figure in ("median", "p99", "cpu")] + [_range(entry["total"])]
        if efficient:
            row.append(_efficiencies(results, workload, clients))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    notes = ["", f"tps ratio: to {REFERENCE}, median of the rounds [lowest..highest]; {LOSS} less than {REFERENCE}. "
             "cpu: server CPU per transaction, ratio."]
    if beside:
        notes.append(f"beside: of {beside['workload']} with {beside['clients']} clients at the same time, tps, p99 and CPU per "
                     "transaction, ratios; total: geometric mean of both tps ratios.")
    if efficient:
        notes.append("efficiency: throughput / the most this machine could reach with this lock.")
    notes += [summary_line(results.machine)]
    return "\n".join(lines + notes)


def summary_line(machine: dict) -> str:
    line = (f"{machine['server_version']} on {count(machine['cpus'], 'CPU')} ({machine['cpu_model']}), "
            f"{count(machine['rounds'], 'round')} of {machine['seconds']:g} s")
    if machine.get("slice_ms"):
        line += f" in slices of {machine['slice_ms']:g} ms"
    if machine.get("sched_state_source"):
        line += f"; sched_state source: {machine['sched_state_source']}"
        if machine.get("sched_state_reason"):
            line += f" ({machine['sched_state_reason']})"
    if machine.get("hog"):
        line += "; with a CPU hog on one CPU"
    if machine.get("note"):
        line += "; " + machine["note"]
    return line


def count(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "s")


def _median(results: Results, workload: str, clients: int, mode: str, figure: str, form: str = "{:.0f}") -> str:
    samples = results.samples.get((workload, clients, mode))
    return form.format(statistics.median(getattr(s, figure) for s in samples)) if samples else "-"


def _range(entry: dict) -> str:
    return f"{entry['median']:.2f} [{entry['min']:.2f}..{entry['max']:.2f}]"


def _cpu(entry: dict) -> str:
    return f"{entry['cpu']['median']:.2f}" if "cpu" in entry else "-"


def _efficiencies(results: Results, workload: str, clients: int) -> str:
    found = []
    for mode in results.modes():
        key = (workload, clients, mode)
        values = results.efficiency(key) if key in results.samples else None
        found.append(f"{statistics.median(values):.2f}" if values else "-")
    return "" if set(found) == {"-"} else "/".join(found)


# ---- plots ----

def pyplot():
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["font.size"] = 8
    return plt


def svg_of(figure) -> str:
    """To be put into a page. The figure is gone then."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot().close(figure)
    svg = out.getvalue()
    return svg[svg.index("<svg"):]


def _plot(results: Results, figure: str, label: str) -> str:
    """One panel a workload, one group of bars a client count, one bar a mode; whiskers from the lowest to
    the highest round.
    """
    plt = pyplot()
    names = list(dict.fromkeys(workload for workload, _ in results.cells()))
    modes = [mode for mode in results.modes() if mode != REFERENCE]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.3 * lines), squeeze=False)
    for ax in axes.flat[len(names):]:
        ax.axis("off")
    for ax, workload in zip(axes.flat, names):
        counts = [clients for name, clients in results.cells() if name == workload]
        width = 0.8 / max(1, len(modes))
        top = 1.0
        for m, mode in enumerate(modes):
            for c, clients in enumerate(counts):
                entry = results.ratio(workload, clients, mode)
                value = entry if figure == "tps" else (entry or {}).get(figure)
                if not value:
                    continue
                x = c + (m - (len(modes) - 1) / 2) * width
                ax.bar(x, value["median"], width * 0.92, color=color(mode), label=mode)
                ax.plot([x, x], [value["min"], value["max"]], color="#222222", linewidth=0.8)
                top = max(top, value["max"])
        ax.axhline(1, color=COLORS[REFERENCE], linewidth=1, linestyle="--")
        ax.set_xticks(range(len(counts)), [str(c) for c in counts])
        ax.set_ylim(0, top * 1.08)
        ax.set_title(workload, fontsize=9)
        ax.set_xlabel("clients")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0][0].set_ylabel(label)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color(mode)) for mode in modes]
    handles.append(plt.Line2D([0], [0], color=COLORS[REFERENCE], linestyle="--"))
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (2.3 * lines)))
    fig.legend(handles, modes + [REFERENCE + " = 1"], loc="upper center", ncol=len(handles), frameon=False)
    return svg_of(fig)


# ---- HTML ----

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 84em; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; } 
td, th { padding: 3px 9px; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
td:first-child, th:first-child, .facts td, .facts th { text-align: left; white-space: normal; }
.range { color: #777; font-size: 11px; } 
.loss { background: #fbdcdc; } .unsure { background: #fdf1d6; } .gain { background: #e0f3e3; }
svg { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
"""


def write(directory: str, results: Results, command: str) -> str:
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "report.json"), "w") as f:
        json.dump(results.as_json(), f, indent=1)
        f.write("\n")
    path = os.path.join(directory, "report.html")
    with open(path, "w") as f:
        f.write(_page(results, command))
    return path


def page_head(title: str) -> str:
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
            f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>")


def _page(results: Results, command: str) -> str:
    parts = [page_head("LWLock waiting: compared with a stock server"), _summary(results)]
    compared = [mode for mode in results.modes() if mode != REFERENCE]
    if results.ratios():
        parts += ["<h2>Throughput, ratio to stock (higher is better)</h2><div class='scroll'>",
                  _plot(results, "tps", "tps / stock tps"), "</div>",
                  "<h2>Server CPU per transaction, ratio to stock (lower is better)</h2><div class='scroll'>",
                  _plot(results, "cpu", "CPU / stock CPU"), "</div>"]
    parts += ["<h2>Every cell</h2>", _table(results, compared), "<h2>Rates</h2>", _rates(results),
              "<h2>What was run</h2>", _facts(results, command), "</body></html>"]
    return "\n".join(parts)


def _summary(results: Results) -> str:
    lines = []
    for mode in results.modes():
        entries = [e for e in results.ratios() if e["mode"] == mode]
        if not entries:
            continue
        ahead = sum(e["min"] > 1 for e in entries)
        behind = [e for e in entries if e["max"] < 1]
        unsure = len(entries) - ahead - len(behind)
        lost = ", ".join(f"{e['workload']} at {e['clients']}" for e in behind)
        lines.append(f"<li><b>{mode}</b> ({html.escape(about_mode(mode))}): faster than stock in every round in {ahead} of "
                     f"{len(entries)} cells, slower in every round in {len(behind)}{': ' + lost if lost else ''}; "
                     f"not clear in {unsure}.</li>")
    return (f"<p>{html.escape(summary_line(results.machine))}.</p><ul>{''.join(lines)}</ul>"
            "<p>Modes ran in turn within each round; each ratio compares runs of the same round. Shown is the median of "
            "the rounds, with the lowest and highest round. Red: slower than stock in every round. Yellow: the median is "
            "below stock, but not every round. Green: faster in every round.</p>")


def _ratio_cell(entry: Optional[dict]) -> str:
    if entry is None:
        return "<td>-</td>"
    kind = "loss" if entry["max"] < 1 else "gain" if entry["min"] > 1 else "unsure" if entry["loses"] else ""
    mark = f"{LOSS} " if entry["loses"] else ""
    spread = f"<span class='range'>{entry['min']:.2f} to {entry['max']:.2f}</span>"
    return f"<td class='{kind}'>{mark}{entry['median']:.2f} {spread}</td>"


def _small_ratio(entry: Optional[dict], figure: str) -> str:
    value = (entry or {}).get(figure)
    return f"<td>{value['median']:.2f}</td>" if value else "<td>-</td>"


def _table(results: Results, compared: List[str]) -> str:
    rows = ["<tr><th>workload</th><th>clients</th>" +
            "".join(f"<th>{m}: throughput</th><th>CPU</th><th>p99</th><th>sleeps</th><th>longest wait</th>"
                    for m in compared) +
            "<th>efficiency " + " / ".join(results.modes()) + "</th></tr>"]
    for workload, clients in results.cells():
        cells = f"<td title='{html.escape(ALL[workload].about)}'>{workload}</td><td>{clients}</td>"
        for mode in compared:
            entry = results.ratio(workload, clients, mode)
            cells += _ratio_cell(entry) + "".join(_small_ratio(entry, figure) for figure in
                                                  ("cpu", "latency_p99", "sleeps", "longest_wait"))
        rows.append(f"<tr>{cells}<td>{_efficiencies(results, workload, clients)}</td></tr>")
    return (f"<div class='scroll'><table>{''.join(rows)}</table></div>"
            "<p>All figures are ratios to stock: transactions a second, server CPU per transaction, 99th percentile of the "
            "transaction time, sleeps (voluntary context switches of the server's processes) per transaction, and for the "
            "loads on one lock the longest wait in a run. Their efficiency: throughput divided by the most that this machine "
            "could reach with that lock: max(T1, min(CPUs × T1, 1 / (hold + h))), T1 the rate of one client alone on the "
            "stock server, h the cost of moving the lock's cache line between two CPUs.</p>")


def _rates(results: Results) -> str:
    rows = ["<tr><th>workload</th><th>clients</th><th>mode</th><th>transactions/s</th><th>CPU seconds per 1000</th>"
            "<th>p99 (ms)</th><th>sleeps per 1000</th><th>longest wait (ms)</th></tr>"]
    for workload, clients, mode in results.samples:
        figures = "".join(f"<td>{_median(results, workload, clients, mode, figure, form)}</td>" for figure, form in
                          (("tps", "{:.0f}"), ("cpu_seconds_per_1000_tx", "{:.3f}"), ("latency_p99_ms", "{:.2f}"),
                           ("sleeps_per_1000_tx", "{:.0f}"), ("longest_wait_ms", "{:.1f}")))
        rows.append(f"<tr><td>{workload}</td><td>{clients}</td><td>{mode}</td>{figures}</tr>")
    return ("<details><summary>Medians in absolute figures. On a shared machine they say little by themselves.</summary>"
            f"<table>{''.join(rows)}</table></details>")


def _facts(results: Results, command: str) -> str:
    return facts_table(
        command, results.machine, [(f"mode {mode}", about_mode(mode)) for mode in results.modes()] +
        [(f"workload {name}", ALL[name].about) for name in dict.fromkeys(w for w, _ in results.cells())])


def facts_table(command: str, machine: dict, more: List[Tuple[str, str]]) -> str:
    facts = [("command", command)] + [(name.replace("_", " "), str(value)) for name, value in machine.items()
                                      if value not in (None, "")] + more
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts)
    return f"<table class='facts'>{rows}</table>"
