#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws how attention on a GPU grows, and prints the same as tables in Markdown.

    cuda_bench --quick sweep > sweep.log
    plot_sweep.py sweep.log docs/attend-gpu.png

Needs matplotlib.
"""

import json
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(path):
    """{(D, G): {B: {T: (microseconds, read ceiling)}}} and the GPU's name."""
    found, gpu = {}, "?"
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            gpu = row.get("gpu", gpu)
            match = re.match(r"attend kivi2 B=(\d+) T=(\d+) G=(\d+) D=(\d+)", row.get("name", ""))
            if match:
                batch, tokens, group, dim = map(int, match.groups())
                series = found.setdefault((dim, group), {}).setdefault(batch, {})
                series[tokens] = (row["us"], row["ceiling_us"])
    return found, gpu


def short(tokens):
    return f"{tokens // 1024}K"


def table(key, batches):
    lengths = sorted({t for series in batches.values() for t in series})
    print(f"\nhead_dim {key[0]}, {key[1]} query head{'s' * (key[1] > 1)} to a KV head\n")
    print("| B | " + " | ".join(short(t) for t in lengths) + " |")
    print("|" + "---|" * (len(lengths) + 1))
    for batch, series in sorted(batches.items()):
        cells = [f"{series[t][0]:.1f} ({series[t][1] / series[t][0]:.2f})" if t in series else "-"
                 for t in lengths]
        print(f"| {batch} | " + " | ".join(cells) + " |")


def main():
    found, gpu = read(sys.argv[1])
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), sharey=True)
    for axis, key in zip(axes, [(64, 4), (128, 4), (256, 4)]):
        for batch, series in sorted(found[key].items()):
            lengths = sorted(series)
            line, = axis.plot(lengths, [series[t][0] for t in lengths], marker=".", label=f"B = {batch}")
            axis.plot(lengths, [series[t][1] for t in lengths], ":", color=line.get_color())
        axis.set(title=f"head_dim {key[0]}, GQA {key[1]}", xlabel="tokens", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds (dotted: reading the bytes)")
    axes[0].legend()
    figure.suptitle(f"kivi2, one query token, 8 KV heads, one layer, {gpu}")
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=80)
    for key in sorted(found):
        table(key, found[key])


if __name__ == "__main__":
    main()
