"""Precision for each stage, chosen from the table, against the best uniform one: both measured, side by side.

Run: python -m benchmarks.precision [--networks 30] [--seeds 0] [--folder DIR] [--json]

The rows of random networks are measured in fp32 and in int8, and some other networks whole, in a random precision for
each part, which correct the table. For each network the fastest assignment by the corrected table is taken, or the best
uniform one where the predicted gain is within the margin of the estimate's deviation (`nas.latency.precision`). Then it
and both uniform ones are measured as whole networks in turns, session by session, several times over. Nothing that is
compared was used for the correction. Measurements stay in the folder; the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import parser, report, spread
from benchmarks.estimate import draw, in_precision, say, told_networks, told_rows
from nas.core.errors import NasError
from nas.core.records import Candidate, Precision
from nas.core.walk import expand
from nas.devices import open_device
from nas.devices.base import Device
from nas.latency.fitting import Fitted, fit_correction
from nas.latency.lines import network_key
from nas.latency.precision import GAIN_STD, Assignments, assignments
from nas.latency.table import LatencyTable
from nas.measure.fill import fill, fp32_mb, measure_streaming
from nas.measure.networks import measure_networks, network_bytes, network_job
from nas.search.experiment import space_file
from nas.space.space import SearchSpace, load_space

CHOICES: tuple[Precision, ...] = ("fp32", "int8")
CLASSES = 10
EVIDENCE_SEED = 1000  # added to the seed of the networks: other ones
AT_A_TIME = 10  # networks compared in one go, each in three precisions that take turns
GOAL_SPEED_UP = 1.08


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What the table says of one network."""

    network: Candidate
    solved: Assignments
    number: int  # of the assignment taken
    raw: int  # of the one that the plain sum would take, without a margin

    @property
    def chosen(self) -> Candidate:
        return self.network.with_precision(self.solved.precisions(self.number))

    @property
    def gain(self) -> float:
        """Predicted speed-up over the best uniform precision."""
        return float(self.solved.ms[self.solved.uniform].min() / self.solved.ms[self.number])


def plain_networks(space: SearchSpace, count: int, seed: int) -> list[Candidate]:
    """Different random architectures of a space, without exits."""
    found: dict[str, Candidate] = {}
    for candidate in draw(space, 2 * count + 8, seed):
        network = replace(candidate, exits=())
        found.setdefault(network.arch_id, network)
    return list(found.values())[:count]


def corrected(table: LatencyTable, device: Device, evidence: Sequence[Candidate]) -> Fitted:
    """The correction from these networks, measured where the table lacks them."""
    measure_networks(table, device, evidence, form="plain", progress=told_networks)
    say("")
    return fit_correction(table, [table.networks[network_key(c, "plain")] for c in evidence])


def fill_rows(table: LatencyTable, device: Device, networks: Sequence[Candidate]) -> None:
    """Measures the rows of networks in every precision."""
    layers = dict.fromkeys(x for c in networks for p in CHOICES for x in expand(c.with_precision(p)))
    say(f"{len(networks)} networks, {len(layers)} different rows")
    measure_streaming(table, device, max(fp32_mb(c) for c in networks))
    fill(table, device, layers, progress=told_rows)
    say("")


class Comparisons:
    """`comparisons.jsonl`: milliseconds of each network in each precision, one line for each repeat."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "comparisons.jsonl"
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        lines = [line for line in text.split("\n")[:-1] if line]  # a torn last line has no end
        self._known = {(r["network"], r["repeat"]): r for r in map(json.loads, lines)}

    def get(self, choice: Choice, repeat: int) -> dict[str, float] | None:
        """Milliseconds by precision, and of the `chosen`; None where this choice was not measured."""
        found = self._known.get((choice.network.arch_id, repeat))
        if found is None or found["precisions"] != list(choice.chosen.precisions):
            return None
        return dict(found["ms"])

    def add(self, choice: Choice, repeat: int, ms: dict[str, float]) -> None:
        """Keeps a comparison."""
        record = {
            "network": choice.network.arch_id,
            "repeat": repeat,
            "precisions": list(choice.chosen.precisions),
            "ms": ms,
        }
        self._known[choice.network.arch_id, repeat] = record
        with self._file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")


def compare(device: Device, choices: Sequence[Choice], repeat: int, kept: Comparisons) -> None:
    """Measures each network in every uniform precision and as chosen, all of them in turns."""
    todo = [c for c in choices if kept.get(c, repeat) is None]
    for start in range(0, len(todo), AT_A_TIME):
        part = todo[start : start + AT_A_TIME]
        networks = {
            network_key(n, "plain"): n
            for c in part
            for n in (*(c.network.with_precision(p) for p in CHOICES), c.chosen)
        }
        jobs = [network_job(n, "plain", network_bytes(n, "plain")) for n in networks.values()]
        measured = device.measure(jobs)
        ms = {m.key: m.latency_ms for m in measured}
        failed = {m.key: m.error for m in measured if m.latency_ms is None}
        for key, error in failed.items():
            say(f"\n{key}: {error}")
        for c in part:
            named = {p: ms[network_key(c.network.with_precision(p), "plain")] for p in CHOICES}
            named["chosen"] = ms[network_key(c.chosen, "plain")]
            if all(v is not None for v in named.values()):
                kept.add(c, repeat, {k: float(v or 0.0) for k, v in named.items()})
        say(f"\r  comparison {repeat + 1}: {min(start + AT_A_TIME, len(todo))} of {len(todo)}   ", end="")
    say("")


def chosen_from(table: LatencyTable, fitted: Fitted, network: Candidate, margin_std: float) -> Choice:
    """Solves one network."""
    solved = assignments(network, CHOICES, table, fitted)
    raw = assignments(network, CHOICES, table)
    return Choice(network, solved, solved.fastest(margin_std), int(raw.ms.argmin()))


def figures(choices: Sequence[Choice], kept: Comparisons, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One record for each network, and the summary."""
    records = []
    differences: list[float] = []
    for c in choices:
        found = [ms for r in range(repeats) if (ms := kept.get(c, r)) is not None]
        if not found:
            continue
        ms = {name: min(each[name] for each in found) for name in found[0]}  # the protocol's rule: what disturbs adds
        ratios = [min(each[p] for p in CHOICES) / each["chosen"] for each in found]
        differences += [float(np.log(r / ratios[0]) / np.sqrt(2)) for r in ratios[1:]]
        records.append(
            {
                "network": c.network.arch_id,
                "precisions": c.chosen.precision_text,
                "changes": int(np.count_nonzero(np.diff(c.solved.index[c.number]))),
                "ms": ms,
                "speed_up": min(ms[p] for p in CHOICES) / ms["chosen"],
                "speed_up_each_time": ratios,
                "predicted": c.gain,
                "std": float(c.solved.std_ms[c.number] / c.solved.ms[c.number]),
                "as_raw": c.number == c.raw,
            }
        )
    noise = float(np.sqrt(np.mean(np.square(differences)))) if differences else None
    speed_ups = [r["speed_up"] for r in records]
    mixed = [r for r in records if r["changes"]]
    summary = {
        "networks": len(records),
        "mixed": len(mixed),
        "slower": sum(s < 1 for s in speed_ups),
        "slower_beyond_noise": sum(s < 1 - (noise or 0.0) for s in speed_ups),
        "least": min(speed_ups, default=None),
        "speed_up": spread(speed_ups) if speed_ups else None,
        "predicted": spread([r["predicted"] for r in records]) if records else None,
        "prediction_error": statistics.fmean(abs(r["predicted"] / r["speed_up"] - 1) for r in mixed) if mixed else None,
        "noise_of_a_ratio": noise,
        "repeats": repeats,
        "changes": statistics.fmean(r["changes"] for r in mixed) if mixed else None,
        "same_as_plain_sum": sum(r["as_raw"] for r in records),
        "goal": {"slower": 0, "median": GOAL_SPEED_UP},
    }
    return records, summary


