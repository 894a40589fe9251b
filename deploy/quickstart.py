# SPDX-License-Identifier: Apache-2.0
"""quickstart.py - the second half of deploy/quickstart: everything once, with a real KV cache.

Several sessions of the same text, each under a salt of its own so that they share nothing, are streamed
into a kivid whose host memory is too small for them; two more show the published codec and a session that
shares all its blocks with another. All of them attend. kivid is killed with -9 and started again, and
must answer the same. What it answers is held against tests/reference/attention.py, which shares no code
with it: on the cache as it was (the difference is quantization) and on the cache as kivid gives it back
(the difference is rounding).
"""
import argparse
import hashlib
import json
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "reference"))
import attention  # noqa: E402

FIXTURE = ROOT / "tests" / "data" / "llama30m-wikitext-4k.safetensors"
CODEC, PUBLISHED = "kivi2", "kivi2-paper"
SINKS = {CODEC: 1, PUBLISHED: 0}  # first blocks that stay exact
# On the fixture, simulated in Python before kivid existed; to be reproduced within 3 percent.
EXPECTED = {CODEC: 0.166, PUBLISHED: 0.286}
TOLERANCE = 0.03
# What kivid answers against what it says it holds: rounding of a fetched element to 11 bits.
ROUNDING = 1e-3
BLOCK = 128
MIB = 1 << 20
SESSIONS_MAX = 48


class Service:
    """A kivid in a directory of its own, and kivictl to speak to it."""

    def __init__(self, binaries, directory, flags):
        self.binaries, self.directory, self.flags = binaries, directory, flags
        self.target = f"unix://{directory}/kivid.sock"
        self.log = open(directory / "kivid.log", "ab")
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [self.binaries / "service" / "kivid", f"--listen={self.target}",
             f"--disk-path={self.directory}/data", *self.flags], stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.run("ping", check=False).returncode == 0:
                return
            time.sleep(0.02)
        raise Failure("kivid did not get ready; its log:\n" + (self.directory / "kivid.log").read_text())

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        self.log.close()

    def run(self, *arguments, check=True):
        done = subprocess.run([self.binaries / "clients" / "cli" / "kivictl", *arguments, "--json",
                               "--quiet", f"--target={self.target}"], capture_output=True, text=True)
        if check and done.returncode != 0:
            raise Failure(f"kivictl {' '.join(map(str, arguments))}: {done.stderr.strip()}\n"
                          + (self.directory / "kivid.log").read_text()[-2000:])
        return done

    def ask(self, *arguments):
        return json.loads(self.run(*arguments).stdout)


class Failure(Exception):
    pass


class Session:
    def __init__(self, name, codec, salt, directory):
        self.name, self.codec, self.salt = name, codec, salt
        self.first, self.second = directory / f"{name}.1", directory / f"{name}.2"
        self.fetched = directory / f"{name}.kv"
        self.appended = self.info = None
        self.error_vs_full = self.error_vs_dequantized = None


class Clock:
    """Seconds of each step, by name."""

    def __init__(self, seconds):
        self.seconds = seconds

    def step(self, name, work):
        sys.stderr.write(f"quickstart: {name.replace('_', ' ')}\n")
        began = time.monotonic()
        result = work()
        self.seconds[name] = round(time.monotonic() - began, 3)
        return result


def shape_of(text):
    """(layers, bytes of all K and V, bytes of a block in 16 bits, tokens)"""
    layers = text.layers()
    if not layers or any(f"q.{layer}" not in text for layer in layers):
        raise Failure("the file lacks k.L, v.L or q.L")
    heads, tokens, dim = text[f"k.{layers[0]}"].shape
    row = len(layers) * 2 * heads * dim
    width = 4 if text.dtypes[f"k.{layers[0]}"] == "F32" else 2
    return len(layers), row * tokens * width, row * BLOCK * 2, tokens


def plan(text):
    """How many sessions, and how much host memory: room for any one of them, not for all."""
    _, _, block, tokens = shape_of(text)
    sealed = max(0, tokens - BLOCK) // BLOCK
    published = sealed * block * 3 / 16                            # a session of the published codec
    ours = min(1, sealed) * block + max(0, sealed - 1) * block * 2.26 / 16  # sink, packed blocks
    tail = 8 * block                                               # four tails of up to two blocks
    arena = max(4 * MIB, math.ceil((tail + 1.5 * max(ours, published, block)) / (2 * MIB)) * 2 * MIB)
    wanted = math.ceil((1.3 * arena - published) / ours) if ours > 0 else SESSIONS_MAX
    count = min(SESSIONS_MAX, max(4, wanted))
    # The log: all of it several times over, in segments that hold a few of the largest blocks.
    segment = max(4 * MIB, math.ceil(4 * block / MIB) * MIB)
    disk = 8 * segment + 4 * math.ceil((count * ours + published + 2 * block * count) / segment) * segment
    flags = [f"--arena-bytes={arena}", f"--tail-bytes-max={max(MIB, tail)}", f"--disk-bytes={disk}",
             f"--segment-bytes={segment}", "--log-level=info"]
    spills = count * ours + published > 1.05 * arena
    return count, arena, flags, spills


