"""The comparison of locks as text and as a page that stands alone."""

import html
import json
import math
import os
from typing import Callable, List, Optional

from .contention import KINDS, OF_BEST_PEER, OF_SPINLOCK, Cell, Comparison
from .report import LOSS, count, facts_table, page_head, pyplot, svg_of

OURS = "#2f9e44"
MARKS = "os^Dv<>pP*Xhd1234"


def duration(us: Optional[float]) -> str:
    """Short, for tables: 40n, 1.2u, 9.1m."""
    if us is None:
        return "-"
    for factor, unit in ((1e-6, "s"), (1e-3, "m"), (1, "u"), (1e3, "n")):
        if us * factor >= 1 or unit == "n":
            return f"{us * factor:.2g}{unit}" if us * factor < 10 else f"{us * factor:.0f}{unit}"
    raise AssertionError


def _ratio(results: Comparison, cell: Cell, lock: str) -> str:
    entry = results.ratio(cell, lock, results.best_peer(cell)) if lock in results.samples[cell] else None
    if entry is None:
        return "-"
    if not results.locks[lock].ours:
        return f"{entry['median']:.2f}"
    mark = LOSS if round(entry["median"], 2) < OF_BEST_PEER else ""
    return f"{mark}{entry['median']:.2f}[{entry['min']:.2f}..{entry['max']:.2f}]"


def _waits(results: Comparison, cell: Cell, lock: str) -> str:
    parts = [duration(results.median(cell, lock, f"wait_{which}_us")) for which in ("p50", "p99", "longest")]
    return "/".join(parts) if parts[0] != "-" else "-"


def _figure(figure: str) -> Callable:
    def show(results: Comparison, cell: Cell, lock: str) -> str:
        value = results.median(cell, lock, figure)
        return "-" if value is None else f"{value:.3g}"
    return show


MATRICES = (
    ("Operations a second: ratio to the best peer of the cell, whose rate is in the first column. Of ours with the "
     f"range of the rounds; {LOSS} below {OF_BEST_PEER:g}. -: not for processes", _ratio),
    ("Waits: median / 99th percentile / longest (n, u, m: nanoseconds, microseconds, milliseconds)", _waits),
    ("CPU seconds per million operations", _figure("cpu_seconds_per_million")),
    ("Sleeps per operation", _figure("sleeps_per_operation")),
)


def _matrix(results: Comparison, kind: str, show: Callable) -> List[List[str]]:
    names = list(results.locks)
    rows = [["section", kind, "best peer"] + names]
    for cell in results.samples:
        if cell.kind == kind:
            peer = results.best_peer(cell)
            best = f"{peer} {results.median(cell, peer, 'operations_per_second'):.3g}/s" if peer else "-"
            rows.append([cell.section, str(cell.count), best] + [show(results, cell, name) for name in names])
    return rows


def _uncontended(results: Comparison) -> List[List[str]]:
    kinds = [kind for kind in KINDS if any(kind in costs for costs in results.uncontended.values())]
    return [["lock"] + kinds] + [[name] + [f"{costs[kind]:.1f}" if kind in costs else "-" for kind in kinds]
                                 for name in results.locks if (costs := results.uncontended.get(name))]


def summary_line(machine: dict) -> str:
    line = (f"{count(machine['cpus'], 'CPU')} ({machine['cpu_model']}), Linux {machine['kernel']}, "
            f"{count(machine['rounds'], 'round')} of {machine['seconds']:g} s a measurement")
    for name in ("not_here", "note"):
        if machine.get(name):
            line += "; " + machine[name]
    return line


def target_lines(results: Comparison) -> List[str]:
    targets, lines = results.targets(), []
    for least, of in ((OF_BEST_PEER, "the best peer"), (OF_SPINLOCK, "the test-and-set lock, with more tasks than CPUs")):
        judged = [target for target in targets if target["wanted"] == least]
        if not judged:
            continue
        missed = [target for target in judged if not target["met"]]
        lines.append(f"{results.ours()}: at least {least:g} of {of}: met in {len(judged) - len(missed)} of {len(judged)} cells")
        lines += [f"  {LOSS} {Cell(t['kind'], t['count'], t['section'])}: {t['median']:.2f} "
                  f"[{t['min']:.2f}..{t['max']:.2f}] of {t['vs']}" for t in missed]
    return lines


