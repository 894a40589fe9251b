# SPDX-License-Identifier: Apache-2.0
"""Quality of the service's codecs on a causal language model.

Teacher forcing on the decode path: the text goes through the model in chunks of a few tokens whose
queries, keys and values go to a running kivid and whose attention comes back from it, so every
token attends to what the service really holds.  The reference is the same model with stock
attention on an exact cache.  (A block is packed as soon as 128 newer tokens are there, so the first
token of a chunk sees an exact window that is shorter by the chunk: --chunk 1 is a decode step and
slow, 8 is close to it.)

    python -m kivi.eval --target unix:///run/kivid/kivid.sock --model DIR --text FILE
        [--codecs raw16,kivi2] [--windows 96 --length 2048] [--needle 4096] [--json FILE]
        [--plot FILE.png]

It holds the reference's log-probabilities of one batch, float32: batch x length x vocabulary.

Columns: bits (a page's true bits per element, metadata counted), held (everything counted at that
length: sinks, window, metadata), perplexity, its ratio to the reference, KL(reference || codec) in
nats per token, how often the first choice agrees, and key retrieval.

With --json every finished batch is kept in FILE.partial, and a later call goes on from there.
Several processes may share the work, each with its own --stripe I/N of the batches and one FILE; a
last call without --stripe (or the one that ends last) shows the table of them all.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import pathlib
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

import kivi
import kivi.hf

from . import needle

CODECS = "raw16,kivi2-paper,kivi4-paper,kivi2.5,kivi2,kivi1.75,kivi1.5"
NEEDLE_SEED = 5


def stripe(text: str) -> Tuple[int, int]:
    index, count = (int(n) for n in text.split("/"))
    if not 0 <= index < count:
        raise ValueError(text)
    return index, count


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kivi.eval", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="of a running kivid")
    parser.add_argument("--model", required=True, help="a directory that transformers loads")
    parser.add_argument("--text", required=True, help="a UTF-8 text file")
    parser.add_argument("--codecs", default=CODECS, help="comma-separated presets")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--needle", type=int, default=0, metavar="TOKENS",
                        help="length of the key retrieval test; 0: none")
    parser.add_argument("--questions", type=int, default=256, help="of the key retrieval test")
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time")
    parser.add_argument("--chunk", type=int, default=8, help="tokens of a step, at most "
                        f"{kivi.hf.REMOTE_ROWS_MAX}")
    parser.add_argument("--window-tokens", type=int, help="exact newest tokens, instead of the preset's")
    parser.add_argument("--sink-blocks", type=int, default=None, help="exact first blocks, likewise")
    parser.add_argument("--stripe", type=stripe, default=(0, 1), metavar="I/N",
                        help="only every N-th batch, from the I-th (0 .. N - 1) on")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    return parser.parse_args()


class Results:
    """Sums per batch and codec, in memory and, line by line, in a file that a later call reads."""

    def __init__(self, path: Optional[pathlib.Path], key: str) -> None:
        self.batches: Dict[Tuple[str, int, str], Dict[str, float]] = {}
        self.key = key
        self.path = path
        self.load()

    def load(self) -> None:
        """Reads what this process and others have written."""
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a writer was stopped in the middle of it: that batch is measured again
            if entry["key"] == self.key:
                self.batches[entry["part"], entry["index"], entry["codec"]] = entry["sums"]

    def has(self, part: str, index: int, codec: str) -> bool:
        return (part, index, codec) in self.batches

    def add(self, part: str, index: int, codec: str, sums: Dict[str, float]) -> None:
        self.batches[part, index, codec] = sums
        if self.path is not None:
            entry = {"key": self.key, "part": part, "index": index, "codec": codec, "sums": sums}
            with self.path.open("a") as file:
                file.write("\n" + json.dumps(entry) + "\n")  # apart from what a stop left there

    def total(self, part: str, codec: str, of: Optional[str] = None) -> Dict[str, float]:
        """A codec's sums over the batches that `of` (itself if None) was measured on."""
        total: Dict[str, float] = {}
        for (a_part, index, a_codec), sums in self.batches.items():
            if (a_part, a_codec) == (part, codec) and self.has(part, index, of or codec):
                for name, value in sums.items():
                    total[name] = total.get(name, 0.0) + value
        return total


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        kivi.hf.register()
        self.args = args
        self.client = kivi.Client(args.target, timeout=600)
        self.client.wait_ready()
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        self.ids = self.tokenizer.encode(pathlib.Path(args.text).read_text(),
                                         add_special_tokens=False)
        self.bits: Dict[str, float] = {}

        self.can_keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def reference(self, rows: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Log-probabilities [batch, length - first, vocabulary] from stock attention."""
        self.model.set_attn_implementation("sdpa")
        result = None
        with torch.no_grad():
            for i, row in enumerate(rows):
                logits = self._logits(row[None], rows.shape[1] - first, use_cache=False)
                if result is None:
                    result = logits.new_empty(len(rows), *logits.shape[1:])
                torch.log_softmax(logits[0], -1, out=result[i])
        return result

    def through_service(self, rows: torch.Tensor, codec: str, first: int,
                        each: Callable[[int, torch.Tensor], None]) -> float:
        """Calls each(position, logits [batch, tokens, vocabulary]) for the tokens from `first` on,
        a chunk at a time.  Returns the bits held per element of K and V."""
        self.model.set_attn_implementation("kivi")
        info = self.client.register(self.layout(codec))
        stamp = f"eval-{time.time_ns()}"
        # A salt of its own: equal texts of an earlier run must not lend this one their blocks.
        sessions = [self.client.session(f"{stamp}-{i}", info, mode="create", salt=stamp.encode())
                    for i in range(len(rows))]
        try:
            cache = kivi.hf.RemoteCache(self.model.config, sessions)
            with torch.no_grad():
                for at in range(0, rows.shape[1], self.args.chunk):
                    chunk = rows[:, at:at + self.args.chunk]
                    wanted = at + chunk.shape[1] - max(at, first)
                    logits = self._logits(chunk, max(1, wanted), past_key_values=cache,
                                          use_cache=True)
                    if wanted > 0:
                        each(max(at, first), logits)
            held = self.client.describe(sessions[0].name)
            return 16 * held.bytes_held / max(1, held.bytes_full)
        finally:
            for session in sessions:
                session.close(commit=False)
                try:
                    self.client.delete(session.name)
                except kivi.NotFound:
                    pass  # never committed: closing it was enough

    def layout(self, codec: str) -> kivi.Layout:
        more: Dict[str, Any] = {}
        if self.args.window_tokens is not None:
            more = {"window_tokens": self.args.window_tokens,
                    "sink_blocks": self.args.sink_blocks or 0}
        return kivi.hf.layout_of(self.model.config, dtype="f16", codec=codec, **more)

    def _logits(self, ids: torch.Tensor, last: int, **more: Any) -> torch.Tensor:
        """Logits of the last tokens only, where the model can leave out the others."""
        if self.can_keep:
            more["logits_to_keep"] = last
        return self.model(ids, **more).logits[:, -last:]

    def mine(self, count: int) -> range:
        """Where the batches of this process begin."""
        index, stripes = self.args.stripe
        return range(index * self.args.batch, count, stripes * self.args.batch)

    def perplexity(self, codecs: List[str], results: Results) -> None:
        args = self.args
        windows = min(args.windows, len(self.ids) // args.length)
        rows = torch.tensor(self.ids[:windows * args.length]).view(-1, args.length)
        for at in self.mine(windows):
            todo = [c for c in codecs if not results.has("text", at, c)]
            if not todo:
                continue
            batch = rows[at:at + args.batch]
            truth = self.reference(batch)
            if not results.has("text", at, "reference"):
                nll = -truth[:, :-1].gather(-1, batch[:, 1:, None]).sum(dtype=torch.float64).item()
                results.add("text", at, "reference",
                            {"tokens": batch.numel() - len(batch), "nll": nll})
            for codec in todo:
                sums = compare(self, batch, codec, truth)
                results.add("text", at, codec, sums)
                progress(f"text {at + len(batch)}/{windows}  {codec}  KL "
                         f"{sums['kl'] / sums['tokens']:.5f}")

    def retrieval(self, codecs: List[str], results: Results) -> None:
        args = self.args
        rows = needle.rows(self.tokenizer, self.ids, -(-args.questions // needle.QUESTIONS),
                           args.needle, NEEDLE_SEED)
        for at in self.mine(len(rows)):
            batch = rows[at:at + args.batch]
            ids = torch.tensor([row.ids for row in batch])
            for codec in ["reference", *codecs]:
                if results.has("needle", at, codec):
                    continue
                first = min(start for row in batch for start, _ in row.answers) - 1
                if codec == "reference":
                    logits = self.reference(ids, first)
                else:
                    parts: List[torch.Tensor] = []
                    self.through_service(ids, codec, first, lambda _, part: parts.append(part))
                    logits = torch.cat(parts, 1)
                right = sum(
                    bool((told[start - 1 - first:start - 1 - first + n].argmax(-1)
                          == torch.tensor(row.ids[start:start + n])).all())
                    for told, row in zip(logits, batch) for start, n in row.answers)
                results.add("needle", at, codec,
                            {"right": right, "asked": sum(len(r.answers) for r in batch)})
                progress(f"needle {at + len(batch)}/{len(rows)}  {codec}  {right}")


def compare(bench: Bench, batch: torch.Tensor, codec: str, truth: torch.Tensor
            ) -> Dict[str, float]:
    """Sums over all tokens of a batch that have a successor; a chunk and a row at a time, so that
    the sums are made in the processor's cache."""
    length = batch.shape[1]
    sums = {"tokens": 0.0, "nll": 0.0, "kl": 0.0, "top1": 0.0, "held": 0.0, "batches": 1.0}

    def chunk(at: int, logits: torch.Tensor) -> None:
        end = min(at + logits.shape[1], length - 1)
        for told, reference, row in zip(logits, truth, batch):
            p, r = told[:end - at].log_softmax(-1), reference[at:end]
            sums["tokens"] += len(p)
            sums["nll"] -= p.gather(-1, row[at + 1:end + 1, None]).sum().item()
            sums["kl"] += (r.exp() * (r - p)).sum().item()
            sums["top1"] += (p.argmax(-1) == r.argmax(-1)).sum().item()

    sums["held"] = bench.through_service(batch, codec, 0, chunk)
    return sums


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def table(bench: Bench, codecs: List[str], results: Results) -> List[Dict[str, Any]]:
    results.load()
    rows = []
    for codec in ["reference", *codecs]:
        text = results.total("text", codec)
        base = results.total("text", "reference", of=codec)
        found = results.total("needle", codec)
        tokens = text.get("tokens", 0)
        nll = text["nll"] / tokens if tokens else math.nan
        is_reference = codec == "reference"
        rows.append({
            "codec": codec,
            "bits": 16.0 if is_reference else round(bench.bits.get(codec, math.nan), 4),
            "held": 16.0 if is_reference else
            round(text["held"] / text["batches"], 3) if tokens else None,
            "perplexity": math.exp(nll) if tokens else None,
            "ratio": math.exp(nll - base["nll"] / base["tokens"]) if tokens else None,
            "kl": 0.0 if is_reference else text["kl"] / tokens if tokens else None,
            "top1": 1.0 if is_reference else text["top1"] / tokens if tokens else None,
            "needle": found["right"] / found["asked"] if found else None,
            "tokens": int(tokens),
            "asked": int(found["asked"]) if found else 0,
        })
    return rows


def show(rows: List[Dict[str, Any]]) -> None:
    print(f"{'codec':14s} {'bits':>6s} {'held':>6s} {'perplexity':>11s} {'ratio':>8s} "
          f"{'KL':>9s} {'top-1':>7s} {'needle':>7s}")
    for row in rows:
        cell = lambda name, form, row=row: "-" if row[name] is None else format(row[name], form)
        print(f"{row['codec']:14s} {cell('bits', '.3f'):>6s} {cell('held', '.2f'):>6s} "
              f"{cell('perplexity', '.3f'):>11s} {cell('ratio', '.4f'):>8s} "
              f"{cell('kl', '.6f'):>9s} {cell('top1', '.4f'):>7s} {cell('needle', '.3f'):>7s}")


def plot(rows: List[Dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    points = [r for r in rows if r["kl"] and r["codec"] != "reference"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for row in points:
        axes.plot(row["bits"], row["kl"], "o")
        axes.annotate(row["codec"], (row["bits"], row["kl"]), xytext=(6, 4),
                      textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("bits per element, metadata counted")
    axes.set_ylabel("KL to the exact cache, nats per token")
    axes.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse()
    codecs = [c for c in args.codecs.split(",") if c]
    bench = Bench(args)
    key = json.dumps([str(args.model), str(args.text), args.length, args.needle, args.batch,
                      args.chunk, args.window_tokens, args.sink_blocks])
    partial = args.json.with_suffix(args.json.suffix + ".partial") if args.json else None
    results = Results(partial, key)
    for codec in codecs:
        bench.bits[codec] = bench.client.register(bench.layout(codec)).bits_per_element
    if args.windows:
        bench.perplexity(codecs, results)
    if args.needle:
        bench.retrieval(codecs, results)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    rows = table(bench, codecs, results)
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({
            "model": str(args.model), "text": str(args.text), "length": args.length,
            "windows": args.windows, "needle": args.needle, "questions": args.questions,
            "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