def append(service, file, session):
    session.appended = service.ask("append", file, "--session", session.name, "--codec", session.codec,
                                   "--salt", session.salt, "--commit", "synced")


def describe(service, session):
    session.info = service.ask("sessions", "show", session.name)


def attend_all(service, file, sessions, output):
    """All sessions attend; pages served by tier."""
    before = service.ask("stats")
    for session in sessions:
        service.ask("attend", file, "--session", session.name, "--salt", session.salt,
                    "--out", output(session))
    after = service.ask("stats")
    return {tier: after[counter] - before[counter] for tier, counter in
            (("host", "pages_from_host"), ("disk", "pages_from_nvme"))}


def verify(service, text, sessions):
    full = attention.truths(text)
    known = {}  # what was fetched -> attention on it: sessions of one codec hold the same
    for session in sessions:
        service.ask("fetch", "--f32", "--session", session.name, "--salt", session.salt, "--out",
                    session.fetched)
        out = attention.outputs(text, attention.Tensors(session.second))
        session.error_vs_full = attention.distance(out, full)
        fetched = hashlib.sha256(session.fetched.read_bytes()).digest()
        if fetched not in known:
            known[fetched] = attention.truths(text, attention.Tensors(session.fetched))
        session.error_vs_dequantized = attention.distance(out, known[fetched])
        session.fetched.unlink()


