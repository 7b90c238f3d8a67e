"""Sets the crate beside plain Python as the authors run it: the same job, weights and machine, in turns.

    cargo build --release --examples
    python tools/reference/compare.py                            # the bundled model at 256 px
    python tools/reference/compare.py sd15-512 sdxl-1024 --device cuda --dtype bf16 --models models

Prints tables in Markdown, and writes nothing else but models of random weights, in a temporary folder or where --models
says. Each figure is the median of the rounds, and all are taken from outside, by the clock of this program. Of the networks
of full size it takes few timesteps; --steps says how many.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from PIL import Image

from cases import CASES, crates_own, flags, model_folder, picture_flags, view_batches
from measure import ask, run

REFERENCE = Path(__file__).with_name("run.py")
# How OpenMP's threads wait, the same for both programs: as .cargo/config.toml has it, unless the environment says otherwise: what
# that says is then all that holds. Spinning longer is faster on some idle machines, and slower by far on a busy one.
WAITING = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
WAITING = WAITING or {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}


def size(text):
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: the first")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("f32", "bf16", "f16"), default="f32")
    parser.add_argument("--low-memory", action="store_true", help="gradient checkpointing in both programs")
    parser.add_argument("--half-vae", action="store_true", help="the crate's autoencoder in --dtype, too, as Python's is; else it computes in f32")
    parser.add_argument("--cuda-graphs", action="store_true", help="in the crate, built with the feature `cuda-graphs`")
    parser.add_argument("--examples", type=Path, default=Path("target/release/examples"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where random models are kept, or found")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model of one's own in place of the case's")
    parser.add_argument("--size", type=size, metavar="WxH", help="multiples of what the model takes; default: the case's")
    parser.add_argument("--steps", type=int, metavar="N", help="timesteps; default: the case's")
    parser.add_argument("--iterations", type=int, metavar="N", help="Adam steps per timestep; default: the case's")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores")
    args = parser.parse_args()
    args.cases = args.cases or [next(iter(CASES))]
    for case in args.cases:
        if case not in CASES:
            parser.error(f"no case is called {case}; there are {', '.join(CASES)}")
    if args.cuda_graphs and args.device == "cpu":
        parser.error("--cuda-graphs is for --device cuda")
    for name in ("steps", "iterations", "rounds", "threads"):
        number = getattr(args, name)
        if number is not None and number < 1:
            parser.error(f"--{name} is at least 1")
    return args


# Of losses in f32 on a CPU: beyond it the two did not compute the same thing.
SAME_LOSSES = 1e-3


def one_round(name, case, args, model, given, folder, python_first):
    """Each program once, and their pictures."""
    environment = os.environ | WAITING | {"OMP_NUM_THREADS": str(args.threads)}
    own = crates_own(case) + ["--cuda-graphs"] * args.cuda_graphs + ["--vae-dtype", args.dtype] * args.half_vae
    programs = {"crate": [args.examples / case.task, *own], "python": [sys.executable, REFERENCE, case.task]}
    ran, pictures = {}, {}
    # Whichever is first finds less of what both read in the system's memory.
    for which, program in sorted(programs.items(), reverse=python_first):
        print(f"{name}: {which}", file=sys.stderr, flush=True)
        output = folder / f"{which}.png"
        ran[which] = run([*program, "--model", model, *given, "--output", output], environment, args.device != "cpu")
        pictures[which] = numpy.asarray(Image.open(output).convert("RGB"), dtype=numpy.float64)
    crate, python = pictures["crate"], pictures["python"]
    if crate.shape != python.shape:
        raise SystemExit(f"error: pictures of {crate.shape} and {python.shape}; is --size a multiple of what the model takes?")
    return ran["crate"], ran["python"], numpy.abs(crate - python).mean()


def compare(name, args, folder):
    case = CASES[name]
    size, steps, iterations = args.size or case.size, args.steps or case.steps, args.iterations or case.iterations
    model = model_folder(case, args, args.models or folder)
    given = flags(case, args, size) + picture_flags(case, model, size, folder)
    rounds = [one_round(name, case, args, model, given, folder, python_first=number % 2 == 1) for number in range(args.rounds)]
    report = json.loads(rounds[-1][1].stdout.splitlines()[-1])

    weights = "the bundled model" if case.model == "bundled" else f"{case.model} architecture, random weights"
    of_authors = f" (the authors take {case.authors_steps})" if case.authors_steps not in (None, steps) else ""
    batches = view_batches(case, model, size)
    in_batches = f" for each of {batches} batches of views" if batches > 1 else ""
    print(f"## {name}\n")
    print(f"{case.task}, {args.model or weights}, {size[0]}x{size[1]}, {args.dtype}{', low memory' if args.low_memory else ''}", end="")
    print(f"{', the crate by CUDA graphs' if args.cuda_graphs else ''}{', its autoencoder in this precision, too' if args.half_vae else ''}; ", end="")
    print(f"timesteps: {steps}{of_authors}, Adam steps in each: {iterations}{in_batches}; median of {args.rounds} round(s), in turns.\n")
    table([(crate, python) for crate, python, _ in rounds], iterations * batches)
    if "peak_allocated_mib" in report:
        print(f"\nOf its device memory Python had {report['peak_allocated_mib']:.0f} MiB in tensors at most; ", end="")
        print("the rest is CUDA's, the libraries', and what libtorch keeps for later.")
    crate, python, difference = rounds[-1]
    apart = losses(crate, python)
    print(f"\nThe pictures differ by {difference:.3f} grey levels of 255 on average.\n", flush=True)
    if args.device == "cpu" and args.dtype == "f32" and apart > SAME_LOSSES:
        raise SystemExit(f"error: {name}: losses that differ by {apart:.1e} are not of the same procedure, and the ratios mean nothing")


def table(rounds, adam_steps):
    """Medians of (crate, Python) in the rounds."""
    rows = [
        ("whole command", "s", lambda ran: ran.seconds),
        ("start-up to the first step", "s", lambda ran: ran.start_up),
        ("one timestep", "s", lambda ran: ran.step),
        ("one Adam step, with its share of the timestep", "s", lambda ran: ran.step / adam_steps),
        ("peak memory", "MiB", lambda ran: ran.host_mib),
        ("peak device memory", "MiB", lambda ran: ran.device_mib),
    ]
    print("| | crate | plain Python | Python / crate |\n|---|--:|--:|--:|")
    for row, unit, figure in rows:
        crate, python = ([figure(ran) for ran in column] for column in zip(*rounds))
        if None in crate:
            continue
        crate, python = statistics.median(crate), statistics.median(python)
        digits = 0 if unit == "MiB" else 3
        ratio = f"{python / crate:.2f}" if crate else ""
        print(f"| {row} | {crate:.{digits}f} {unit} | {python:.{digits}f} {unit} | {ratio} |")


def losses(crate, python):
    """Side by side, of the steps of which the crate's example says them: in a long run not all."""
    print("\n| step | loss, crate | loss, plain Python | relative difference |\n|--:|--:|--:|--:|")
    largest = 0.0
    for step, ours in crate.losses.items():
        if step not in python.losses:
            raise SystemExit(f"error: Python said no loss of step {step}")
        theirs = python.losses[step]
        difference = abs(ours - theirs) / abs(theirs)
        largest = max(largest, difference)
        print(f"| {step} | {ours:#.6g} | {theirs:#.6g} | {difference:.1e} |")
    print(f"\nThe largest relative difference of the losses is {largest:.1e}.")
    return largest


