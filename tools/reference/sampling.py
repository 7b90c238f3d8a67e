"""Text to picture, guided by attention distillation, in plain Python on top of diffusers.

The other procedure that the crate's tests compare themselves with. DDIM makes a picture of a prompt as always, and
after each of its steps the latents are moved a little towards the styles.

    model = Sampler.open("folder")
    style = model.encode(style_picture)
    run = sample(model, ["a mill"], styles=[style], size=(512, 512), iterations=3, learning_rate=0.015, adain=True)
    run.picture

The folder is one of Stable Diffusion 1 or of SDXL, in diffusers layout. Pictures are (B, 3, H, W) in 0..1. One generator
on the CPU makes all the noise, so that the order in which it is drawn is part of the procedure.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from attention_distillation import Model, Network, ad_loss, content_loss, expanded, open_vae
from diffusers import ControlNetModel, DDIMScheduler
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass
class Sampler(Model):
    """A folder with one text encoder or, as SDXL's, with two."""

    encoders: list
    """Pairs of a tokenizer and its encoder."""
    zero_negative: bool
    """Whether no negative prompt means zeros, and not an empty text."""

    @classmethod
    def open(cls, folder, layers=None, device="cpu", dtype=torch.float32):
        folder = Path(folder)
        index = json.loads((folder / "model_index.json").read_text())
        network = Network.open(folder / "unet", device, dtype)
        vae = open_vae(folder, device, dtype)
        scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler"))
        encoders = []
        if (folder / "text_encoder").is_dir():
            encoders.append(open_encoder(CLIPTextModel, folder, "", device, dtype))
        if (folder / "text_encoder_2").is_dir():
            encoders.append(open_encoder(CLIPTextModelWithProjection, folder, "_2", device, dtype))
        zero_negative = len(encoders) == 2 and index.get("force_zeros_for_empty_prompt", True)
        return cls(network, vae, scheduler, None, layers or network.last(), encoders, zero_negative)

    @torch.no_grad()
    def encode_prompts(self, prompts, size):
        """The condition of a list of prompts: the text or, for SDXL, what `Network.predict` takes in its place. A model
        without text encoder knows one prompt, the empty one, which is zeros."""
        device, dtype = self.network.device, self.network.dtype
        if not self.encoders:
            assert not any(prompts), "the model has no text encoder"
            return torch.zeros(len(prompts), 1, self.network.unet.config.cross_attention_dim, device=device, dtype=dtype)
        ids = [
            tokenizer(
                prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
            ).input_ids
            for tokenizer, _ in self.encoders
        ]
        outputs = [encoder(rows.to(device), output_hidden_states=True) for rows, (_, encoder) in zip(ids, self.encoders)]
        if len(outputs) == 1:
            return outputs[0].last_hidden_state
        width, height = size
        return {
            # Of the last layer but one, before the final norm.
            "text": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "pooled": outputs[1].text_embeds,
            # The original size, the corner of the crop, and the size wanted.
            "time_ids": torch.tensor([[height, width, 0.0, 0.0, height, width]], device=device),
        }

    def encode_negative(self, negative, like, size):
        if negative is None and self.zero_negative:
            return like | {"text": torch.zeros_like(like["text"]), "pooled": torch.zeros_like(like["pooled"])}
        text = like["text"] if isinstance(like, dict) else like
        return self.encode_prompts([negative or ""] * len(text), size)


def open_encoder(kind, folder, suffix, device, dtype):
    encoder = kind.from_pretrained(folder / f"text_encoder{suffix}", torch_dtype=dtype).to(device)
    return CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}"), encoder.eval().requires_grad_(False)


@dataclass
class Control:
    """A ControlNet and the picture for it, of the output's size, for a part of the steps."""

    network: ControlNetModel
    picture: torch.Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    """The part, of 0..1."""

    @classmethod
    def open(cls, folder, picture, pooled=False, **settings):
        network = ControlNetModel.from_pretrained(folder, low_cpu_mem_usage=False).float().eval().requires_grad_(False)
        # As the one called Shuffle is: the same everywhere, and for the prompt alone.
        network.register_to_config(global_pool_conditions=pooled or network.config.global_pool_conditions)
        return cls(network, picture, **settings)

    def is_active(self, step, steps):
        return step / steps >= self.start and (step + 1) / steps <= self.end

    def residuals(self, latents, timestep, condition):
        batch = latents.shape[0]
        picture = self.picture.expand(batch, -1, -1, -1)
        return self.network(
            latents,
            timestep,
            controlnet_cond=picture,
            conditioning_scale=self.strength,
            return_dict=False,
            **expanded(condition, batch),
        )


def joined(first, second):
    """Two conditions as one batch; the time ids are the same for all."""
    if isinstance(first, dict):
        return first | {part: torch.cat([first[part], second[part]]) for part in ("text", "pooled")}
    return torch.cat([first, second])


@dataclass
class Sampled:
    start: torch.Tensor
    latents: torch.Tensor = None
    picture: torch.Tensor = None
    losses: list = field(default_factory=list)
    """Of each step's last iteration, before its update; NaN where there was none."""


