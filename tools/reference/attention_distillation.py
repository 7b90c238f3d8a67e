"""Attention distillation by optimisation, in plain Python on top of diffusers.

This is what the crate's tests compare themselves with, so it favours being easy
to check over being fast: one forward pass per reference, one forward and one
backward pass for the picture, everything in f32. For timing it can also be run as the
authors run theirs, with bf16 or f16 weights, on a GPU, and without ending passes early
(`run.py`).

    model = Model.open("folder")
    style, content = model.encode(style_picture), model.encode(content_picture)
    run = optimise(model, content.clone(), [style], content, content_weight=0.25, steps=100)
    picture = model.decode(run.latents)

Pictures are (B, 3, H, W) in 0..1.
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


class Layer(NamedTuple):
    """One self-attention layer, every tensor (batch, heads, tokens, head_dim)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


class Stopped(Exception):
    """All wanted layers are recorded: the rest of the pass would be thrown away."""


class Recorder:
    """Shared by all attention layers of a network: counts them and keeps some."""

    def __init__(self):
        self.begin(range(0))

    def begin(self, wanted, stop=False):
        self.wanted, self.stop, self.count, self.layers = wanted, stop, 0, []

    def add(self, layer):
        if self.count in self.wanted:
            self.layers.append(layer)
        self.count += 1
        if self.stop and len(self.layers) == len(self.wanted):
            raise Stopped


class RecordedAttention:
    """An attention processor for diffusers; cross-attention passes by unrecorded."""

    def __init__(self, recorder):
        self.recorder = recorder

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key, value = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        output = F.scaled_dot_product_attention(query, key, value)
        if encoder_hidden_states is None:
            self.recorder.add(Layer(query, key, value, output))
        projection, dropout = attn.to_out
        return dropout(projection(output.transpose(1, 2).flatten(2)))


def expanded(condition, batch):
    """A condition as diffusers' networks take it."""
    extra = None
    if isinstance(condition, dict):
        extra = {"text_embeds": condition["pooled"].expand(batch, -1), "time_ids": condition["time_ids"].expand(batch, -1)}
        condition = condition["text"]
    return {"encoder_hidden_states": condition.expand(batch, -1, -1), "added_cond_kwargs": extra}


class Network:
    """A UNet whose self-attention layers can be looked at."""

    stop_early = True
    """Whether a look at the features ends the pass after the last of them; the authors' goes on to the end."""
    autocast = True
    """For weights that are not f32: whether passes run under autocast, as they do where accelerate has prepared the
    network, or on latents cast to the weights' type."""

    def __init__(self, unet, device="cpu", dtype=torch.float32):
        self.unet = unet.to(device, dtype).eval().requires_grad_(False)
        self.device, self.dtype = torch.device(device), dtype
        # f16 gradients are too small without it; for other types it does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.recorder = Recorder()
        unet.set_attn_processor({name: RecordedAttention(self.recorder) for name in unet.attn_processors})
        self.layer_count = sum(".attn1." in name for name in unet.attn_processors)

    @classmethod
    def open(cls, folder, device="cpu", dtype=torch.float32):
        return cls(load(UNet2DConditionModel, folder, dtype), device, dtype)

    def last(self, count=6):
        return range(self.layer_count - count, self.layer_count)

    def predict(self, latents, timestep, condition, residuals=(None, None)):
        """The noise prediction. `condition` is the text, or a dict with `text`, `pooled` and `time_ids`.

        `residuals` are a ControlNet's: the list for the way down, and the one for the middle.
        """
        down, middle = residuals
        mixed = self.dtype != torch.float32
        if mixed and not self.autocast:
            latents = latents.to(self.dtype)
        if not torch.is_tensor(timestep):
            # A number would have to be copied to a GPU, and the copy waited for, in each pass.
            timestep = torch.full((1,), timestep, device=latents.device)
        with torch.autocast(self.device.type, self.dtype, enabled=mixed and self.autocast):
            prediction = self.unet(
                latents,
                timestep,
                **expanded(condition, latents.shape[0]),
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
        return prediction.float()

    def features(self, latents, timestep, condition, layers):
        self.recorder.begin(layers, stop=self.stop_early)
        try:
            self.predict(latents, timestep, condition)
        except Stopped:
            pass
        found = self.recorder.layers
        assert len(found) == len(layers), f"{len(found)} of {len(layers)} layers found"
        # Also because the backward pass of a checkpointed network goes through its layers again.
        self.recorder.begin(range(0))
        return found

    def descend(self, optimizer, loss):
        """One step of the optimizer down a loss."""
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def load(kind, folder, dtype=torch.float32):
    """One of diffusers' networks, with its weights as `dtype`."""
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    # Two loaders with the same outcome. The plain one is faster for small files; the other one, which needs accelerate and
    # is what diffusers takes by itself then, does not first fill the network with random numbers in f32.
    saving = size > 1 << 28 and importlib.util.find_spec("accelerate") is not None
    return kind.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=saving)