def header(args):
    """What the figures depend on, besides the case."""
    waiting = " ".join(f"{name}={value}" for name, value in WAITING.items())
    parts = [f"{processor()}, {os.cpu_count()} cores, {args.threads} threads (`{waiting}`)"]
    if args.device != "cpu":
        _, _, number = args.device.partition(":")
        parts.insert(0, ask("--query-gpu=name")[int(number or 0)])
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers")]
    lean = "with" if importlib.util.find_spec("accelerate") else "without"
    parts.append(f"crate: libtorch {libtorch(args.examples / CASES[args.cases[0]].task)}")
    parts.append(f"Python: {', '.join(versions)}, {lean} accelerate")
    print("; ".join(parts) + ".\n")
    print(f"`{shlex.join(['compare.py', *sys.argv[1:]])}`\n", flush=True)


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def libtorch(example):
    """The version of the library that an example is linked to."""
    linked = subprocess.run(["ldd", example], check=True, capture_output=True, text=True).stdout
    found = re.search(r"libtorch_cpu\.so => (\S+)", linked)
    if not found:
        return "unknown"
    # The Python package has the first file, the plain archive the second.
    folder = Path(found[1]).parents[1]
    for name in ("version.py", "build-version"):
        if (folder / name).is_file() and (version := re.search(r"\d+\.\d+\.\d+[^'\s]*", (folder / name).read_text())):
            return version[0]
    return "unknown"


def main():
    args = arguments()
    if args.models:
        args.models.mkdir(parents=True, exist_ok=True)
    for case in args.cases:
        if not (args.examples / CASES[case].task).is_file():
            raise SystemExit(f"error: no {args.examples / CASES[case].task}; run `cargo build --release --examples`")
    header(args)
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            compare(case, args, Path(folder))


if __name__ == "__main__":
    main()
