"""`balloon serve` and `balloon receive` as processes, for tests."""

import contextlib
import json
import os
import subprocess
import sys
import time

from balloon_cli.monitor_client import MonitorClient

MIB = 1 << 20
BALLOON = [sys.executable, "-m", "balloon_cli"]


def wait_for(what, timeout=20.0):
    end = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


class Process:
    """`balloon serve` with its own guest."""

    def __init__(self, folder, *arguments, memory="64M", guest=True):
        self.folder, self.socket, self.monitor = folder, folder / "b.sock", folder / "m.sock"
        self.log = folder / "log"
        command = [*BALLOON, "serve", str(self.socket), "--monitor", str(self.monitor), "--json-log", *arguments]
        if guest:
            command += ["--guest", "python", "--memory", memory]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(lambda: self.told("guest-ready" if guest else "listening"))
        except BaseException:  # nobody else could end it
            self.process.kill()
            self.process.wait()
            raise

    def told(self, name):
        return [json.loads(text)["data"] for text in self.log.read_text().splitlines() if f'"event": "{name}"' in text]

    def ctl(self, *arguments, code=0):
        run = [*BALLOON, "ctl", str(self.monitor), *arguments]
        done = subprocess.run(run, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout + done.stderr

    def ask(self, command, **arguments):
        """Run one command without a process of its own."""
        client = MonitorClient(str(self.monitor))
        try:
            return client.execute(command, arguments)
        finally:
            client.close()

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextlib.contextmanager
def receiver(address, *arguments):
    process = subprocess.Popen(
        [*BALLOON, "receive", address, "--json", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    kind, _, path = address.partition(":")
    if kind == "unix":
        # Not by connecting: `receive` takes the first connection for its source.
        wait_for(lambda: os.path.exists(path) and " 00010000 " in _unix_line(path))
    else:
        process.stderr.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _unix_line(path):
    with open("/proc/net/unix") as table:
        return next((text for text in table if text.rstrip().endswith(path)), "")
