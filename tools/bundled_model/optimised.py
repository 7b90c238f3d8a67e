#!/usr/bin/env python3
"""What transfers leave in latents, for train_vae.py to learn to see through: styles of training pictures transferred onto others.

    python3 optimised.py                                  # by the shipped model -> work/optimised.pt
    python3 optimised.py --model my_model --work mine     # by another one, from other pictures

The settings are those of the model's folder (the shipped model's where it has none), the procedure is tools/reference's. The decoder has no part
in it. Goes on where it was stopped.
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

sys.path.insert(0, str(HERE.parent / "reference"))
from attention_distillation import Model, optimise  # noqa: E402

SHIPPED = HERE / "../../assets/mini"
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", type=Path, default=SHIPPED, help="folder in diffusers layout")
parser.add_argument("--count", type=int, default=64, help="pictures")
parser.add_argument("--side", type=int, default=192, help="of the pictures, in pixels")
parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--work", type=Path, default=HERE / "work")
args = parser.parse_args()
if args.side % 64 or args.side < 192:
    parser.error("--side has to be a multiple of 64, at least 192: excess.py looks at whole windows, and train_vae.py cuts parts of 128 out of it")
weights = args.model / "unet/diffusion_pytorch_model.safetensors"
if not weights.exists():
    parser.error(f"no model in {args.model}: {weights} is missing")
torch.set_num_threads(args.threads)

model = Model.open(args.model, device=args.device)
files = [folder / "attention_distillation.json" for folder in (args.model, SHIPPED)]
own = json.loads(next(file for file in files if file.exists()).read_text())
own |= own.get("style_transfer", {})
settings = {name: own[name] for name in ("steps", "iterations", "learning_rate", "content_weight")}
if files[0].exists() and "layers" in own:
    model.layers = range(*own["layers"])

tiles, path = Tiles(args.work), args.work / "optimised.pt"
made_with = dict(unet=hashlib.sha256(weights.read_bytes()).hexdigest(), side=args.side, batch=args.batch, seed=args.seed, **settings)
saved = torch.load(path) if path.exists() else dict(made_with=made_with, latents=torch.empty(0))
if saved["made_with"] != made_with:
    raise SystemExit(f"{path} was made by another model or with other flags: move it away, or give --work")
done = saved["latents"]
while len(done) < args.count:
    # Of a generator of its own for each batch, so that it makes no difference where a run was stopped.
    rng = np.random.default_rng((args.seed, len(done)))
    contents, styles = (model.encode(tiles.crops(args.batch, args.side, rng).to(args.device) / 2 + 0.5) for _ in range(2))
    # The losses are means over the batch, and Adam does not mind factors: each picture goes its own way.
    run = optimise(model, contents, [styles], contents, **settings)
    done = torch.cat([done, run.latents.detach().cpu()])
    torch.save(dict(made_with=made_with, latents=done), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    print(f"{len(done)} of {args.count}, loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}", flush=True)
