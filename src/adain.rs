//! Adaptive instance normalisation (Huang and Belongie 2017): a picture's latents get the mean and spread of its styles'.

use crate::scalar::WithNumber;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// Added to the picture's own deviations, which may be 0.
const EPSILON: f64 = 1e-6;

/// `(z - mean(z)) / (std(z) + 1e-6) * std(s) + mean(s)`, channel by channel.
///
/// `latents` are `(batch, channels, height, width)`, or `(batch, tokens, channels)` as flow transformers pack them. The
/// statistics of each picture are its own; those of the styles are over all of their pixels together, whatever their sizes.
/// A style of batch 1 serves every picture, else there is one for each. Deviations are unbiased (divided by n - 1).
///
/// # Errors
/// No style; another number of axes, channels or pictures; a picture or styles of one pixel, which have no deviation.
pub fn adain(latents: &Tensor, styles: &[Tensor]) -> Result<Tensor> {
    let ours = by_channel("latents", latents)?;
    let (batch, channels, _) = ours.size3()?;
    let parts = styles.iter().map(|style| {
        let theirs = by_channel("style", style)?;
        match theirs.size3()? {
            (b, c, _) if c == channels && (b == 1 || b == batch) && style.dim() == latents.dim() => Ok(theirs.f_expand([batch, -1, -1], false)?),
            _ => Err(Error::shape("style", format!("as {:?}, in a batch of 1 or {batch}", latents.size()), style.size())),
        }
    });
    let parts = parts.collect::<Result<Vec<_>>>()?;
    if parts.is_empty() {
        return Err(Error::argument("styles", "AdaIN needs at least one"));
    }
    let (mean, deviation) = statistics("latents", &ours)?;
    let (to_mean, to_deviation) = statistics("style", &Tensor::f_cat(&parts, 2)?)?;
    let moved = ours.f_sub(&mean)?.f_div(&deviation.plus(EPSILON)?)?.f_mul(&to_deviation)?.f_add(&to_mean)?;
    let moved = if latents.dim() == 3 { moved.f_transpose(1, 2)? } else { moved };
    Ok(moved.f_reshape(latents.size())?)
}

/// `(batch, channels, pixels)`.
fn by_channel(name: &'static str, latents: &Tensor) -> Result<Tensor> {
    let latents = latents.f_to_kind(Kind::Float)?;
    match latents.dim() {
        3 => Ok(latents.f_transpose(1, 2)?),
        4 => Ok(latents.f_flatten(2, 3)?),
        _ => Err(Error::shape(name, "(batch, channels, height, width) or (batch, tokens, channels)", latents.size())),
    }
}

/// Mean and unbiased deviation over the last axis.
fn statistics(name: &'static str, x: &Tensor) -> Result<(Tensor, Tensor)> {
    let count = x.size3()?.2;
    if count < 2 {
        return Err(Error::shape(name, "at least two pixels, or there is no deviation", x.size()));
    }
    let mean = x.f_mean_dim(&[-1_i64][..], true, Kind::Float)?;
    let deviation = x.f_sub(&mean)?.f_square()?.f_sum_dim_intlist(&[-1_i64][..], true, Kind::Float)?.over((count - 1) as f64)?.f_sqrt()?;
    Ok((mean, deviation))
}
