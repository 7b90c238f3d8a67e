"""Whether diffusers reads the autoencoders that the crate writes, and makes of them what the crate does.

    cargo build --release --example finetune_vae
    python tools/reference/check_saved_vae.py target/release/examples/finetune_vae

For each folder `finetune_vae` tunes the decoder to a picture for a few epochs and saves it. diffusers has to open what was
saved without a tensor missing or left over. Its decoded picture is then compared with the crate's own, which comes in 8
bits, and with that of `tune_decoder` in this folder, which learns the same from the same start. The table has the largest
differences; a folder that is off by more than it may be makes this program fail. It writes nothing that stays.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from attention_distillation import decode, encode
from diffusers import AutoencoderKL
from PIL import Image
from textures import tune_decoder

ROOT = Path(__file__).parents[2]
# New names of the attention's tensors, the old ones (query, key, value, proj_attn), a decoder without attention; and one
# that was trained.
FOLDERS = ["tests/fixtures/sd15/vae", "tests/fixtures/vae_old_names", "tests/fixtures/vae_plain", "assets/mini/vae"]
# White between the pictures of a sheet.
GAP = 8
# Half a level is what rounding to 8 bits takes; Adam divides by small gradients, and so enlarges what roundings differ by.
MOST_LEVELS, MOST_RELATIVE = 0.6, 1e-3


def pixels(picture):
    """(1, 3, H, W) in 0..1."""
    return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 255


def waves(width, height):
    """A picture with colours and edges of its own, so that none has to be at hand."""
    x, y = numpy.meshgrid(numpy.linspace(0, 6, width), numpy.linspace(0, 4, height))
    channels = [numpy.sin(2 * x + y), numpy.cos(x * y), numpy.sign(numpy.sin(3 * y))]
    return Image.fromarray((numpy.stack(channels, -1) * 100 + 128).astype(numpy.uint8))


def opened(folder):
    """By diffusers, strictly."""
    vae, info = AutoencoderKL.from_pretrained(folder, output_loading_info=True, use_safetensors=True, low_cpu_mem_usage=False)
    wrong = {what: names for what, names in info.items() if names}
    if wrong:
        raise SystemExit(f"{folder}: diffusers reports {wrong}")
    return vae.float().eval()


def check(program, folder, picture, epochs, learning_rate, place):
    tuned, sheet = place / "tuned", place / "sheet.png"
    flags = {"--image": picture, "--vae": folder, "--output": tuned, "--sheet": sheet}
    flags |= {"--epochs": epochs, "--lr": learning_rate, "--device": "cpu"}
    ran = subprocess.run([program, *(str(word) for flag in flags.items() for word in flag)], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{folder}: {ran.stderr}")

    shown, original = pixels(Image.open(sheet)), pixels(Image.open(picture))
    width = original.shape[3]
    before, after = (shown[..., at : at + width] for at in (width + GAP, 2 * (width + GAP)))
    ours, start = opened(tuned), opened(folder)
    latents = torch.no_grad()(encode)(start, original * 2 - 1)
    picture_of = lambda vae: torch.no_grad()(decode)(vae, latents) / 2 + 0.5
    theirs = picture_of(ours)
    levels = [(picture_of(start), before), (theirs, after)]
    levels = [255 * (decoded.clamp(0, 1) - seen).abs().max().item() for decoded, seen in levels]

    _, state = tune_decoder(start, original, epochs, learning_rate)
    untuned = picture_of(start)
    start.load_state_dict(state)
    learnt = picture_of(start)
    relative = (theirs - learnt).abs().max().item() / learnt.abs().max().item()
    moved = (learnt - untuned).abs().max().item() / learnt.abs().max().item()
    return levels, relative, moved


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the built example finetune_vae")
    parser.add_argument("folders", type=Path, nargs="*", help="autoencoders; default: those of the repository")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print("| autoencoder | levels, before | levels, tuned | relative to Python's tuning | how far tuning moved it |")
    print("|---|--:|--:|--:|--:|")
    sound = True
    for folder in arguments.folders or [ROOT / name for name in FOLDERS]:
        with tempfile.TemporaryDirectory() as place:
            picture = Path(place, "picture.png")
            waves(96, 64).save(picture)
            levels, relative, moved = check(arguments.program.resolve(), folder, picture, arguments.epochs, arguments.lr, Path(place))
        name = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        print(f"| {name} | {levels[0]:.3f} | {levels[1]:.3f} | {relative:.1e} | {moved:.1e} |", flush=True)
        sound &= max(levels) <= MOST_LEVELS and relative <= MOST_RELATIVE < moved
    if not sound:
        sys.exit(f"off by more than {MOST_LEVELS} levels or {MOST_RELATIVE}, or not tuned at all")


if __name__ == "__main__":
    main()
