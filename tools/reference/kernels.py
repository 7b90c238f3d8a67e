"""Where a timestep goes on a GPU: the time of each kind of kernel, in the crate or in plain Python, on a case of `compare.py`.

    python tools/reference/kernels.py sd15-512 --dtype bf16 --cuda-graphs --models models
    python tools/reference/kernels.py sd15-512 --dtype bf16 --program python --models models

The same case is run for two numbers of timesteps, and what the longer run has more of is divided by the timesteps that it has
more, so that loading, encoding and decoding fall out. CUPTI watches from outside (`kernels.cpp`, built here with the headers
and the library that `make libtorch` brings), within CUDA graphs, too; being watched slows a program down, so the time of a
timestep is that of `compare.py`. Kernels that run side by side count twice.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from cases import CASES, crates_own, flags, model_folder, picture_flags

HERE = Path(__file__).resolve().parent
# Of loading, which takes now more, now less; what a timestep has of it is nothing beside.
HOST = "[memcpy, host]"
# The first that matches. Names of libtorch 2.11, cuDNN 9 and cuBLAS 13.
KINDS = [
    ("attention, backward", r"flash_bwd|fmha_cutlassB|mha_bwd|flash::.*bwd|dot_do_o"),
    ("attention, forward", r"flash_fwd|fmha_cutlassF|flash::|pytorch_flash|fmha"),
    ("layout of convolutions", r"nchwToNhwc|nhwcToNchw|nhwcAddPadding|tensorTransform"),
    ("convolutions", r"conv(?!ert)|dgrad|fprop|wgrad|implicit|winograd|xmma_(?!gemm)"),
    ("matrix products", r"gemm|gemv|nvjet|cublas|splitK|cutlass"),
    ("norms", r"RowwiseMoments|ComputeFused|group_?norm|layer_?norm|GammaBeta|ComputeInternalGradients|ComputeBackwardFused"),
    ("Adam", r"multi_tensor|adam"),
    ("copies, casts, concatenation", r"copy|CatArray|memcpy|memset|fill|FillFunctor"),
    ("sums and means", r"reduce_kernel|Reduce"),
    ("elementwise", r"elementwise"),
]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--program", choices=("crate", "python"), default="crate")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--dtype", choices=("f32", "bf16", "f16"), default="bf16")
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true", help="in the crate, built with the feature `cuda-graphs`")
    parser.add_argument("--examples", type=Path, default=Path("target/release/examples"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where random models are kept, or found")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model of one's own in place of the case's")
    parser.add_argument("--iterations", type=int, metavar="N", help="Adam steps per timestep; default: the case's")
    parser.add_argument("--between", type=int, nargs=2, default=(4, 12), metavar=("A", "B"), help="the two numbers of timesteps; default: %(default)s")
    parser.add_argument("--names", type=int, default=20, metavar="N", help="so many kernels by name; default: %(default)s")
    parser.add_argument("--library", type=Path, metavar="FILE", help="kernels.cpp as it was built elsewhere")
    args = parser.parse_args()
    if not 1 <= args.between[0] < args.between[1]:
        parser.error("--between: at least 1, the larger number last")
    if args.cuda_graphs and args.program == "python":
        parser.error("--cuda-graphs is for the crate")
    return args


def build(folder):
    """With the CUPTI that `make libtorch` puts beside libtorch."""
    found = sorted((HERE.parents[1] / ".libtorch" / "nvidia").glob("cu*/lib/libcupti.so.*"))
    if not found:
        raise SystemExit("error: no CUPTI in .libtorch: run `make libtorch`, or build kernels.cpp and name it by --library")
    cupti, library = found[-1], folder / "libkernels.so"
    paths = [f"-I{cupti.parents[1] / 'include'}", cupti, f"-Wl,-rpath,{cupti.parent}"]
    subprocess.run(["c++", "-std=c++17", "-O2", "-shared", "-fPIC", HERE / "kernels.cpp", *paths, "-o", library], check=True)
    return library


def kernels(args, steps, library, model, folder):
    """By name: how many, and their nanoseconds."""
    case = CASES[args.case]
    args.steps = steps
    output = folder / f"{steps}.tsv"
    program = [sys.executable, HERE / "run.py", case.task]
    if args.program == "crate":
        program = [args.examples / case.task, *crates_own(case), *["--cuda-graphs"] * args.cuda_graphs]
    given = [*flags(case, args, case.size), *picture_flags(case, model, case.size, folder)]
    environment = os.environ | {"CUDA_INJECTION64_PATH": str(library.resolve()), "KERNELS": str(output)}
    command = [*program, "--model", model, *given, "--output", folder / "out.png"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if ran.returncode or not output.exists():
        raise SystemExit(f"error: status {ran.returncode}, {output} {'written' if output.exists() else 'not written'}\n{ran.stdout[-3000:]}")
    count, time = Counter(), Counter()
    for line in output.read_text().splitlines():
        number, nanoseconds, name = line.split("\t", 2)
        if name == HOST:
            continue
        count[name] += int(number)
        time[name] += int(nanoseconds)
    if not count:
        raise SystemExit(f"error: CUPTI told of no kernel\n{ran.stdout[-3000:]}")
    return count, time


def kind(name):
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def short(name, length=110):
    """Without what all kernels of libtorch are called."""
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::|<unnamed>::|c10::|\(.*\)$", "", name)
    return name.replace("|", "\\|")[:length]


def table(head, rows):
    print(f"\n| {head} | kernels | ms | share |\n|---|--:|--:|--:|")
    for name, number, milliseconds, share in rows:
        print(f"| {name} | {number:.0f} | {milliseconds:.3f} | {share:.1%} |")


def main():
    args = arguments()
    few, many = args.between
    if args.program == "crate" and not (args.examples / CASES[args.case].task).is_file():
        raise SystemExit(f"error: no {args.examples / CASES[args.case].task}; run `cargo build --release --examples --features cuda-graphs`")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        library = args.library or build(folder)
        model = model_folder(CASES[args.case], args, args.models or folder)
        (count_few, time_few), (count_many, time_many) = (kernels(args, steps, library, model, folder) for steps in (few, many))
    steps = many - few
    count = {name: (count_many[name] - count_few[name]) / steps for name in count_many}
    time = {name: (time_many[name] - time_few[name]) / steps / 1e6 for name in count_many}
    total = sum(time.values())
    kinds, kinds_count = Counter(), Counter()
    for name, milliseconds in time.items():
        kinds[kind(name)] += milliseconds
        kinds_count[kind(name)] += count[name]
    how = ", by CUDA graphs" if args.cuda_graphs else ""
    print(f"## {args.case}, {args.program}{how}, {args.dtype}: kernels of a timestep\n")
    print(f"Of {many} timesteps less those of {few}, divided by {steps}: {sum(count.values()):.0f} kernels, {total:.2f} ms.")
    table("kind", ((name, kinds_count[name], milliseconds, milliseconds / total) for name, milliseconds in kinds.most_common()))
    first = sorted(time.items(), key=lambda pair: -pair[1])[: args.names]
    table("name", ((f"{kind(name)}: `{short(name)}`", count[name], milliseconds, milliseconds / total) for name, milliseconds in first))


if __name__ == "__main__":
    main()
