# SPDX-License-Identifier: Apache-2.0
"""kivid on a GPU, from outside: one binary, real K and V, a gpu arena so small that blocks come and go.

    service.py PACK ROWS          PACK: what tests/device/pack made; ROWS: where figures are added

The CPU backend says what is right: what is fetched must be equal to the byte (the codes are), what is
attended must be as close as two correct sums of different order are. Then kill -9, and all of it again.
Needs python3 and nothing else. KIVID_BACKEND in the environment stands in for cuda, to try this script on
a machine without a GPU.
"""
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

PACK, ROWS = sys.argv[1], sys.argv[2]
BACKEND = os.environ.pop("KIVID_BACKEND", "cuda")
BOUND = 1e-3  # relative L2; both sides are within 5e-4 of the definition on ordinary data
SESSIONS = 8
FILE = os.path.join(PACK, "data", "llama30m-wikitext-4k.safetensors")
WORK = tempfile.mkdtemp(prefix="kivid-device-")
failures = []


def row(name, ours, unit, opponent="", other="", ratio="", goal=""):
    with open(ROWS, "a") as out:
        print(name, ours, unit, opponent, other, ratio, goal, sep="\t", file=out)


def check(what, good, detail=""):
    print("ok  " if good else "FAIL", what, detail)
    if not good:
        failures.append(what)


class Daemon:
    def __init__(self, name, *flags):
        self.name, self.flags, self.process = name, flags, None
        self.target = "unix://" + os.path.join(WORK, name + ".sock")

    def start(self):
        socket = self.target[len("unix://"):]
        if os.path.exists(socket):
            os.unlink(socket)
        log = open(os.path.join(WORK, self.name + ".log"), "a")
        self.process = subprocess.Popen(
            [PACK + "/bin/kivid", "--listen=" + self.target, "--disk-path=" + os.path.join(WORK, self.name),
             "--disk-bytes=1GiB", "--segment-bytes=16MiB", *self.flags], stdout=log, stderr=log)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            if os.path.exists(socket) and subprocess.run(
                    [PACK + "/bin/kivictl", "ping", "--target", self.target], capture_output=True).returncode == 0:
                return self
            time.sleep(0.05)
        print(open(os.path.join(WORK, self.name + ".log")).read()[-3000:])
        raise SystemExit(f"kivid ({self.name}) did not get ready")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.terminate()
        check(f"{self.name} stops cleanly", self.process.wait(30) == 0)

    def call(self, *arguments):
        done = subprocess.run([PACK + "/bin/kivictl", *arguments, "--target", self.target, "--json", "--quiet"],
                              capture_output=True, text=True)
        if done.returncode:
            print("kivictl", arguments, done.returncode, done.stdout[-500:], done.stderr[-500:])
            print(open(os.path.join(WORK, self.name + ".log")).read()[-2000:])
            raise SystemExit(1)
        return json.loads(done.stdout) if done.stdout.strip() else {}


def tensors(path):
    """Name -> bytes, and the f32 ones as lists."""
    data = open(path, "rb").read()
    head = struct.unpack("<Q", data[:8])[0]
    found = {}
    for name, info in json.loads(data[8:8 + head]).items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        raw = data[8 + head + begin:8 + head + end]
        found[name] = struct.unpack(f"<{len(raw) // 4}f", raw) if info["dtype"] == "F32" else raw
    return found


def distance(a, b):
    """The worst relative L2 distance of any f32 tensor of two files."""
    worst = 0.0
    for name, ours in a.items():
        if isinstance(ours, bytes):
            continue
        theirs = b[name]
        error = sum((x - y) ** 2 for x, y in zip(ours, theirs)) ** 0.5
        worst = max(worst, error / (sum(y * y for y in theirs) ** 0.5 or 1))
    return worst


def answers(daemon, session, tag):
    """What the session's attention and its bytes are, as files."""
    out = os.path.join(WORK, f"{daemon.name}-{session}-{tag}")
    daemon.call("attend", FILE, "--session", session, "--salt", session, "--rows", "8", "--out", out + ".att")
    daemon.call("fetch", "--session", session, "--salt", session, "--out", out + ".kv")
    return tensors(out + ".att"), open(out + ".kv", "rb").read()


def small_gpu():
    names = [f"s{i}" for i in range(SESSIONS)]
    plain = Daemon("plain", "--backend=auto", "--arena-bytes=256MiB").start()
    right = {}
    for name in names[:2]:
        plain.call("append", FILE, "--session", name, "--salt", name)
        right[name] = answers(plain, name, "right")
    plain.stop()

    # A session of this file is 1.4 MB of blocks and half a MB of tail.
    gpu = Daemon("gpu", "--backend=" + BACKEND, "--gpu-arena-bytes=6MiB", "--arena-bytes=12MiB",
                 "--tail-bytes-max=8MiB").start()
    for name in names:
        gpu.call("append", FILE, "--session", name, "--salt", name, "--commit", "synced")
    worst = 0.0
    for tag in ("first", "second"):
        for name in names:
            ours, theirs = answers(gpu, name, tag), right[names[0]]
            worst = max(worst, distance(ours[0], theirs[0]))
            check(f"{name}, {tag} time: fetched bytes are the CPU backend's", ours[1] == theirs[1])
    check("attended like the CPU backend", worst <= BOUND, f"{worst:.2e}")
    check("salts do not matter to values", right[names[0]][1] == right[names[1]][1])
    row("service, small gpu arena: distance from the CPU backend", f"{worst:.2e}", "relative L2")
    stats = gpu.call("stats")
    wanted = ["spills", "restores", "evictions", "pages_from_nvme"]
    if "gpu" in stats:
        wanted += ["pages_from_gpu", "gpu_copies", "gpu_evictions"]
    elif BACKEND == "cuda":
        check("there is a gpu tier", False)
    for name in wanted:
        check(f"{name} happened", stats[name] > 0, str(stats[name]))
        row(f"service, small gpu arena: {name}", stats[name], "")

    gpu.kill()
    gpu.start()
    worst = 0.0
    for name in names:
        ours, theirs = answers(gpu, name, "third"), right[names[0]]
        worst = max(worst, distance(ours[0], theirs[0]))
        check(f"{name}, after kill -9: fetched bytes are the CPU backend's", ours[1] == theirs[1])
    check("after kill -9 attended like the CPU backend", worst <= BOUND, f"{worst:.2e}")
    row("service, after kill -9: distance from the CPU backend", f"{worst:.2e}", "relative L2")
    gpu.stop()


def bench(name, *arguments):
    done = subprocess.run([PACK + "/bin/kivictl", "bench", *arguments, "--json", "--quiet", "--kivid",
                           PACK + "/bin/kivid"], capture_output=True, text=True, cwd=PACK,
                          env={**os.environ, "KIVID_BACKEND": BACKEND, "KIVID_GPU_ARENA_BYTES": "2GiB"})
    if done.returncode not in (0, 4):
        check(name, False, done.stderr[-500:])
        return
    for it in json.loads(done.stdout)["rows"]:
        print("    ", name, it)
        row(f"{name}: {it['name']}", it["ours"], it["unit"], it["opponent"] or "", it["opponent_name"] or "",
            it["ratio"] or "", it["goal"] or "")


try:
    small_gpu()
    bench("kivid --backend " + BACKEND, "step")
    bench("kivid --backend " + BACKEND, "put")
finally:
    shutil.rmtree(WORK, ignore_errors=True)
print(f"{len(failures)} failed")
sys.exit(1 if failures else 0)