def print_goals(summary: dict[str, Any]) -> None:
    """The two figures that are aimed at."""
    if not summary["networks"]:
        print("no network could be compared: see the errors above")
        return
    noise = summary["noise_of_a_ratio"]
    beyond = "" if noise is None else f", {summary['slower_beyond_noise']} beyond the noise of a ratio ({noise:.4f})"
    speed_up = summary["speed_up"]
    print(f"slower than the best uniform precision: {summary['slower']} of {summary['networks']} (goal 0){beyond}")
    print(
        f"speed-up: median {speed_up['median']:.3f} (goal {GOAL_SPEED_UP}) [{speed_up['min']:.3f}, "
        f"{speed_up['max']:.3f}]; {summary['mixed']} networks mix precisions"
    )


def main(arguments: list[str]) -> int:
    """Measures what is missing, then compares and prints; gives the exit code."""
    options = parser(__doc__)
    options.add_argument("--networks", type=int, default=30, help="random networks of each seed (default 30)")
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the networks (default 0)")
    options.add_argument("--evidence", type=int, default=30, help="other networks that correct the table (default 30)")
    options.add_argument("--repeats", type=int, default=2, help="how often everything is compared (default 2)")
    options.add_argument(
        "--margin", type=float, default=GAIN_STD, help=f"deviations that a gain must exceed (default {GAIN_STD:g})"
    )
    options.add_argument("--space", default="small-64", help="search space, by name or file")
    options.add_argument("--folder", type=Path, default=Path("runs/benchmark-precision"), help="keeps measurements")
    chosen = options.parse_args(arguments)
    try:
        device = open_device("cpu")
        table = LatencyTable.open(chosen.folder / device.profile.name, device.profile)
        space = load_space(space_file(chosen.space, "--space"), CLASSES, device.profile.precisions)
        networks = [n for seed in chosen.seeds for n in plain_networks(space, chosen.networks, seed)]
        known = {n.arch_id for n in networks}
        others = plain_networks(space, chosen.evidence + len(networks), EVIDENCE_SEED + chosen.seeds[0])
        rng = np.random.default_rng(EVIDENCE_SEED)
        evidence = [in_precision(n, "mixed", rng) for n in others if n.arch_id not in known][: chosen.evidence]
        fill_rows(table, device, [*networks, *evidence])
        fitted = corrected(table, device, evidence)
        solved = [chosen_from(table, fitted, n, chosen.margin) for n in networks]
        kept = Comparisons(chosen.folder)
        for repeat in range(chosen.repeats):
            compare(device, solved, repeat, kept)
    except NasError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    records, summary = figures(solved, kept, chosen.repeats)
    rows = [
        [
            r["network"],
            r["precisions"],
            *(1e3 * r["ms"][k] for k in (*CHOICES, "chosen")),
            r["predicted"],
            r["speed_up"],
        ]
        for r in sorted(records, key=lambda r: -r["speed_up"])
    ]
    columns = ("network", "chosen precision", *(f"{p}, us" for p in CHOICES), "chosen, us", "predicted", "measured")
    document = {"space": space.name, "device": device.profile.name, "summary": summary, "networks": records}
    print_goals(summary)
    report(f"Speed-up over the best uniform precision: {json.dumps(summary)}", columns, rows, document, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
