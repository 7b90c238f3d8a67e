"""Runs one of the procedures in plain Python, as the authors run theirs, and says what it took: one line of JSON.

    python run.py style_transfer --model FOLDER --content a.png --style b.png --output out.png
    python run.py text_to_image --model FOLDER --prompt "a red house" --style b.png
    python run.py texture_expansion --model FOLDER --style b.png --size 2048x512

The tasks and flags are those of the crate's examples. Each pass of the network goes to its end, though what comes after the
last attention layer is thrown away. With --dtype bf16 or f16 all weights have that type, the network runs under autocast, and
latents and Adam are f32. The references are looked at once in a timestep, in an expansion once for each batch of views.

Progress goes to stderr: `step 0/N` before the first step, then a line with the loss for each.
"""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

TASKS = {
    "style_transfer": {"steps": 200, "iterations": 1, "lr": 0.05},
    "text_to_image": {"steps": 50, "iterations": 3, "lr": 0.015},
    "texture_expansion": {"steps": 50, "iterations": 2, "lr": 0.05},
}


def seconds_since_start():
    """Since the process was started: interpreter and imports count as a user's waiting time."""
    with open("/proc/self/stat") as file:
        # The second field, the name in brackets, may hold spaces.
        started = int(file.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def size(text):
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", required=True, help="folder in diffusers layout; its last six self-attention layers are taken")
    parser.add_argument("--style", required=True, action="append", help="may be given several times")
    parser.add_argument("--content", help="of style_transfer")
    parser.add_argument("--prompt", default="", help="of text_to_image")
    parser.add_argument("--output", type=Path, default=Path("out.png"))
    parser.add_argument("--size", type=size, default=(512, 512), metavar="WxH", help="pictures are scaled to it, in an expansion to a window")
    parser.add_argument("--steps", type=int, help="default: the authors'")
    parser.add_argument("--iterations", type=int, help="Adam steps per timestep; default: the authors'")
    parser.add_argument("--lr", type=float, help="default: the authors'")
    parser.add_argument("--content-weight", type=float, default=0.25)
    parser.add_argument("--adain", action="store_true", help="of style_transfer: the content first gets the styles' statistics; the authors' does not")
    parser.add_argument("--smoothing", type=float, default=0.0, help="of style_transfer: of queries, by the content; the authors' has none")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--window", type=int, default=64, help="in latents")
    parser.add_argument("--stride", type=int, default=8, help="in latents")
    parser.add_argument("--view-batch", type=int, default=8)
    parser.add_argument("--reference-per-batch", action="store_true", help="always so here; the crate's example has the choice")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("f32", "bf16", "f16"), default="f32")
    parser.add_argument("--no-autocast", action="store_true", help="bf16 and f16 throughout the network, without f32 norms")
    parser.add_argument("--low-memory", action="store_true", help="diffusers' gradient checkpointing")
    args = parser.parse_args()
    if args.task == "style_transfer" and not args.content:
        parser.error("style_transfer needs --content")
    if args.adain and args.task != "style_transfer":
        parser.error("--adain is of style_transfer: text_to_image always has it in each step, texture_expansion never")
    if args.smoothing and args.task != "style_transfer":
        parser.error("--smoothing is of style_transfer")
    for name, value in TASKS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


class Clock:
    """Seconds since the process was started; on a GPU, when the work given to it so far is done."""

    def __init__(self, device):
        self.device = device

    def now(self):
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return seconds_since_start()


class Steps:
    """What `progress` of the procedures is for: when each step ended, and its loss."""

    def __init__(self, clock, steps):
        self.clock, self.steps = clock, steps
        self.ends, self.losses = [], []

    def __call__(self, step, loss):
        self.ends.append(self.clock.now())
        said = ""
        if loss is not None:
            # A step without a descent has no loss.
            has_loss = not math.isnan(loss)
            self.losses.append(float(f"{loss:.6g}") if has_loss else None)
            said = f" loss {loss:#.6g}" if has_loss else ""
        print(f"step {step}/{self.steps}{said}", file=sys.stderr, flush=True)

    @property
    def seconds(self):
        return [after - before for before, after in zip(self.ends, self.ends[1:])]


def picture_size(args, model):
    """Of contents and styles, (width, height): the output's, or a window's."""
    if args.task != "texture_expansion":
        return args.size
    side = args.window * 2 ** (len(model.vae.config.block_out_channels) - 1)
    width, height = args.size
    return min(side, width), min(side, height)


def main():
    args = arguments()
    warnings.filterwarnings("ignore")

    import diffusers
    import numpy
    import torch
    from PIL import Image

    from attention_distillation import Model, optimise

    if args.task != "style_transfer":
        from sampling import Sampler, sample
        from textures import expand
    if args.adain:
        from sampling import with_statistics
    imported = seconds_since_start()

    # The authors' PyTorch had none. That of 2.11 takes it first on H100 and H200, where its gradients are wrong if those of the
    # output have another layout than the output.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device(args.device)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[args.dtype]
    clock = Clock(device)
    model = (Model if args.task == "style_transfer" else Sampler).open(args.model, device=device, dtype=dtype)
    model.network.stop_early = False
    model.network.autocast = not args.no_autocast
    if args.low_memory:
        model.network.unet.enable_gradient_checkpointing()
    loaded = clock.now()

    def encode(path):
        picture = Image.open(path).convert("RGB")
        wanted = picture_size(args, model)
        if picture.size != wanted:
            picture = picture.resize(wanted, Image.Resampling.BICUBIC)
        return model.encode(torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255).permute(2, 0, 1)[None])

    styles = [encode(path) for path in args.style]
    progress = Steps(clock, args.steps)
    settings = {"steps": args.steps, "iterations": args.iterations, "learning_rate": args.lr, "progress": progress}
    if args.task == "style_transfer":
        content = encode(args.content)
        if args.adain:
            content = with_statistics(content, styles, most=4)
        run = optimise(model, content, styles, content, args.content_weight, smoothing=args.smoothing, **settings)
        picture = model.decode(run.latents)
    elif args.task == "text_to_image":
        settings |= {"guidance": args.guidance, "seed": args.seed, "size": args.size}
        picture = sample(model, [args.prompt], styles=styles, adain=True, **settings).picture
    else:
        settings |= {"window": args.window, "stride": args.stride, "view_batch": args.view_batch, "seed": args.seed}
        picture = expand(model, styles, args.size, **settings).picture
    decoded = clock.now()
    picture = (picture[0].permute(1, 2, 0) * 255).round().to("cpu", torch.uint8)
    Image.fromarray(picture.numpy()).save(args.output)

    started, ended = progress.ends[0], progress.ends[-1]
    report = {
        "task": args.task,
        "size": "{}x{}".format(*args.size),
        "steps": args.steps,
        "iterations": args.iterations,
        "styles": len(styles),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "import_s": imported,
        "load_s": loaded - imported,
        "encode_s": started - loaded,
        "to_first_step_s": started,
        "first_step_s": progress.seconds[0],
        "step_s": statistics.median(progress.seconds),
        "decode_s": decoded - ended,
        "whole_s": decoded,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if device.type == "cuda":
        report["peak_allocated_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        report["peak_reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in report.items()}
    print(json.dumps(rounded | {"losses": progress.losses, "output": str(args.output)}))


if __name__ == "__main__":
    main()
