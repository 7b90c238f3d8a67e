"""Runs a program and says what it took, from outside: the same for the crate's examples and for `run.py`."""

import os
import re
import statistics
import subprocess
import threading
import time
from typing import NamedTuple

# Both programs print it to stderr, first with 0 steps done.
PROGRESS = re.compile(r"step (\d+)/\d+(?: loss ([^\s,]+))?")
POLL_SECONDS = 0.2


class Ran(NamedTuple):
    stdout: str
    steps: list
    """(steps done, seconds since the start) for each line of progress."""
    losses: dict
    """By step."""
    seconds: float
    host_mib: float
    device_mib: float | None
    """None where there is no GPU to ask."""

    @property
    def start_up(self):
        """Seconds until the first step begins."""
        return self.steps[0][1]

    @property
    def step(self):
        """Seconds per timestep: the median, without the first, which is slower, if there are others."""
        spans = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(self.steps, self.steps[1:])]
        return statistics.median(spans[1:] or spans)


def run(command, environment, watch_device=False):
    device = DeviceMemory() if watch_device else None
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if device:
        device.watch(process.pid)
    steps, losses, lines = [], {}, []
    for line in process.stderr:
        if match := PROGRESS.match(line):
            steps.append((int(match[1]), time.monotonic() - start))
            if match[2]:
                losses[int(match[1])] = float(match[2])
        lines.append(line)
    stdout = process.stdout.read()
    # Unlike wait(), says what the process used.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = device.stop() if device else None
    if process.returncode:
        raise SystemExit(f"error: status {process.returncode} of {' '.join(map(str, command))}\n{''.join(lines)}")
    if len(steps) < 2:
        raise SystemExit(f"error: no progress said by {' '.join(map(str, command))}\n{''.join(lines)}")
    return Ran(stdout, steps, losses, seconds, usage.ru_maxrss / 1024, peak)


class DeviceMemory:
    """The most device memory of a process, by asking nvidia-smi again and again.

    It counts all that the process holds: CUDA's context, the libraries' own, and what libtorch keeps for later. As libtorch
    gives nothing back until the end, hardly anything is missed between two looks. Inside a container nvidia-smi may know
    the process by another number or list none; then it is what all GPUs hold above what they held before, so nothing
    else may use them.
    """

    def __init__(self):
        self.before = self.used()
        self.of_process = self.of_all = 0
        self.ended = threading.Event()

    def watch(self, pid):
        self.thread = threading.Thread(target=self.look, args=(pid,), daemon=True)
        self.thread.start()

    def look(self, pid):
        while not self.ended.wait(POLL_SECONDS):
            rows = [re.fullmatch(r"(\d+), (\d+)", line.strip()) for line in ask("--query-compute-apps=pid,used_memory")]
            self.of_process = max(self.of_process, sum(int(row[2]) for row in rows if row and int(row[1]) == pid))
            self.of_all = max(self.of_all, self.used() - self.before)

    def stop(self):
        self.ended.set()
        self.thread.join()
        return float(self.of_process or self.of_all)

    @staticmethod
    def used():
        return sum(int(mib) for mib in ask("--query-gpu=memory.used"))


def ask(query):
    """Lines of numbers, memory in MiB."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: nvidia-smi: {error}") from error
