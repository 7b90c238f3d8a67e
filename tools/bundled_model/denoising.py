"""Noised latents, what the network should say of them, and how far it is from that."""

import itertools
import math

import torch
from diffusers import DDIMScheduler


def scheduler(prediction):
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
    )  # fmt: skip


class Denoising:
    """`min_snr` weights the losses by noise, as Hang et al. 2023 do; None is no weights."""

    def __init__(self, unet, prediction, device="cpu", min_snr=None):
        alphas = scheduler(prediction).alphas_cumprod.to(device)
        self.unet, self.velocity, self.alpha, self.sigma = unet, prediction == "v_prediction", alphas.sqrt(), (1 - alphas).sqrt()
        self.min_snr = min_snr
        self.nothing = torch.zeros(1, 1, unet.config.cross_attention_dim, device=device)

    def parts(self, x, t, noise):
        """The network's answer, the right one, the noised latents, and the two factors of the mixture."""
        a, s = self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        noised = a * x + s * noise
        found = self.unet(noised, t, self.nothing.expand(len(x), -1, -1)).sample
        return found, a * noise - s * x if self.velocity else noise, noised, a, s

    def loss(self, x, t, noise):
        found, wanted, _, a, s = self.parts(x, t, noise)
        error = (found - wanted).square()
        if self.min_snr is None:
            return error.mean()
        snr = (a / s).square()
        return (error * snr.clamp(max=self.min_snr) / (snr + 1 if self.velocity else snr)).mean()

    @torch.no_grad()
    def held_out(self, x):
        """Mean squared errors of the noise and of the velocity that the answers amount to, whatever the network was trained to say;
        over all, and by quarter of t, low t first. The noise and the timesteps are always the same."""
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
        # Strided, so that each quarter of t meets all kinds of pictures; by what shares no factor with their number, or some t would be left out.
        stride = next(stride for stride in itertools.count(7) if math.gcd(stride, len(x)) == 1)
        t = torch.linspace(5, 980, len(x))[(torch.arange(len(x)) * stride) % len(x)].long().to(x.device)
        eps, v = [], []
        for parts in zip(x.split(8), t.split(8), noise.split(8)):
            found, _, noised, a, s = self.parts(*parts)
            error = ((a * found + s * noised if self.velocity else found) - parts[2]).square().mean((1, 2, 3))
            eps.append(error)
            v.append(error / a.flatten().square())
        quarter, result = t // 250, {}
        for name, error in (("eps", torch.cat(eps)), ("v", torch.cat(v))):
            result[name] = round(error.mean().item(), 4)
            result[f"{name}_quarters"] = [round(error[quarter == q].mean().item(), 4) for q in range(4)]
        return result
