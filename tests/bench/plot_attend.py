#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws what attend_bench measured as the context grows.

    attend_bench --json attend.json --grow 262144
    plot_attend.py attend.json docs/attend-cpu.png

Needs matplotlib (on Debian: python3-matplotlib, seen by /usr/bin/python3). Prints the same as a table in Markdown.
"""

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(path):
    """{threads: {name: {tokens: microseconds}}}; kivid's own name is the codec's."""
    series = {}
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    for row in rows:
        if "16 rows" in row["name"]:
            continue
        lines = series.setdefault(row["threads"], {})
        codec = row["name"].split()[1].rstrip(",")
        opponent = "read floor" if row["opponent_name"] == "floor" else row["opponent_name"].split(",")[0]
        lines.setdefault(codec, {})[row["tokens"]] = row["ours"]
        lines.setdefault(opponent, {})[row["tokens"]] = row["opponent"]
    return series


def table(series):
    for threads, lines in sorted(series.items()):
        print(f"\n| tokens, {threads} thread{'s' * (threads > 1)} | " + " | ".join(f"{name}, us" for name in lines) + " |")
        print("|" + "---|" * (len(lines) + 1))
        for tokens in sorted(next(iter(lines.values()))):
            print(f"| {tokens} | " + " | ".join(f"{line.get(tokens, float('nan')):.4g}" for line in lines.values()) + " |")


def draw(series, path):
    figure, panels = plt.subplots(1, len(series), figsize=(5.2 * len(series), 4.2), sharey=True, squeeze=False)
    for panel, (threads, lines) in zip(panels[0], sorted(series.items())):
        for name, line in lines.items():
            tokens = sorted(line)
            style = {"linestyle": ":", "color": "grey"} if name == "read floor" else {"marker": "."}
            panel.plot(tokens, [line[t] for t in tokens], label=name, **style)
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=f"{threads} thread{'s' * (threads > 1)}")
        panel.grid(True, which="major", alpha=0.3)
    panels[0][0].set_ylabel("microseconds a layer, one query row")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    series = read(sys.argv[1])
    table(series)
    draw(series, sys.argv[2])


if __name__ == "__main__":
    main()
