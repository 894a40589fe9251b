# SPDX-License-Identifier: Apache-2.0
"""Speed of the Python client and of kivi.hf against what they stand beside.

    python -m kivi.bench --kivid PATH [--kivictl PATH] [--model DIR] [--only decode,resume,overhead]
        [--json FILE]

decode    tokens per second of a model at 2,048 and 16,384 tokens of context, through RemoteCache and
          with transformers' DynamicCache (sdpa), in turn in this process.  Both caches are filled
          with the same random K and V: speed only.
resume    a session of 4,096 tokens, committed; kivid is stopped and started; a new Python process
          connects, opens it and makes the next token's logits, against making them by prefilling the
          4,096 tokens again.  Neither includes loading the model.
overhead  Session.attend of one layer at 128 tokens of context, less `kivictl bench step` on the same
          service, in turn; the opponent is the 150 us allowed.

Every figure is the median of five runs; a ratio above 1 means that ours is better.  Exit code 4 says
that a goal was missed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

import kivi

RUNS = 5
RESUME_TOKENS = 4096
OVERHEAD_US = 150.0
STEP = kivi.Layout(layers=1, kv_heads=8, query_heads=32, head_dim=128)
STEP_CONTEXT, STEP_SESSIONS, STEP_FRAMES = 128, 6, 32  # as kivictl bench step does it


class Daemon:
    """A kivid of our own in a directory of its own, that can be stopped and started again."""

    def __init__(self, program: str, directory: str) -> None:
        self.program, self.directory = program, pathlib.Path(directory)
        self.target = f"unix://{directory}/run/kivid.sock"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.program, f"--listen={self.target}", f"--disk-path={self.directory / 'data'}",
             "--disk-bytes=4GiB", "--arena-bytes=1GiB", "--tail-bytes-max=512MiB",
             "--log-level=warn"])
        with kivi.Client(self.target) as client:
            client.wait_ready(60)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def row(name: str, ours: float, opponent: float, opponent_name: str, unit: str, goal: float,
        less_is_better: bool) -> Dict[str, Any]:
    ratio = opponent / ours if less_is_better else ours / opponent
    return {"name": name, "ours": ours, "opponent": opponent, "opponent_name": opponent_name,
            "unit": unit, "ratio": ratio, "goal": goal, "met": ratio >= goal}


# ---- overhead ----------------------------------------------------------------------------------


def attend_us(client: kivi.Client) -> float:
    """p50 of attend() that appends a token, on fresh sessions of STEP_CONTEXT tokens."""
    rng = np.random.default_rng(1)
    shape = (2, STEP_CONTEXT + 1, STEP.kv_heads, STEP.head_dim)
    k, v = rng.standard_normal(shape).astype(np.float16)
    q = rng.standard_normal((1, STEP.query_heads, STEP.head_dim)).astype(np.float16)
    times = []
    for _ in range(STEP_SESSIONS):
        with client.session(f"bench-{time.time_ns()}", STEP) as s:
            s.append(0, k[:STEP_CONTEXT], v[:STEP_CONTEXT])
            for _ in range(STEP_FRAMES):
                began = time.perf_counter()
                s.attend(0, q, k[STEP_CONTEXT:], v[STEP_CONTEXT:])
                times.append(time.perf_counter() - began)
            name = s.name
        client.delete(name)
    return statistics.median(times) * 1e6


def overhead(daemon: Daemon, kivictl: str) -> List[Dict[str, Any]]:
    ours, theirs = [], []
    with kivi.Client(daemon.target) as client:
        attend_us(client)
        for _ in range(RUNS):
            ours.append(attend_us(client))
            answer = subprocess.run(
                [kivictl, "bench", "step", "--target", daemon.target, "--json", "-n", str(RUNS),
                 "--sessions", str(STEP_SESSIONS)], capture_output=True, text=True, check=False)
            theirs.append(json.loads(answer.stdout)["rows"][0]["ours"])
    step, base = statistics.median(ours), statistics.median(theirs)
    return [row(f"client overhead per attend ({step:.0f} us, less {base:.0f} us of kivictl)",
                step - base, OVERHEAD_US, "allowed", "us", 1.0, less_is_better=True)]


# ---- decode ------------------------------------------------------------------------------------


def load(directory: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import kivi.hf
    kivi.hf.register()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def forward(model: Any, ids: Any, implementation: str, cache: Any) -> Any:
    """Logits of the last token."""
    import torch
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


def filled(model: Any, client: kivi.Client, context: int) -> Tuple[kivi.Session, Any, Any]:
    """(session, RemoteCache, DynamicCache) with the same K and V of `context` tokens."""
    import torch
    from transformers import DynamicCache

    import kivi.hf
    info = client.register(kivi.hf.layout_of(model.config, dtype="f16"))
    session = client.session(f"bench-{time.time_ns()}", info)
    stock = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(1)
    for layer in range(info.layers):
        k, v = torch.randn(2, context, info.kv_heads, info.head_dim, generator=generator).half()
        session.append(layer, k, v, token_ids=range(context) if layer == 0 else None)
        stock.update(k.float().transpose(0, 1)[None], v.float().transpose(0, 1)[None], layer)
    return session, kivi.hf.RemoteCache(model.config, session), stock


def decode(daemon: Daemon, model: Any, context: int, goal: float) -> Dict[str, Any]:
    import torch
    steps = 8
    with kivi.Client(daemon.target) as client:
        session, remote, stock = filled(model, client, context)

        def rate(implementation: str, cache: Any) -> float:
            token = torch.tensor([[5]])
            forward(model, token, implementation, cache)
            began = time.perf_counter()
            for _ in range(steps):
                token = forward(model, token, implementation, cache).argmax()[None, None]
            return steps / (time.perf_counter() - began)

        rate("kivi", remote), rate("sdpa", stock)
        pairs = [(rate("kivi", remote), rate("sdpa", stock)) for _ in range(RUNS)]
        session.close(commit=False)
    ours, theirs = (statistics.median(p) for p in zip(*pairs))
    return row(f"decode, {context} tokens of context", ours, theirs, "DynamicCache", "tokens/s",
               goal, less_is_better=False)


# ---- resume ------------------------------------------------------------------------------------


def text_ids(model: Any) -> Any:
    import torch
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, model.config.vocab_size, (1, RESUME_TOKENS + 1), generator=generator)


def resume_child(target: str, directory: str) -> None:
    """In a process of its own: prints seconds to resume and seconds to prefill again."""
    from transformers import DynamicCache

    import kivi.hf
    model = load(directory)
    ids = text_ids(model)
    forward(model, ids[:, :64], "sdpa", DynamicCache(config=model.config))  # warms torch up
    began = time.perf_counter()
    with kivi.Client(target) as client:
        session = client.session("resume", kivi.hf.layout_of(model.config, dtype="f16"),
                                 mode="existing")
        forward(model, ids[:, -1:], "kivi", kivi.hf.RemoteCache(model.config, session))
        ours = time.perf_counter() - began
        assert session.length == RESUME_TOKENS + 1
        session.close(commit=False)  # so that the next run finds RESUME_TOKENS again
    began = time.perf_counter()
    forward(model, ids, "sdpa", DynamicCache(config=model.config))
    print(json.dumps([ours, time.perf_counter() - began]))


def resume(daemon: Daemon, model: Any, directory: str) -> Dict[str, Any]:
    import kivi.hf
    ids = text_ids(model)
    with kivi.Client(daemon.target, timeout=120) as client:
        with client.session("resume", kivi.hf.layout_of(model.config, dtype="f16")) as session:
            forward(model, ids[:, :-1], "kivi", kivi.hf.RemoteCache(model.config, session))
    pairs = []
    for _ in range(RUNS):
        daemon.stop()
        daemon.start()
        answer = subprocess.run([sys.executable, "-m", "kivi.bench", "--resume-child", daemon.target,
                                 "--model", directory], capture_output=True, text=True, check=True)
        pairs.append(json.loads(answer.stdout.splitlines()[-1]))
    ours, theirs = (statistics.median(p) * 1e3 for p in zip(*pairs))
    return row(f"resume {RESUME_TOKENS} tokens, both sides restarted", ours, theirs,
               "prefill again", "ms", 10.0, less_is_better=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kivi.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kivid", default="kivid", help="the daemon to start")
    parser.add_argument("--kivictl", default="kivictl", help="for the overhead")
    parser.add_argument("--model", help="a directory that transformers loads")
    parser.add_argument("--only", default="decode,resume,overhead")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--resume-child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resume_child:
        resume_child(args.resume_child, args.model)
        return 0
    only = args.only.split(",")
    if args.model is None and {"decode", "resume"} & set(only):
        parser.error("--model: decode and resume need one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes the daemon along
    rows: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        daemon = Daemon(args.kivid, directory)
        try:
            model: Optional[Any] = load(args.model) if args.model else None
            parts: Dict[str, Callable[[], List[Dict[str, Any]]]] = {
                "overhead": lambda: overhead(daemon, args.kivictl),
                "decode": lambda: [decode(daemon, model, 2048, 0.5),
                                   decode(daemon, model, 16384, 1.0)],
                "resume": lambda: [resume(daemon, model, args.model)],
            }
            for name in only:
                for one in parts[name]():
                    print(f"{one['name']:58s} {one['ours']:9.1f} {one['opponent']:9.1f} "
                          f"{one['unit']:9s} {one['opponent_name']:14s} {one['ratio']:6.2f} "
                          f"{one['goal']:5.2f} {'met' if one['met'] else 'MISSED'}", flush=True)
                    rows.append(one)
        finally:
            daemon.stop()
    if args.json:
        args.json.write_text(json.dumps({"bench": "python", "machine": platform.node(),
                                         "rows": rows}, indent=1) + "\n")
    return 0 if all(r["met"] for r in rows) else 4


if __name__ == "__main__":
    sys.exit(main())
