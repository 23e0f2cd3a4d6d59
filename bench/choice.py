#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How good the cost model's picks are: choice.py LINES.jsonl [PLOT.png]

LINES is what `voxgemm tune --suite SUITE --exhaustive --budget 5 --json LINES.jsonl` wrote. Prints
the time of the model's pick over the fastest kernel's as a distribution, all and by pass, and the
worst problems. A line counts if its kernels were all measured; of the others there are as many as
it says.
"""

import json
import pathlib
import sys


def share(values: list[float], part: float) -> float:
    return values[min(int(part * len(values)), len(values) - 1)]


def main(lines: str, plot: str | None = None) -> None:
    rows = [json.loads(line) for line in pathlib.Path(lines).read_text().splitlines()]
    known = [row for row in rows if row["model_over_best"] is not None]
    whole = [row for row in known if row["known"] == row["able"]]
    print(f"{len(rows)} problems, {len(whole)} with every kernel measured")
    groups = {"all": whole}
    for row in whole:
        groups.setdefault(row["problem"].split()[0], []).append(row)
    print("| | problems | median | p95 | worst |\n|---|---|---|---|---|")
    for name, group in groups.items():
        ratios = sorted(row["model_over_best"] for row in group)
        if ratios:
            numbers = (share(ratios, 0.5), share(ratios, 0.95), ratios[-1])
            print(f"| {name} | {len(ratios)} |", " | ".join(f"{n:.3f}" for n in numbers), "|")
    for row in sorted(whole, key=lambda row: -row["model_over_best"])[:10]:
        print(
            f"{row['model_over_best']:.2f}  {row['problem']}: {row['model']}, not {row['picked']}"
        )
    if plot:
        draw(sorted(row["model_over_best"] for row in whole), plot)


def draw(ratios: list[float], path: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(ratios, [(k + 1) / len(ratios) for k in range(len(ratios))], drawstyle="steps-post")
    axes.set(xlabel="model's pick over fastest kernel", ylabel="share of problems", ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
