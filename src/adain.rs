//! Adaptive instance normalisation (Huang and Belongie 2017): a picture's latents get the mean and spread of its styles'.

mod regions;

use crate::scalar::WithNumber;
use crate::{Error, References, Result};
use tch::{Kind, Tensor};

/// Added to the picture's own deviations, which may be 0.
const EPSILON: f64 = 1e-6;

/// `(z - mean(z)) / (std(z) + 1e-6) * std(s) + mean(s)`, channel by channel.
///
/// `latents` are `(batch, channels, height, width)`, or `(batch, tokens, channels)` as flow transformers pack them. The
/// statistics of each picture are its own; those of the styles are over all of their pixels together, whatever their sizes.
/// A style of batch 1 serves every picture, else there is one for each. Deviations are unbiased (divided by n - 1).
/// [`References::adain`] is the same with weights and regions.
///
/// # Errors
/// No style; another number of axes, channels or pictures; a picture or styles of one pixel, which have no deviation.
pub fn adain(latents: &Tensor, styles: &[Tensor]) -> Result<Tensor> {
    towards(latents, styles.iter(), f64::INFINITY)
}

impl References {
    /// [`adain`] by the weights of the styles and by regions.
    ///
    /// A style's pixels count as often as its [weight](crate::Style::weight) says: 2 and 1 give the statistics of the first style
    /// listed twice. Weights are taken relative to the smallest.
    ///
    /// Where the picture has [labels](References::labels), each region of it is moved by itself: from its own mean and deviation to
    /// those of the styles' pixels that it sees in the losses, each counted by its weight there (but without the 1e-6 that soft maps
    /// let through). In soft maps a pixel is moved as its areas are, by its share of each. A region that sees fewer than two
    /// pixels takes the statistics of the styles as a whole, and one that has fewer than two pixels is moved as if it had those
    /// of the picture. Where regions and weights change nothing of the losses, as one label throughout, the styles are taken as a whole.
    /// Whether that is so, and which weight is the smallest, is decided for a batch as a whole, where its pictures have maps of their own.
    ///
    /// # Errors
    /// As [`adain`]; weights, labels and matches that do not go together, as in the losses; labels, but latents of tokens, of which
    /// there is no telling what lies where.
    pub fn adain(&self, latents: &Tensor) -> Result<Tensor> {
        self.adain_within(latents, f64::INFINITY)
    }

    /// The same, where no deviation becomes more than `most` times what it was.
    pub(crate) fn adain_within(&self, latents: &Tensor, most: f64) -> Result<Tensor> {
        let tables = self.memo.tables(self)?;
        if tables.plain {
            return towards(latents, self.counted().map(|style| &style.of), most);
        }
        regions::adain(latents, self, &tables, most)
    }

    /// The same of a content, which may serve a batch of so many pictures: where these have styles or regions of their own, it becomes one
    /// for each.
    pub(crate) fn adain_of_content(&self, content: &Tensor, pictures: i64, most: f64) -> Result<Tensor> {
        if content.size().first() != Some(&1) || !self.differ_by_picture()? {
            return self.adain_within(content, most);
        }
        self.adain_within(&content.f_repeat_interleave_self_int(pictures, Some(0), None)?, most)
    }

    fn differ_by_picture(&self) -> Result<bool> {
        for map in self.labels.iter().chain(self.counted().filter_map(|style| style.labels.as_ref())) {
            if map.batch()? > 1 {
                return Ok(true);
            }
        }
        Ok(self.counted().any(|style| style.of.size().first().is_some_and(|&pictures| pictures > 1)))
    }
}

fn towards<'a>(latents: &Tensor, styles: impl Iterator<Item = &'a Tensor>, most: f64) -> Result<Tensor> {
    let ours = by_channel("latents", latents)?;
    let parts = styles.map(|style| of_style(style, latents)).collect::<Result<Vec<_>>>()?;
    if parts.is_empty() {
        return Err(Error::argument("styles", "AdaIN needs at least one"));
    }
    let (mean, deviation) = statistics("latents", &ours)?;
    let (to_mean, to_deviation) = statistics("style", &Tensor::f_cat(&parts, 2)?)?;
    let deviation = deviation.plus(EPSILON)?;
    let moved = ours.f_sub(&mean)?.f_div(&deviation)?.f_mul(&at_most(&to_deviation, &deviation, most)?)?.f_add(&to_mean)?;
    like(&moved, latents)
}

/// `to`, but no more than `most` times `from`.
fn at_most(to: &Tensor, from: &Tensor, most: f64) -> Result<Tensor> {
    Ok(if most.is_finite() { to.f_minimum(&from.times(most)?)? } else { to.shallow_clone() })
}

/// Back from [`by_channel`].
fn like(moved: &Tensor, latents: &Tensor) -> Result<Tensor> {
    let moved = if latents.dim() == 3 { moved.f_transpose(1, 2)? } else { moved.shallow_clone() };
    Ok(moved.f_reshape(latents.size())?)
}

/// [`by_channel`], for each picture.
fn of_style(style: &Tensor, latents: &Tensor) -> Result<Tensor> {
    let (batch, channels, _) = by_channel("latents", latents)?.size3()?;
    let theirs = by_channel("style", style)?;
    match theirs.size3()? {
        (b, c, _) if c == channels && (b == 1 || b == batch) && style.dim() == latents.dim() => Ok(theirs.f_expand([batch, -1, -1], false)?),
        _ => Err(Error::shape("style", format!("as {:?}, in a batch of 1 or {batch}", latents.size()), style.size())),
    }
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
