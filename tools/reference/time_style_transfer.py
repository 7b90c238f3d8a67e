"""Times the plain Python style transfer; prints one line of JSON.

    python time_style_transfer.py MODEL --content a.png --style b.png --output out.png
"""

import argparse
import json
import os
import resource
import statistics
import time
import warnings


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
    parser.add_argument("model", help="folder in diffusers layout")
    parser.add_argument("--content", required=True)
    parser.add_argument("--style", required=True, action="append", help="may be given several times")
    parser.add_argument("--output", default="style_transfer_reference.png")
    parser.add_argument("--size", type=size, default=(256, 256), metavar="WxH", help="both pictures are scaled to it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--content-weight", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--threads", type=int, help="default: libtorch's own choice")
    return parser.parse_args()


def main():
    args = arguments()
    warnings.filterwarnings("ignore")

    import numpy
    import torch
    from PIL import Image

    from attention_distillation import Model, optimise

    if args.threads:
        torch.set_num_threads(args.threads)
    imported = seconds_since_start()

    def load(path):
        picture = Image.open(path).convert("RGB")
        if picture.size != args.size:
            picture = picture.resize(args.size, Image.Resampling.BICUBIC)
        return torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255).permute(2, 0, 1)[None]

    model = Model.open(args.model)
    loaded = seconds_since_start()
    content = model.encode(load(args.content))
    styles = [model.encode(load(path)) for path in args.style]
    ready = seconds_since_start()

    ends = [ready]
    run = optimise(
        model,
        content,
        styles,
        content,
        content_weight=args.content_weight,
        steps=args.steps,
        iterations=args.iterations,
        learning_rate=args.lr,
        progress=lambda *_: ends.append(seconds_since_start()),
    )
    picture = model.decode(run.latents)[0].permute(1, 2, 0)
    decoded = seconds_since_start()
    Image.fromarray((picture * 255).round().to(torch.uint8).numpy()).save(args.output)

    steps = [after - before for before, after in zip(ends, ends[1:])]
    report = {
        "size": "{}x{}".format(*args.size),
        "steps": args.steps,
        "iterations": args.iterations,
        "styles": len(styles),
        "threads": torch.get_num_threads(),
        "import_s": imported,
        "load_s": loaded - imported,
        "encode_s": ready - loaded,
        "to_first_step_s": ready,
        "first_step_s": steps[0],
        "step_s": statistics.median(steps),
        "decode_s": decoded - ends[-1],
        "whole_s": decoded,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": run.losses[0],
        "last_loss": run.losses[-1],
        "output": args.output,
    }
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in report.items()}))


if __name__ == "__main__":
    main()
