#!/usr/bin/env python3
"""What transfers leave in latents, for train_vae.py to learn to see through: styles of training pictures transferred onto others.

    python3 optimised.py --model my_model       # -> work/optimised.pt

The settings are those of the model's folder, the procedure is tools/reference's. The decoder has no part in it, so the model may be one that
export.py made with an earlier decoder. Goes on where it was stopped.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from data import HERE, Tiles
from excess import probe

sys.path.insert(0, str(HERE.parent / "reference"))
from attention_distillation import Model, optimise  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", type=Path, required=True, help="folder in diffusers layout")
parser.add_argument("--count", type=int, default=64, help="pictures")
# excess.py wants whole windows, and loses 16 pixels at each border, of which 128 have to be left; tiles end at 288.
parser.add_argument("--side", type=int, default=192, choices=(192, 256), help="of the pictures, in pixels")
parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--work", type=Path, default=HERE / "work")
args = parser.parse_args()
weights = args.model / "unet/diffusion_pytorch_model.safetensors"
if not weights.exists():
    parser.error(f"no model in {args.model}: {weights} is missing")
torch.set_num_threads(args.threads)

model = Model.open(args.model, device=args.device)
own = dict(steps=200, iterations=1, learning_rate=0.05, content_weight=0.25)  # the paper's, for what the folder does not say
file = args.model / "attention_distillation.json"
said = json.loads(file.read_text()) if file.exists() else {}
own |= {name: value for part in (said, said.get("style_transfer", {})) for name, value in part.items() if name in own}
if "layers" in said:
    model.layers = range(*said["layers"])

tiles, path = Tiles(args.work), args.work / "optimised.pt"
made_with = dict(
    unet=hashlib.sha256(weights.read_bytes()).hexdigest(), layers=list(model.layers), side=args.side, batch=args.batch, seed=args.seed, **own
)
saved = torch.load(path) if path.exists() else dict(made_with=made_with, latents=torch.empty(0))
if saved["made_with"] != made_with:
    raise SystemExit(f"{path} was made by another model or with other flags: move it away")
done = saved["latents"]
while len(done) < args.count:
    # Of a generator of its own for each batch, so that it makes no difference where a run was stopped.
    rng = np.random.default_rng((args.seed, len(done)))
    contents, styles = (model.encode(tiles.crops(args.batch, args.side, rng).to(args.device) / 2 + 0.5) for _ in range(2))
    # The losses are means over the batch, and Adam does not mind factors: each picture goes its own way.
    run = optimise(model, contents, [styles], contents, **own)
    done = torch.cat([done, run.latents.detach().cpu()])
    torch.save(dict(made_with=made_with, count=args.count, code=model.encode(probe()).cpu(), latents=done), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    print(f"{len(done)} of {args.count}, loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}", flush=True)
