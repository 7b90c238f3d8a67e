"""Writes a model folder of full size with random weights, in diffusers layout: what it draws is noise, but it takes the
memory and the time of the real one.

    python full_size_model.py FOLDER [--architecture sd15] [--dtype bf16] [--only unet vae]

Nothing is downloaded. Names and shapes come from diffusers' and transformers' networks without memory (`meta`); the
weights are written tensor by tensor.
"""

import argparse
import json
import math
import shutil
import zlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

KINDS = {"f16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16")}
# Any vocabulary of up to 49408 words does; this one is at hand.
TOKENIZER = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "sd15" / "tokenizer"
# How much larger than its inputs queries and keys are: attention is neither even nor so sharp that roundings grow from layer
# to layer, and two programs with the same weights come to other losses.
SHARPNESS = 1.4
UNET, VAE, TEXT, TEXT_2 = "unet", "vae", "text_encoder", "text_encoder_2"
PARTS = [UNET, VAE, TEXT, TEXT_2]

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

UNETS = {
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
}

VAES = {
    "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "sd15": {"sample_size": 512, "scaling_factor": 0.18215, "force_upcast": True},
}

# Width, layers, heads, activation: OpenAI's ViT-L/14, and OpenCLIP's ViT-bigG/14.
CLIPS = {
    TEXT: (768, 12, 12, "quick_gelu"),
    TEXT_2: (1280, 32, 20, "gelu"),
}


def network(part, architecture):
    """Its configuration and shapes; the weights take no memory."""
    with torch.device("meta"):
        if part == UNET:
            return UNet2DConditionModel(layers_per_block=2, **UNETS[architecture])
        if part == VAE:
            channels = (128, 256, 512, 512)
            return AutoencoderKL(
                block_out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * len(channels),
                up_block_types=("UpDecoderBlock2D",) * len(channels),
                layers_per_block=2,
                latent_channels=4,
                **VAES[architecture],
            )
        width, layers, heads, activation = CLIPS[part]
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
            projection_dim=width,
        )
        # The old value of OpenAI's files: the pooled token is the one with the highest id.
        config.eos_token_id = 2
        return (CLIPTextModelWithProjection if part == TEXT_2 else CLIPTextModel)(config)


def random_tensor(name, shape, pool, dtype):
    """Numbers that keep activations near 1: norms that do nothing, weights scaled by their inputs, no biases."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    count, inputs = math.prod(shape), math.prod(shape[1:])
    # Drawing billions of numbers would take minutes: each tensor repeats the same ones, from a place of its own. Were the
    # weights of queries and keys the same, each token would see little but itself, and SDXL's losses would not be steady.
    own = pool.roll(-(zlib.crc32(name.encode()) % len(pool)))
    widening = SHARPNESS if name.endswith(("to_q.weight", "to_k.weight")) else 1.0
    scaled = (own * (widening / math.sqrt(inputs))).to(dtype)
    return scaled.repeat(-(-count // len(scaled)))[:count]


def write_safetensors(path, shapes, pool, kind):
    dtype, label = KINDS[kind]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(random_tensor(name, shape, pool, dtype).view(torch.int16).numpy().data)
    return end


def write_part(folder, part, architecture, pool, kind):
    model = network(part, architecture)
    folder = folder / part
    folder.mkdir(parents=True, exist_ok=True)
    if part in CLIPS:
        model.config.save_pretrained(folder)
        name = "model.safetensors"
        target = folder.parent / part.replace(TEXT, "tokenizer")
        shutil.copytree(TOKENIZER, target, dirs_exist_ok=True)
    else:
        model.save_config(folder)
        name = "diffusion_pytorch_model.safetensors"
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    size = write_safetensors(folder / name, shapes, pool, kind)
    print(f"{part}: {size / 2e6:.0f} M parameters, {size / 2**30:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", choices=sorted(UNETS), default="sdxl")
    parser.add_argument("--dtype", choices=sorted(KINDS), default="f16", help="of the files")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these networks alone; such a folder is no whole model")
    arguments = parser.parse_args()
    pool = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0))
    parts = PARTS if arguments.architecture == "sdxl" else PARTS[:3]
    for part in arguments.only or parts:
        write_part(arguments.folder, part, arguments.architecture, pool, arguments.dtype)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.save_config(arguments.folder / "scheduler")
    # As SDXL's own: no negative prompt means zeros.
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    if arguments.architecture != "sdxl":
        index = {"_class_name": "StableDiffusionPipeline"}
    (arguments.folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
