"""Sets the crate's style transfer beside the plain Python one: the same job, on the CPU, in turns.

    cargo build --release --example style_transfer
    python tools/reference/compare.py target/release/examples/style_transfer assets/mini \\
        --content a.png --style b.png --size 256x256 --steps 20 --iterations 3

Prints a table in Markdown and writes nothing else. Each figure is the median of the rounds.

The start-up to the first step is measured by the clock of this program. Python says itself when its first step begins.
The crate's example is run once more per round, for a few steps of one iteration: it is the time at which it reports
its first step, less the median of the steps after it. What the first step costs above the others counts as start-up,
so the figure is on the high side.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy
from PIL import Image

from time_style_transfer import size

REFERENCE = Path(__file__).with_name("time_style_transfer.py")
PROGRESS = re.compile(r"step (\d+)/\d+ ")
START_UP_STEPS = 5
# The same for both programs. Spinning is faster by a third on an idle machine, and slower by far on a busy one.
WAIT_POLICY = os.environ.get("OMP_WAIT_POLICY", "passive")


class Ran(NamedTuple):
    stdout: str
    steps: list
    """(steps done, seconds since the start) for each line of progress."""
    seconds: float
    peak_rss_mib: float


def run(command, environment):
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    steps, lines = [], []
    for line in process.stderr:
        if match := PROGRESS.match(line):
            steps.append((int(match[1]), time.monotonic() - start))
        lines.append(line)
    stdout = process.stdout.read()
    # Unlike wait(), says what the process used.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: status {process.returncode} of {' '.join(map(str, command))}\n{''.join(lines)}")
    return Ran(stdout, steps, seconds, usage.ru_maxrss / 1024)


def median_step(ran):
    """Seconds per step, from the lines after the first step."""
    spans = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(ran.steps, ran.steps[1:])]
    if not spans:
        raise SystemExit("error: the example reported fewer than two steps; is --steps at least 2?")
    return statistics.median(spans)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", type=Path, help="the crate's example style_transfer, built with --release")
    parser.add_argument("model", type=Path, help="folder in diffusers layout whose layers are the last six")
    parser.add_argument("--content", required=True)
    parser.add_argument("--style", required=True, action="append", help="may be given several times")
    parser.add_argument("--size", type=size, default=(256, 256), metavar="WxH", help="multiples of what the model takes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--content-weight", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.steps < 2 or args.rounds < 1:
        parser.error("needs at least 2 steps and 1 round")
    return args


def scaled(path, size, to):
    """Both programs get pictures of the right size, which they use untouched, so that none is scaled in two ways."""
    Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(to)
    return str(to)


def one_round(args, content, styles, folder):
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": WAIT_POLICY}
    ours, theirs = folder / "crate.png", folder / "python.png"

    def flags(steps, iterations, output):
        numbers = {"--steps": steps, "--iterations": iterations, "--content-weight": args.content_weight, "--lr": args.lr}
        pictures = ["--content", content, "--size", "{}x{}".format(*args.size), "--output", output]
        for style in styles:
            pictures += ["--style", style]
        return pictures + [str(part) for pair in numbers.items() for part in pair]

    example = [args.example, "--model", args.model, "--device", "cpu", "--dtype", "f32"]
    short = run(example + flags(START_UP_STEPS, 1, folder / "short.png"), environment)
    crate = run(example + flags(args.steps, args.iterations, ours), environment)
    reference = [sys.executable, REFERENCE, args.model, "--threads", str(args.threads)]
    python = run(reference + flags(args.steps, args.iterations, theirs), environment)
    report = json.loads(python.stdout.splitlines()[-1])

    first, at = short.steps[0]
    ours, theirs = (numpy.asarray(Image.open(path).convert("RGB"), dtype=numpy.float64) for path in (ours, theirs))
    if ours.shape != theirs.shape:
        raise SystemExit(f"error: pictures of {ours.shape} and {theirs.shape}; is --size a multiple of what the model takes?")
    return {
        "whole command": (crate.seconds, python.seconds),
        "start-up to the first step": (at - first * median_step(short), report["to_first_step_s"]),
        "one timestep": (median_step(crate), report["step_s"]),
        "one Adam step": (median_step(crate) / args.iterations, report["step_s"] / args.iterations),
        "peak memory": (crate.peak_rss_mib, python.peak_rss_mib),
        "difference": numpy.abs(ours - theirs).mean(),
    }


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = scaled(args.content, args.size, folder / "content.png")
        styles = [scaled(style, args.size, folder / f"style{i}.png") for i, style in enumerate(args.style)]
        rounds = [one_round(args, content, styles, folder) for _ in range(args.rounds)]

    width, height = args.size
    print(f"{processor()}, {os.cpu_count()} cores, {args.threads} threads ({WAIT_POLICY}); {width}x{height}, {len(styles)} style(s), ", end="")
    print(f"{args.steps} timesteps of {args.iterations} Adam step(s); median of {args.rounds} round(s) in turns\n")
    print("| | crate | plain Python | Python / crate |\n|---|--:|--:|--:|")
    for row in ("whole command", "start-up to the first step", "one timestep", "one Adam step", "peak memory"):
        crate, python = (statistics.median(column) for column in zip(*(values[row] for values in rounds)))
        unit, digits = ("MiB", 0) if row == "peak memory" else ("s", 3)
        print(f"| {row} | {crate:.{digits}f} {unit} | {python:.{digits}f} {unit} | {python / crate:.2f} |")
    difference = statistics.median(values["difference"] for values in rounds)
    print(f"\nThe pictures differ by {difference:.3f} grey levels of 255 on average.")


if __name__ == "__main__":
    main()
