# SPDX-License-Identifier: Apache-2.0
"""A real kivid process for the tests: KIVI_TEST_BINARIES names the build's output directory."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

import kivi

BINARIES = pathlib.Path(os.environ.get("KIVI_TEST_BINARIES",
                                       pathlib.Path(__file__).parents[3] / "bazel-bin"))


class Daemon:
    """kivid in a directory of its own; can be killed and started again."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.socket = directory / "run" / "kivid.sock"
        self.target = f"unix://{self.socket}"
        self.process = None
        self.start()

    def start(self) -> None:
        log = (self.directory / "kivid.log").open("ab")
        self.process = subprocess.Popen(
            [BINARIES / "service" / "kivid", f"--listen=unix://{self.socket}",
             f"--disk-path={self.directory / 'data'}", "--disk-bytes=1GiB",
             "--arena-bytes=256MiB"], stdout=log, stderr=log)
        with kivi.Client(self.target, retries=0) as client:
            for _ in range(200):
                if self.process.poll() is not None:
                    raise RuntimeError((self.directory / "kivid.log").read_text())
                try:
                    client.stats(timeout=1)
                    return
                except kivi.KiviError:
                    time.sleep(0.05)
        raise RuntimeError("kivid does not answer: " + (self.directory / "kivid.log").read_text())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0


@pytest.fixture
def daemon(tmp_path):
    running = Daemon(tmp_path)
    yield running
    if running.process.poll() is None:
        running.kill()


@pytest.fixture
def client(daemon):
    with kivi.Client(daemon.target) as connected:
        yield connected
