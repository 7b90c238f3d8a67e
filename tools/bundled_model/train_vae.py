#!/usr/bin/env python3
"""Trains the autoencoder: writes its encoder, then trains the decoder on latents with noise.

    python3 train_vae.py --init               # work/vae_init: the linear code, enough for train_unet.py to begin
    python3 train_vae.py [--device cuda]      # work/vae: goes on where it was stopped
    python3 train_vae.py --start work/vae --name patches --patch-weight 0.5 --lr 5e-4 --steps 1000 --cooldown 1000     # a decoder that is there, trained on, here for fine detail

The noise is what makes transferred pictures clean: Adam leaves a pattern in the latents that pictures do not have, and a decoder that saw
noisy latents takes it for such. Two fifths of the pictures are nearly without, so that sharpness does not suffer more than need be.
Unless `--drift 0` is given, three fifths also get smooth fields in those directions of the channels that say little where a picture is smooth: transfers
leave such, and a decoder that takes them at their word draws one and the same block over and over, a grid of 4 pixels.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import autoencoder
from data import HERE, Tiles
from optim import Muon
from training import Run, checksum, flags, swapped_in, trained

parser = flags(__doc__, steps=6000, cooldown=2400, lr=1.5e-3, work=HERE / "work")
parser.add_argument("--init", action="store_true", help="only write the linear start")
parser.add_argument("--noise", type=float, default=0.4, help="largest deviation of the noise on latents, whose own is 1")
parser.add_argument("--random-weight", type=float, default=0.1, help="weight of the loss on random features")
parser.add_argument("--patch-weight", type=float, default=0.0, help="weight of the sliced Wasserstein distance of patches, which asks for as much grain as the picture has, wherever it lies")
parser.add_argument("--drift", type=float, default=1.0, help="largest deviation of smooth drifts of the latents in directions that say little where pictures are smooth; 0 is none")
parser.add_argument("--start", type=trained, metavar="FOLDER", help="an autoencoder to start from, in diffusers layout")
parser.add_argument("--name", default="vae")
args = parser.parse_args()
if args.init and args.start:
    parser.error("--init writes a start of its own, --start takes one that is there")
torch.set_num_threads(args.threads)

tiles = Tiles(args.work)
start = args.start or args.work / "vae_init"
made_of = {"pictures": checksum(args.work / "manifest.csv"), "--seed": args.seed}


def write_start(folder):
    vae = autoencoder.build(tiles.crops(600, 128, np.random.default_rng(args.seed)), args.seed)
    vae.save_pretrained(folder)
    (folder / "made_of.json").write_text(json.dumps(made_of, indent=1) + "\n")
    print(f"linear start: {autoencoder.psnr(vae.eval(), tiles.held_out(256)):.2f} dB on held-out pictures")


if args.init and start.exists():
    # Not written anew: its last bits hang on the machine, and runs that began with it go on with it alone. Earlier ones do not say what of.
    record = start / "made_of.json"
    before = json.loads(record.read_text()) if record.exists() else made_of
    if other := ", ".join(name for name in made_of if before.get(name) != made_of[name]):
        raise SystemExit(f"{start} was made with other {other}: move it away, and the runs that began with it, or take another --work")
    print(f"{start} is there already and stays as it is")
elif not args.start and not start.exists():
    swapped_in(start, write_start)
if args.init:
    raise SystemExit
vae = AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32).to(args.device).train()
for part in (vae.encoder, vae.quant_conv, vae.post_quant_conv):
    part.requires_grad_(False)


def unit_kernels(kernels):
    """Each without its mean, channel by channel, so that flat places excite nothing, and of length 1."""
    kernels = kernels - kernels.mean((2, 3), keepdim=True)
    return kernels / kernels.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


class RandomFeatures(torch.nn.Module):
    """A network of random weights: distances between its features tell textures apart that pixels' distances blur."""

    def __init__(self, seed=1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kernels = torch.nn.ParameterList()
        for outputs, inputs in ((24, 3), (48, 24)):
            kernels = unit_kernels(torch.randn(outputs, inputs, 3, 3, generator=generator))
            self.kernels.append(torch.nn.Parameter(kernels, requires_grad=False))

    def forward(self, x):
        found = []
        for kernel in self.kernels:
            x = F.relu(F.conv2d(x, kernel, padding=1))
            found.append(x)
            x = F.avg_pool2d(x, 2)
        return found


features = RandomFeatures().to(args.device)


def patch_distance(x, y, generator, directions=32):
    """The sliced Wasserstein distance of 5 x 5 patches of each picture, by random directions, at two scales. Where latents do not say what fine
    detail there was, the other distances are least for none at all; this one is least for as much of it as there was."""
    found = 0
    for scale in (1, 2):
        a, b = (F.avg_pool2d(picture, scale) for picture in (x, y))
        kernels = unit_kernels(torch.randn(directions, 3, 5, 5, device=x.device, generator=generator))
        a, b = (F.conv2d(picture, kernels).flatten(2).sort(dim=2).values for picture in (a, b))
        found = found + (a - b).abs().mean()
    return found


def distance(x, y):
    loss = (x - y).abs().mean()
    for k in (2, 4):
        loss = loss + 0.5 * (F.avg_pool2d(x, k) - F.avg_pool2d(y, k)).abs().mean()
    for axis in (2, 3):
        loss = loss + 0.5 * (x.diff(dim=axis) - y.diff(dim=axis)).abs().mean()
    if args.random_weight:
        loss = loss + args.random_weight * sum((a - b).abs().mean() for a, b in zip(features(x), features(y)))
    return loss


@torch.no_grad()
def silent():
    """What of latents does not belong where a picture is smooth, as a projection of the channels, `(8, 8)`: all but the three directions of colour."""
    flat = torch.eye(4, 3, device=args.device)[:, :, None, None].expand(-1, -1, 32, 32) - 0.5  # red, green, blue and black
    z = vae.encode(flat).latent_dist.mean.mean((2, 3))
    if z.shape[1] <= 3:
        raise SystemExit(f"--drift wants more channels than those of colour, and this autoencoder has {z.shape[1]}: --drift 0 does without")
    colours, _ = torch.linalg.qr((z[:3] - z[3]).T)
    return torch.eye(len(colours), device=args.device) - colours @ colours.T


onto_silent = silent() if args.drift else None


def crops_of(step, rng):
    side, count = (64, 16) if step < 0.7 * args.steps else (128, 4)
    return tiles.crops(count, side, rng)


def some(count, generator):
    """An amount for each picture, 0 for two fifths of them."""
    amount = torch.rand(count, 1, 1, 1, device=args.device, generator=generator)
    return amount * (torch.rand(amount.shape, device=args.device, generator=generator) < 0.6)


def drift(z, generator):
    """Smooth fields in the silent directions."""
    cells = int(torch.randint(2, z.shape[-1] // 4 + 1, (1,), device=args.device, generator=generator))  # on a GPU it is waited for
    fields = torch.randn(*z.shape[:2], cells, cells, device=args.device, generator=generator)
    fields = F.interpolate(fields, size=z.shape[2:], mode="bicubic", align_corners=False)
    return torch.einsum("ncyx,cd->ndyx", fields, onto_silent)


def loss_of(run, x):
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        amount = 0.02 + args.noise * some(len(x), run.generator)
        z = z + amount * torch.randn(z.shape, device=args.device, generator=run.generator)
        if args.drift:
            z = z + args.drift * some(len(x), run.generator) * drift(z, run.generator)
    y = vae.decode(z).sample
    return distance(x, y) + (args.patch_weight * patch_distance(x, y, run.generator) if args.patch_weight else 0)


held_out = tiles.held_out(256, 24).to(args.device)


def validate(run):
    return {"psnr": round(autoencoder.psnr(vae, held_out), 2)}


optimizer = Muon(vae, args.lr, decay=1e-3, outer=("decoder.conv_in", "decoder.conv_out", "encoder"))
run = Run(args.work / f"{args.name}_run", vae, optimizer, args, start, average=0.995, every=500)
run.go(crops_of, loss_of, validate)
run.finish(args.work / args.name, vae.save_pretrained)