def sample(
    model,
    prompts,
    negative=None,
    guidance=7.5,
    styles=(),
    content=None,
    content_weight=0.0,
    steps=50,
    iterations=0,
    learning_rate=0.05,
    adain=False,
    start_time=999,
    seed=0,
    size=(512, 512),
    control=None,
    mask=None,
    edited=None,
    strength=1.0,
    progress=None,
):
    """One picture for each prompt. `styles` and `content` are latents, `size` is (width, height) in pixels.

    With `edited`, latents too, the first noise does not stand alone but is put on these, as much as belongs to the
    timestep that the last `strength` of the steps begin with, and only these steps are taken (SDEdit). `mask` goes to
    `ad_loss`. `progress` is called with the steps done and the loss of the last one, first before any.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    timesteps, first = model.timesteps(steps), 0
    latents = drawn(model, latent_shape(model, len(prompts), size), generator)
    if edited is not None:
        first = steps - math.ceil(steps * strength - 1e-9)
        latents = model.scheduler.add_noise(edited.expand_as(latents), latents, torch.tensor([timesteps[first]]))
    run = Sampled(latents)

    condition = positive = model.encode_prompts(prompts, size)
    if guidance > 1:
        condition = joined(model.encode_negative(negative, positive, size), positive)
    # The looks at styles, content and picture are without words: always the encoded empty text, never zeros.
    model.null = model.encode_prompts([""], size)

    if progress:
        progress(first, None)
    for step, timestep in list(enumerate(timesteps))[first:]:
        active = control if control and control.is_active(step, steps) else None
        prediction = predict(model, latents, timestep, condition, guidance, active)
        latents = model.scheduler.step(prediction, timestep, latents, eta=0.0).prev_sample
        loss = float("nan")
        if timestep < start_time and iterations > 0:
            timestep = arrival(model, timestep, steps)
            if adain:
                latents = with_statistics(latents, [noised(model, style, timestep, generator) for style in styles])
            references = [noised(model, style, timestep, generator) for style in styles]
            noised_content = None if content is None else noised(model, content, timestep, generator)
            latents, loss = descend(
                model, latents, timestep, references, noised_content, content_weight, iterations, learning_rate, mask
            )
        run.losses.append(loss)
        if progress:
            progress(step + 1, loss)
    run.latents, run.picture = latents, model.decode(latents)
    return run


def latent_shape(model, count, size):
    width, height = size
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    return (count, model.network.unet.config.in_channels, height // factor, width // factor)


def arrival(model, timestep, steps):
    """What the DDIM step of a timestep arrives at."""
    return max(timestep - model.scheduler.config.num_train_timesteps // steps, 0)


@torch.no_grad()
def predict(model, latents, timestep, condition, guidance, control):
    """The noise prediction with classifier-free guidance; the negative prompts are the batch's first half."""
    guided = guidance > 1
    if guided:
        latents = torch.cat([latents, latents])
    residuals = control.residuals(latents, timestep, condition) if control else (None, None)
    if guided and control and control.network.config.global_pool_conditions:
        down, middle = residuals
        for part in (*down, middle):
            part[: len(part) // 2] = 0
    prediction = model.network.predict(latents, timestep, condition, residuals)
    if not guided:
        return prediction
    negative, positive = prediction.chunk(2)
    return negative + guidance * (positive - negative)


def drawn(model, shape, generator):
    """Noise, always f32 and from the CPU, so that a seed means the same on each device."""
    return torch.randn(shape, generator=generator).to(model.network.device)


def noised(model, latents, timestep, generator):
    noise = drawn(model, latents.shape, generator)
    return model.scheduler.add_noise(latents, noise, torch.tensor([timestep]))


def with_statistics(latents, styles, most=math.inf):
    """The latents with the mean and deviation, in each channel, of all styles taken together; none grows beyond `most` times itself."""
    pooled = torch.cat([style.transpose(0, 1).flatten(1) for style in styles], dim=1)
    target_mean, target_std = (value[:, None, None] for value in (pooled.mean(1), pooled.std(1)))
    # Each picture's own; torch's deviation is the unbiased one.
    mean, std = latents.mean((2, 3), keepdim=True), latents.std((2, 3), keepdim=True)
    std = std + 1e-6
    return (latents - mean) / std * torch.minimum(target_std, std * most) + target_mean


def descend(model, latents, timestep, styles, content, content_weight, iterations, learning_rate, mask=None):
    """Moves the latents towards the references, with an Adam that remembers nothing of other timesteps."""
    with torch.no_grad():
        style_features = [model.features(style, timestep) for style in styles]
        content_features = None if content is None else model.features(content, timestep)
    latents = latents.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=learning_rate)
    for _ in range(iterations):
        # The latents as they are: at this timestep, noise is part of them.
        picture = model.features(latents, timestep)
        loss = ad_loss(picture, style_features, mask=mask)
        if content is not None:
            loss = loss + content_weight * content_loss(picture, content_features)
        model.network.descend(optimizer, loss)
    return latents.detach(), loss.item()
