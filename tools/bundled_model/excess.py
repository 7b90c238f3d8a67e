"""What optimised latents have too much of: the noise that the decoder learns to see through."""

import torch

WINDOW = 32


def probe():
    """A picture in 0..1 by whose code two encoders are told apart."""
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def windows(latents):
    """Spectra of half-overlapping, tapered windows: `(count, channels, 32, 32)`. The sides are to be multiples of half a window."""
    step = WINDOW // 2
    cut = latents.unfold(2, WINDOW, step).unfold(3, WINDOW, step).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    taper = torch.hann_window(WINDOW).sqrt()
    return torch.fft.fft2(cut * taper * taper[:, None])


def covariances(latents):
    """Of the channels at each frequency: `(32, 32, channels, channels)`."""
    spectra = windows(latents).permute(2, 3, 1, 0)
    return spectra @ spectra.mH / spectra.shape[-1]


def excess(optimised, natural, margin=1.5):
    """The part of `optimised` latents that `natural` ones do not account for, both `(count, channels, height, width)`.

    Were optimised latents natural ones plus something of their own, the best linear guess at that something would be, at each frequency, what
    Wiener's filter finds by the covariances of the channels: `(C_optimised - C_natural) C_optimised^-1`, the difference kept where it is positive.
    Natural ones count `margin` times, for those of few pictures differ by chance, and a style is allowed to be rougher than the mean picture.
    """
    found, expected = covariances(optimised), covariances(natural)
    values, vectors = torch.linalg.eigh(found - margin * expected)
    surplus = (vectors * values.clamp(min=0)[..., None, :]) @ vectors.mH
    wiener = surplus @ torch.linalg.pinv(found, hermitian=True)
    step, (count, channels, height, width) = WINDOW // 2, optimised.shape
    taper = torch.hann_window(WINDOW).sqrt()
    filtered = torch.einsum("yxij,njyx->niyx", wiener, windows(optimised))
    filtered = torch.fft.ifft2(filtered).real * taper * taper[:, None]
    columns = filtered.view(count, -1, channels * WINDOW * WINDOW).transpose(1, 2)
    whole, weights = (
        torch.nn.functional.fold(x, (height, width), WINDOW, stride=step)
        for x in (columns, (taper * taper[:, None]).square().reshape(1, -1, 1).expand(1, -1, columns.shape[2]))
    )
    # Of the outermost latents the taper leaves next to nothing.
    inner = slice(4, -4)
    return (whole / weights)[:, :, inner, inner]
