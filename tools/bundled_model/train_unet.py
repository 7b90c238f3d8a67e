#!/usr/bin/env python3
"""Trains the U-Net on latents of random crops, encoded on the fly.

    python3 train_unet.py [--device cuda]     # work/unet: goes on where it was stopped
    python3 train_unet.py --start ../../assets/mini/unet --name longer     # from weights that are there, in a run of its own

Its features are what attention distillation lives on. Hence v-prediction (Salimans & Ho 2022): at high noise, where noise prediction has
almost nothing to learn, it asks for the picture, which is where features of structure come from. Queries and keys start wider than usual,
since attention that is uniform at the start stays so for long. Downsampling is kept balanced (`balanced.py`): transfers descend by the
network's gradient, which has a pattern of single latents otherwise. With `--layout` queries are asked to see layout rather than
style (`layout.py`), which is meant for training a U-Net on that is trained already: see README.md.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from balanced import balance, imbalance
from data import HERE, Tiles, in_another_style
from denoising import Denoising, scheduler
from layout import Layout
from optim import Muon
from training import Run, flags, trained

parser = flags(__doc__, steps=10000, cooldown=3000, lr=2e-3, work=HERE / "work")
parser.add_argument("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction")
parser.add_argument("--min-snr", type=float, metavar="GAMMA", help="losses weighted by min-SNR, such as 5")
parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
parser.add_argument("--attention-width", type=float, default=2.0, help="factor on the first weights of queries and keys")
parser.add_argument("--unbalanced", action="store_true", help="downsampling as it comes, which leaves a weave in transfers")
parser.add_argument("--batch", type=float, default=1.0, help="factor on the batch size, which is for two cores")
parser.add_argument("--recolour", type=float, default=0.3, metavar="SHARE", help="of crops that get another palette")
parser.add_argument("--scales", type=int, nargs="+", default=(1, 1, 1, 2, 2, 3), help="crops are made smaller by one of these")
parser.add_argument(
    "--odds", type=float, nargs=6, default=(0.1, 0.15, 0.4, 0.2, 0.1, 0.05), metavar="SHARE", help="how often crops of 16, 24, 32, 48, 64 and 72 latents are drawn"
)
parser.add_argument("--layout", type=float, metavar="WEIGHT", help="of the loss that asks queries for layout rather than style, such as 0.1")
parser.add_argument("--start", type=trained, metavar="FOLDER", help="a trained U-Net to start from, in diffusers layout, in place of random weights")
parser.add_argument("--name", default="unet")
args = parser.parse_args()
if 1 not in args.scales or min(args.scales) < 1:
    parser.error("--scales: 1 must be among them, for the largest crops are as large as tiles allow, and none below it")
if min(args.odds) < 0 or abs(sum(args.odds) - 1) > 1e-3:
    parser.error("--odds: shares, which together are 1")
if args.layout is not None and not args.layout > 0:
    parser.error("--layout: above 0; without it nothing is asked of queries")
args.odds = [share / sum(args.odds) for share in args.odds]  # numpy wants it to the last digits
torch.set_num_threads(args.threads)
torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU

CONFIG = dict(
    sample_size=64,
    in_channels=8,
    out_channels=8,
    # No attention at full resolution on the way down, where it costs most and is not used.
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(48, 80, 96),
    layers_per_block=2,
    cross_attention_dim=32,
    attention_head_dim=(1, 2, 2),  # diffusers' name for the number of heads
    norm_num_groups=16,
)
# Latents a side, pictures per batch, and how often each is drawn: small ones first, since they teach the same for less.
SIZES = ((16, 12), (24, 6), (32, 4), (48, 2), (64, 1), (72, 1))
EARLY = (0.7, 0.2, 0.1, 0.0, 0.0, 0.0)
# With --layout: crops whose queries are compared, by the same sides; at least two, as others are what they are measured against.
PAIRS = {16: 4, 24: 3, 32: 2, 48: 2, 64: 2, 72: 2}

if not (args.work / "vae_init").exists():
    parser.error(f"no encoder in {args.work}: train_vae.py --init writes it")
vae = AutoencoderKL.from_pretrained(args.work / "vae_init").to(args.device).eval().requires_grad_(False)
if args.start:
    unet = UNet2DConditionModel.from_pretrained(args.start, torch_dtype=torch.float32)
else:
    torch.manual_seed(args.seed)  # here, for without accelerate reading the autoencoder draws, too
    unet = UNet2DConditionModel(**CONFIG)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn1.to_q" in name or "attn1.to_k" in name:
                weight.mul_(args.attention_width)
unet = unet.to(args.device).train()
denoising = Denoising(unet, args.prediction, args.device, args.min_snr)
layout = Layout(unet, denoising.nothing)
tiles = Tiles(args.work)


def encode(pictures):
    with torch.no_grad():
        return vae.encode(pictures).latent_dist.mean


def crops_of(step, rng):
    # Cheap sizes for the first 40 % of a run from nothing, then those that --odds asks for.
    odds = EARLY if step < 0.4 * args.steps and not args.start else args.odds
    side, count = SIZES[rng.choice(len(SIZES), p=odds)]
    crops = tiles.crops(max(1, round(count * args.batch)), 4 * side, rng, args.recolour, args.scales)
    return torch.cat([crops, tiles.pairs(pairs_of(side), 4 * side, rng, args.scales)]) if args.layout else crops


def pairs_of(side):
    return max(2, round(PAIRS[side] * args.batch))


def loss_of(run, pictures):
    x = encode(pictures)
    if args.layout:
        x, pairs = x.tensor_split([-2 * pairs_of(x.shape[-1])])
    t = torch.randint(0, 1000, (len(x),), device=args.device, generator=run.generator)
    loss = denoising.loss(x, t, torch.randn(x.shape, device=args.device, generator=run.generator))
    if args.layout:
        t = torch.randint(0, 1000, (1,), device=args.device, generator=run.generator)
        loss = loss + args.layout * layout.loss(pairs, t, run.generator)
    return loss


def validate(_):
    found = denoising.held_out(held_out)
    return {**found, "layout": layout.held_out(held_out, restyled)} if args.layout else found


held_out = tiles.held_out(128)
restyled = in_another_style(held_out, held_out.roll(1, 0), np.random.default_rng(1))
held_out, restyled = encode(held_out.to(args.device)), encode(restyled.to(args.device))
if args.optimizer == "muon":
    optimizer = Muon(unet, args.lr)
else:
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
run = Run(args.work / f"{args.name}_run", unet, optimizer, args, args.work / "vae_init")
if not args.unbalanced:
    # Whatever was read, new weights or a state; one that is balanced goes on as it was, to the bit.
    if (off := imbalance(unet)) > 1e-3:
        run.say(f"downsampling was off balance by {off:.2f} of its weights' size and is balanced from here on")
        balance(unet)
    optimizer.register_step_post_hook(lambda *_: balance(unet))
run.go(crops_of, loss_of, validate)


def save(folder):
    if not args.unbalanced:
        balance(unet)  # an average over steps before they were balanced is not
    unet.save_pretrained(folder)
    scheduler(args.prediction).save_pretrained(folder / "scheduler")


run.finish(args.work / args.name, save)