LIKE_SHARPNESS = 3.0
"""How much more sharply than the network itself the content looks for its like, in smoothing."""


def ad_loss(picture, styles, sharpness=1.0, mask=None, content=None, smoothing=0.0):
    """How far each layer's output is from what it would be, were the picture made of the styles.

    Every token of the picture attends to the tokens of all styles, unless `mask` has something to say: it is given the
    number of the picture's tokens and a list of the styles', and makes an attention mask (see `textures.py`).
    `smoothing`, which the authors' procedure does not have, draws queries towards the mean of those of places that are alike in `content`.
    """
    total = 0.0
    for index, layer in enumerate(picture):
        with torch.no_grad():
            batch = layer.query.shape[0]
            key, value = (
                torch.cat([getattr(style[index], part).expand(batch, -1, -1, -1) for style in styles], dim=2)
                for part in ("key", "value")
            )
            seen = mask and mask(layer.query.shape[2], [style[index].key.shape[2] for style in styles])
            query = layer.query
            if smoothing and content is not None:
                like = content[index]
                mean = F.scaled_dot_product_attention(LIKE_SHARPNESS * like.query, like.key, query)
                query = torch.lerp(query, mean, smoothing)
            ideal = F.scaled_dot_product_attention(sharpness * query, key, value, attn_mask=seen)
        total = total + (layer.output - ideal).abs().mean()
    return total


def content_loss(picture, content):
    """How far the queries, which carry the layout, are from the content's."""
    return sum((layer.query - other.query.detach()).abs().mean() for layer, other in zip(picture, content, strict=True))


@dataclass
class Model:
    """A folder in diffusers layout."""

    network: Network
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    null: torch.Tensor
    layers: range

    @classmethod
    def open(cls, folder, layers=None, device="cpu", dtype=torch.float32):
        folder = Path(folder)
        network = Network.open(folder / "unet", device, dtype)
        vae = open_vae(folder, device, dtype)
        # Whichever solver the folder names, its settings describe a DDIM schedule too.
        scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler"))
        if (folder / "text_encoder").is_dir():
            null = encode_prompt(folder, "", device, dtype)
        else:
            null = torch.zeros(1, 1, network.unet.config.cross_attention_dim, device=device, dtype=dtype)
        return cls(network, vae, scheduler, null, layers or network.last())

    def timesteps(self, steps):
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps.tolist()

    def features(self, latents, timestep):
        return self.network.features(latents, timestep, self.null, self.layers)

    @torch.no_grad()
    def encode(self, picture):
        return encode(self.vae, picture * 2 - 1)

    @torch.no_grad()
    def decode(self, latents):
        return (decode(self.vae, latents) / 2 + 0.5).clamp(0, 1)


def open_vae(folder, device="cpu", dtype=torch.float32):
    return load(AutoencoderKL, Path(folder) / "vae", dtype).to(device).eval().requires_grad_(False)


def encode(vae, pixels):
    """Pixels in -1..1 to latents at the network's scale: the posterior's mean, no draw."""
    mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode(vae, latents):
    """The other way; values may lie outside -1..1."""
    scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(scaled.to(vae.device, vae.dtype)).sample.float()


def encode_prompt(folder, prompt, device="cpu", dtype=torch.float32):
    # Here, because a folder without text encoder needs none of transformers.
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(Path(folder) / "text_encoder", torch_dtype=dtype).to(device).eval()
    ids = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return encoder(ids.to(device)).last_hidden_state


@dataclass
class Run:
    latents: torch.Tensor
    losses: list = field(default_factory=list)
    """Of each step's last iteration, before its update."""


def optimise(
    model,
    start,
    styles,
    content=None,
    content_weight=0.0,
    steps=100,
    iterations=1,
    learning_rate=0.05,
    mask=None,
    progress=None,
    smoothing=0.0,
):
    """Moves `start` towards the styles, one timestep after the other; all arguments are latents.

    `progress` is called with the steps done and their last loss, first with 0 and none.
    """
    latents = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=learning_rate)
    run = Run(latents.detach())
    if progress:
        progress(0, None)
    for step, timestep in enumerate(model.timesteps(steps)):
        with torch.no_grad():
            # Clean references: the timestep only tells the network where to look.
            style_features = [model.features(style, timestep) for style in styles]
            content_features = model.features(content, timestep) if content is not None and (content_weight or smoothing) else None
        for _ in range(iterations):
            picture = model.features(latents, timestep)
            loss = ad_loss(picture, style_features, mask=mask, content=content_features, smoothing=smoothing)
            if content_weight:
                loss = loss + content_weight * content_loss(picture, content_features)
            model.network.descend(optimizer, loss)
        run.losses.append(loss.item())
        if progress:
            progress(step + 1, run.losses[-1])
    return run
