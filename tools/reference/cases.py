"""What `compare.py` runs: the cases, their models and their pictures."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "assets"
PICTURES = ASSETS / "pictures"
# Of the few words that the random models' vocabulary has letters for, which are all.
PROMPT = "a red house by the sea"


@dataclass(frozen=True)
class Case:
    task: str
    """An example of the crate, and a task of `run.py`."""
    model: str
    """The bundled one, or an architecture of `full_size_model.py`."""
    size: tuple
    """(width, height) in pixels."""
    steps: int
    authors_steps: int | None
    """None where the settings are the bundled model's own."""
    iterations: int
    lr: float
    style: str
    more: dict = field(default_factory=dict)
    """Further flags, the same for both programs."""


CASES = {
    "bundled-256": Case(
        "style_transfer", "bundled", (256, 256), 15, None, 6, 0.05, "style_harvest.png", {"--content-weight": 0.3, "--adain": None, "--smoothing": 0.4}
    ),
    "sd15-512": Case("style_transfer", "sd15", (512, 512), 5, 200, 1, 0.05, "style_harvest.png", {"--content-weight": 0.25}),
    "sd15-sampling-512": Case(
        "text_to_image", "sd15", (512, 512), 5, 50, 3, 0.015, "style_harvest.png", {"--guidance": 7.5, "--prompt": PROMPT}
    ),
    "sdxl-1024": Case(
        "text_to_image", "sdxl", (1024, 1024), 3, 50, 2, 0.015, "style_harvest.png", {"--guidance": 7.0, "--prompt": PROMPT}
    ),
    # Fresh noise for each batch of views is the authors' way; the crate's own draws it once in a timestep.
    "expansion-512x2048": Case(
        "texture_expansion",
        "sd15",
        (2048, 512),
        3,
        50,
        2,
        0.05,
        "texture_gravel.png",
        {"--window": 64, "--stride": 8, "--view-batch": 8, "--reference-per-batch": None},
    ),
}


def model_folder(case, args, folder):
    """The case's model; a random one is made in `folder`, unless it is there already."""
    if args.model:
        return args.model
    if case.model == "bundled":
        return ASSETS / "mini"
    # On disk as in memory, or else in half precision, as models are given away.
    dtype = "f16" if args.dtype == "f32" else args.dtype
    wanted = folder / f"{case.model}-{dtype}"
    if not wanted.exists():
        unfinished = folder / f"{wanted.name}.part"
        # A program of its own: a child's peak memory is at least what its parent had when it was started.
        command = [sys.executable, HERE / "full_size_model.py", unfinished, "--architecture", case.model, "--dtype", dtype]
        subprocess.run(command, check=True, stdout=sys.stderr)
        unfinished.rename(wanted)
    return wanted


def latents_size(model, size):
    """(width, height) of a picture's latents."""
    config = json.loads((Path(model) / "vae" / "config.json").read_text())
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return tuple(side // factor for side in size), factor


def picture_flags(case, model, size, folder):
    """The pictures, of the right size: both programs take them as they are, so that none is scaled in two ways."""
    style_size = size
    if case.task == "texture_expansion":
        _, factor = latents_size(model, size)
        style_size = tuple(min(case.more["--window"] * factor, side) for side in size)
    flags = ["--style", scaled(case.style, style_size, folder / "style.png")]
    if case.task == "style_transfer":
        flags += ["--content", scaled("content_astronaut.png", size, folder / "content.png")]
    return flags


def scaled(name, size, to):
    Image.open(PICTURES / name).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(to)
    return str(to)


def view_batches(case, model, size):
    """How often the views of a timestep are gone through: 1, unless the picture is made in windows."""
    if case.task != "texture_expansion":
        return 1
    window, stride, batch = (case.more[flag] for flag in ("--window", "--stride", "--view-batch"))
    views = 1
    for side in latents_size(model, size)[0]:
        views *= len(range(0, max(side - window, 0), stride)) + 1
    return -(-views // batch)


def crates_own(case):
    """What the crate alone is told, so that it does as `run.py` does whatever the model's own settings are."""
    if "--adain" in case.more:
        return []
    return ["--adain" if case.task == "text_to_image" else "--no-adain"]


def flags(case, args, size):
    """The flags of both programs, but for model, pictures and output."""
    numbers = {
        "--size": "{}x{}".format(*size),
        "--steps": args.steps or case.steps,
        "--iterations": args.iterations or case.iterations,
        "--lr": case.lr,
        "--seed": 42,
        "--device": args.device,
        "--dtype": args.dtype,
    } | case.more
    given = [str(part) for pair in numbers.items() for part in pair if part is not None]
    return given + ["--low-memory"] * args.low_memory