def codec_row(codec, text, sessions):
    """Sums and worst errors over the sessions of one codec that share nothing."""
    of_codec = [s for s in sessions if s.codec == codec and not s.appended["blocks_shared"]]
    elements = sum(s.info["bytes_full"] // 2 for s in of_codec)
    held = sum(s.info["bytes_held"] for s in of_codec)
    return {"codec": codec, "sessions": len(of_codec),
            "bytes_in": sum(s.appended["bytes_in"] for s in of_codec), "bytes_held": held,
            "ratio": sum(s.info["bytes_full"] for s in of_codec) / held,
            "bits_per_element": 8 * held / elements,
            "blocks_packed": sum(max(0, s.appended["sealed_tokens"] // BLOCK - SINKS[codec])
                                 for s in of_codec),
            "error_vs_full": max(s.error_vs_full for s in of_codec),
            "error_vs_dequantized": max(s.error_vs_dequantized for s in of_codec)}


def judge(result, text, is_fixture, spills):
    """Every claim with whether it held."""
    claims = []
    for row in result["codecs"]:
        name = row["codec"]
        claims.append((f"{name}: answers are attention on what is held, to rounding",
                       row["error_vs_dequantized"] <= ROUNDING))
        if row["blocks_packed"]:  # a text of a few hundred tokens is all sink and tail
            claims.append((f"{name}: held in fewer bytes than 16 bits an element", row["ratio"] > 1))
        if is_fixture:
            claims.append((f"{name}: error as simulated, {EXPECTED[name]} within 3 %",
                           abs(row["error_vs_full"] / EXPECTED[name] - 1) <= TOLERANCE))
    if "token_ids" in text:  # without them nothing tells that two texts are one
        claims.append(("the second session of the same text shared its blocks",
                       result["shared"]["blocks"] == result["shared"]["blocks_of_session"]))
    if spills:
        claims.append(("sessions did not fit into host memory and were served from disk, too",
                       result["tiers"]["disk"] > 0))
    claims.append(("kill -9 lost no block",
                   result["restart"]["blocks_after"] == result["restart"]["blocks_before"]))
    claims.append(("answers after the restart are the same to the bit",
                   result["restart"]["outputs_equal"]))
    return [{"claim": claim, "held": bool(held)} for claim, held in claims]


def size(count):
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000


def show(result, sessions, arena):
    print(f"\n  {result['file']}: {result['layers']} layers, {result['tokens']} tokens; host memory for "
          f"{size(arena)}\n")
    print("  session      codec         streamed      held   ratio   bits   error to full   rounding   blocks host/disk")
    for s in sessions:
        info = s.info
        print(f"  {s.name:<11}  {s.codec:<12}{size(s.appended['bytes_in']):>10}{size(info['bytes_held']):>10}"
              f"{info['bytes_full'] / info['bytes_held']:>8.2f}{16 * info['bytes_held'] / info['bytes_full']:>7.2f}"
              f"{s.error_vs_full:>16.4f}{s.error_vs_dequantized:>11.1e}"
              f"{info['blocks_host']:>13}/{info['blocks_nvme']}"
              + (f"   shares {s.appended['blocks_shared']} blocks" if s.appended["blocks_shared"] else ""))
    tiers, restart = result["tiers"], result["restart"]
    print(f"\n  attended     {tiers['host']} pages from host memory, {tiers['disk']} from disk")
    print(f"  kill -9      {restart['blocks_before']} blocks before, {restart['blocks_after']} after; index back in "
          f"{restart['recovery_us'] / 1000:.1f} ms; answers {'the same to the bit' if restart['outputs_equal'] else 'DIFFER'}")
    print("  seconds      " + ", ".join(f"{name.replace('_', ' ')} {value:.2f}"
                                        for name, value in result["seconds"].items()) + "\n")
    for claim in result["claims"]:
        print(f"  {'ok  ' if claim['held'] else 'FAIL'}  {claim['claim']}")
    print()


def quickstart(arguments, directory):
    text = attention.Tensors(arguments.kv)
    layers, _, _, tokens = shape_of(text)
    count, arena, flags, spills = plan(text)
    clock = Clock({name: float(value) for name, value in arguments.seconds})
    service = Service(arguments.binaries, directory, flags)

    sessions = [Session(f"chat-{i + 1}", CODEC, f"salt-{i + 1}", directory) for i in range(count)]
    again = Session("chat-1b", CODEC, "salt-1", directory)
    sessions += [again, Session("published", PUBLISHED, "salt-p", directory)]
    try:
        clock.step("start", service.start)
        clock.step("append", lambda: [append(service, arguments.kv, s) for s in sessions])
        tiers = clock.step("attend", lambda: attend_all(service, arguments.kv, sessions, lambda s: s.first))
        for session in sessions:
            describe(service, session)
        blocks_before = service.ask("stats")["blocks"]
        clock.step("kill_and_restart", lambda: (service.kill(), service.start()))
        stats = service.ask("stats")
        tiers_again = clock.step("attend_again", lambda: attend_all(service, arguments.kv, sessions,
                                                                    lambda s: s.second))
        clock.step("verify", lambda: verify(service, text, sessions))
    finally:
        service.stop()

    rows = [codec_row(codec, text, sessions) for codec in (CODEC, PUBLISHED)]
    result = {"ok": False, "file": str(arguments.kv.name), "layers": layers, "tokens": tokens}
    result.update({key: value for key, value in rows[0].items() if key not in ("codec", "sessions")})
    result.update({
        "codecs": rows,
        "tiers": {tier: tiers[tier] + tiers_again[tier] for tier in tiers},
        "shared": {"session": again.name, "blocks": again.appended["blocks_shared"],
                   "blocks_of_session": again.appended["sealed_tokens"] // BLOCK},
        "restart": {"blocks_before": blocks_before, "blocks_after": stats["blocks"],
                    "outputs_equal": all(s.first.read_bytes() == s.second.read_bytes() for s in sessions),
                    "recovery_us": stats["recovery_us"]},
        "arena_bytes": arena,
        "sessions": [{"name": s.name, "codec": s.codec, "bytes_in": s.appended["bytes_in"],
                      "blocks_shared": s.appended["blocks_shared"], "error_vs_full": s.error_vs_full,
                      "error_vs_dequantized": s.error_vs_dequantized,
                      **{key: s.info[key] for key in ("bytes_held", "bytes_full", "blocks_host",
                                                      "blocks_nvme", "length")}} for s in sessions],
        "seconds": clock.seconds,
    })
    is_fixture = (hashlib.sha256(arguments.kv.read_bytes()).digest()
                  == hashlib.sha256(FIXTURE.read_bytes()).digest())
    result["claims"] = judge(result, text, is_fixture, spills)
    result["ok"] = all(claim["held"] for claim in result["claims"])
    show(result, sessions, arena)
    return result


def main():
    parser = argparse.ArgumentParser(description="the second half of deploy/quickstart")
    parser.add_argument("--binaries", type=pathlib.Path, required=True)
    parser.add_argument("--kv", type=pathlib.Path, default=FIXTURE)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seconds", nargs=2, action="append", default=[])
    arguments = parser.parse_args()

    # Below /tmp, or where TMPDIR says.
    directory = pathlib.Path(tempfile.mkdtemp(prefix="kivid-"))
    try:
        result = quickstart(arguments, directory)
    except (Failure, OSError, KeyError, ValueError) as failure:
        print(f"quickstart: {failure}", file=sys.stderr)
        result = {"ok": False, "why": str(failure)}
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print("quickstart: " + ("everything held" if result["ok"] else "something did not hold"))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