def text_table(results: Comparison) -> str:
    parts = []
    for kind in KINDS:
        if any(cell.kind == kind for cell in results.samples):
            for title, show in MATRICES:
                parts += [title + ":", "", _aligned(_matrix(results, kind, show)), ""]
    if results.uncontended:
        parts += ["Taking and giving back a lock that nobody else wants, nanoseconds:", "", _aligned(_uncontended(results)), ""]
    return "\n".join(parts + target_lines(results) + [summary_line(results.machine)])


def _aligned(rows: List[List[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines))] + lines[1:])


# ---- page ----

def _plot(results: Comparison, kind: str, figure: str, label: str) -> str:
    """One panel a section, a line a lock, over the number of tasks; whiskers of the judged one from the lowest to the
    highest round.
    """
    plt = pyplot()
    sections = list(dict.fromkeys(cell.section for cell in results.samples if cell.kind == kind))
    columns = min(3, len(sections))
    lines = -(-len(sections) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3 * lines), squeeze=False)
    for ax in axes.flat[len(sections):]:
        ax.axis("off")
    colors = plt.get_cmap("tab20").colors
    handles = {}
    for ax, section in zip(axes.flat, sections):
        counts = [cell.count for cell in results.samples if cell.kind == kind and cell.section == section]
        for i, (name, lock) in enumerate(results.locks.items()):
            points = [(n, cell) for n, cell in enumerate(Cell(kind, c, section) for c in counts)
                      if name in results.samples[cell]]
            if not points:
                continue
            first = name == results.ours()
            handles[name], = ax.plot([n for n, _ in points], [results.median(cell, name, figure) or math.nan for _, cell in points],
                                     color=OURS if first else colors[i % len(colors)], marker=MARKS[i % len(MARKS)],
                                     markersize=4, linewidth=2.2 if first else 0.9, linestyle="-" if lock.ours else "--",
                                     zorder=3 if lock.ours else 2)
            if first:
                for n, cell in points:
                    values = results.values(cell, name, figure)
                    ax.plot([n, n], [min(values), max(values)], color="#222222", linewidth=0.8)
        ax.set_yscale("log")
        ax.set_xticks(range(len(counts)), [str(c) for c in counts])
        ax.set_title(section, fontsize=9)
        ax.set_xlabel(kind)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0][0].set_ylabel(label)
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.6 / (3 * lines)))
    fig.legend(handles.values(), handles.keys(), loc="upper center", ncol=min(8, len(handles)), frameon=False)
    return svg_of(fig)


def _html_table(rows: List[List[str]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(
            f"<{tag}{' class=loss' if cell.startswith(LOSS) else ''}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    return f"<div class='scroll'><table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table></div>"


def write(directory: str, results: Comparison, command: str) -> str:
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "micro.json"), "w") as f:
        json.dump(results.as_json(), f, indent=1)
        f.write("\n")
    parts = [page_head("Locks under contention"), f"<p>{html.escape(summary_line(results.machine))}.</p>",
             "<pre>" + html.escape("\n".join(target_lines(results))) + "</pre>"]
    for kind in KINDS:
        if any(cell.kind == kind for cell in results.samples):
            parts.append(f"<h2>{kind.capitalize()}</h2><div class='scroll'>")
            parts += [_plot(results, kind, "operations_per_second", "operations/s"),
                      _plot(results, kind, "cpu_seconds_per_million", "CPU s per million operations"), "</div>"]
            for title, show in MATRICES:
                parts += [f"<p>{html.escape(title)}.</p>", _html_table(_matrix(results, kind, show))]
    if results.uncontended:
        parts += ["<h2>Without contention</h2><p>Taking and giving back, nanoseconds.</p>", _html_table(_uncontended(results))]
    abouts = [(name, lock.about) for name, lock in results.locks.items()]
    parts += ["<h2>What was run</h2>", facts_table(command, results.machine, abouts), "</body></html>"]
    path = os.path.join(directory, "micro.html")
    with open(path, "w") as f:
        f.write("\n".join(parts))
    return path
