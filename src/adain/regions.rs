//! AdaIN where styles have weights, and the picture regions.

use super::{at_most, by_channel, like, of_style, EPSILON};
use crate::bias::{check_batch, seen, Tables};
use crate::scalar::{number, WithNumber};
use crate::{AttentionSite, Error, References, Result};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// What [`References::adain`] does where a region or a weight changes something. Sums are in f64.
pub(super) fn adain(latents: &Tensor, references: &References, tables: &Tables, most: f64) -> Result<Tensor> {
    let ours = by_channel("latents", latents)?.f_to_kind(Kind::Double)?;
    let (batch, _, count) = ours.size3()?;
    check_batch(references, batch)?;
    let device = latents.device();
    let ones = |length: i64| -> Result<Tensor> { Ok(Tensor::f_ones([1, 1, length], (Kind::Double, device))?) };
    let shares = match &references.labels {
        Some(labels) => labels.weights(grid("latents", latents)?, Kind::Double)?.f_to_device(device)?,
        None => ones(count)?,
    };
    let (mut theirs, mut weights, mut whole, mut maps) = (vec![], vec![], vec![], 1);
    let least = references.counted().map(|style| style.weight).fold(f64::INFINITY, f64::min);
    let factors = factors(tables, device)?;
    for ((style, table), factor) in references.counted().zip(&tables.styles).zip(factors) {
        let style_latents = of_style(&style.of, latents)?;
        let (_, _, pixels) = style_latents.size3()?;
        // Without labels it does not matter how they lie.
        let grid = if style.labels.is_some() { grid("style", &style.of)? } else { (1, pixels) };
        let part = seen(style.labels.as_ref(), &table.dense(Kind::Double, device)?.f_mul(&factor)?, &AttentionSite::self_attention(0, grid), pixels)?;
        maps = part.size3()?.0.max(maps);
        weights.push(part);
        whole.push(ones(pixels)?.times(style.weight / least)?);
        theirs.push(style_latents.f_to_kind(Kind::Double)?);
    }
    let weights = weights.iter().map(|part| Ok(part.f_expand([maps, -1, -1], false)?)).collect::<Result<Vec<_>>>()?;
    let (weights, whole, theirs) = (Tensor::f_cat(&weights, 2)?, Tensor::f_cat(&whole, 2)?, Tensor::f_cat(&theirs, 2)?);

    let (mean, deviation) = statistics("latents", &ours, &shares, &ones(count)?)?;
    let (to_mean, to_deviation) = statistics("style", &theirs, &weights, &whole)?;
    // By label, `(1 or batch, labels, channels)`: what a pixel is multiplied with, and what is then added.
    let deviation = deviation.plus(EPSILON)?;
    let factor = at_most(&to_deviation, &deviation, most)?.f_div(&deviation)?;
    let summand = to_mean.f_sub(&mean.f_mul(&factor)?)?;
    let all = shares.f_sum_dim_intlist(&[1_i64][..], true, Kind::Double)?;
    let of_pixels = |by_label: &Tensor| -> Result<Tensor> { Ok(by_label.f_transpose(1, 2)?.f_matmul(&shares)?.f_div(&all)?) };
    let moved = ours.f_mul(&of_pixels(&factor)?)?.f_add(&of_pixels(&summand)?)?;
    // A pixel that belongs to no area stays.
    let moved = moved.f_where_self(&all.f_gt_tensor(&number(0.0)?)?, &ours)?;
    like(&moved.f_to_kind(Kind::Float)?, latents)
}

/// For each style what its table is multiplied with, `(labels of the picture, 1)` in f64: pixels are counted,
/// so for each label the smallest of all weights is to be 1.
fn factors(tables: &Tables, device: Device) -> Result<Vec<Tensor>> {
    let mut least: BTreeMap<usize, f64> = BTreeMap::new();
    for table in &tables.styles {
        for &(row, _, weight) in &table.entries {
            let weight = weight * table.weight;
            least.entry(row).and_modify(|least| *least = least.min(weight)).or_insert(weight);
        }
    }
    let rows = usize::try_from(tables.rows).unwrap_or(0);
    let of_style = |weight: f64| -> Result<Tensor> {
        let factors: Vec<f64> = (0..rows).map(|row| weight / least.get(&row).copied().unwrap_or(1.0)).collect();
        Ok(Tensor::f_from_slice(&factors)?.f_view([-1, 1])?.f_to_device(device)?)
    };
    tables.styles.iter().map(|table| of_style(table.weight)).collect()
}

/// Mean and unbiased deviation of pixels, `(batch, channels, pixels)`, as the `weights`, `(1 or batch, labels, pixels)`, count them:
/// `(batch, labels, channels)`. Where these count fewer than two, as those of the `whole`, `(1, 1, pixels)`, do.
fn statistics(name: &'static str, x: &Tensor, weights: &Tensor, whole: &Tensor) -> Result<(Tensor, Tensor)> {
    if x.size3()?.2 < 2 {
        return Err(Error::shape(name, "at least two pixels, or there is no deviation", x.size()));
    }
    let count = |weights: &Tensor| weights.f_sum_dim_intlist(&[-1_i64][..], true, Kind::Double);
    let few = count(weights)?.f_lt_tensor(&number(2.0)?)?;
    let weights = whole.f_where_self(&few, weights)?;
    let count = count(&weights)?;
    // Moved to 0 before they are squared.
    let middle = x.f_mean_dim(&[-1_i64][..], true, Kind::Double)?;
    let pixels = x.f_sub(&middle)?.f_transpose(1, 2)?;
    let mean = weights.f_matmul(&pixels)?.f_div(&count)?;
    let squares = weights.f_matmul(&pixels.f_square()?)?.f_sub(&mean.f_square()?.f_mul(&count)?)?;
    let variance = squares.f_div(&count.plus(-1.0)?)?;
    let deviation = variance.f_maximum(&variance.f_zeros_like()?)?.f_sqrt()?;
    Ok((mean.f_add(&middle.f_transpose(1, 2)?)?, deviation))
}

fn grid(name: &'static str, latents: &Tensor) -> Result<(i64, i64)> {
    match latents.size().as_slice() {
        &[_, _, height, width] => Ok((height, width)),
        other => Err(Error::shape(name, "(batch, channels, height, width), where it has labels", other.to_vec())),
    }
}
