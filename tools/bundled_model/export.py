#!/usr/bin/env python3
"""Puts a trained model together in f16, ready to ship.

    python3 export.py --unet work/layout --vae work/patches --output ../../assets/mini      # both as trained on; without these flags work/unet, work/vae
    python3 export.py --output ../../assets/mini --unet work/longer --vae ../../assets/mini/vae      # with another U-Net, and the decoder that is there
    python3 export.py --random --vae work/patches --output work/random   # the control: the same autoencoder, a U-Net of random weights

`attention_distillation.json`, the model's own settings, is kept where the folder has one; another gets those of the bundled model.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from training import trained

HERE = Path(__file__).resolve().parent
LIMIT = 9_500_000
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--random", action="store_true")
parser.add_argument("--work", type=Path, default=HERE / "work")
parser.add_argument("--unet", type=trained, help="default: that of the working folder")
parser.add_argument("--vae", type=trained, help="likewise")
args = parser.parse_args()


def of_work(name):
    if not (args.work / name / "config.json").exists():
        raise SystemExit(f"no {name} in {args.work}: train it first, or name a folder")
    return args.work / name


folders = dict(vae=args.vae or of_work("vae"), unet=args.unet or of_work("unet"))
# Beside the weights where train_unet.py wrote them, or where a pipeline has it.
schedulers = [path for path in (folders["unet"] / "scheduler", folders["unet"].parent / "scheduler") if path.exists()]
if not schedulers:
    raise SystemExit(f"no scheduler in {folders['unet']} nor beside it")
vae = AutoencoderKL.from_pretrained(folders["vae"], torch_dtype=torch.float32)
unet = UNet2DConditionModel.from_pretrained(folders["unet"], torch_dtype=torch.float32)
if args.random:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(unet.config)
for name, network in (("vae", vae), ("unet", unet)):
    network.half().save_pretrained(args.output / name)
    # Where it was trained is nobody's business.
    config = args.output / name / "config.json"
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n")
DDIMScheduler.from_pretrained(schedulers[0]).save_pretrained(args.output / "scheduler")
index = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": content["_diffusers_version"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
(args.output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
settings = args.output / "attention_distillation.json"
if not settings.exists():
    settings.write_text((HERE / "../../assets/mini/attention_distillation.json").read_text())
size = sum(path.stat().st_size for path in args.output.glob("*/*.safetensors"))
print(f"{args.output}: {size} bytes of weights")
if size > LIMIT:
    raise SystemExit(f"more than {LIMIT}: make the networks smaller")
