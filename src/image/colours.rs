//! Colours of one picture for another, on pixels: to keep a photograph's own in a style's strokes.

use super::size;
use crate::scalar::WithNumber;
use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Added to the variances, so that a grey picture has some along all axes.
const EPSILON: f64 = 1e-6;

/// How many times colours may be stretched. Without a bound the noise of a grey picture would become colours.
const WIDEST: f64 = 4.0;

/// The luminance of ITU-R BT.601, of which JPEG's YCbCr is made.
const LUMINANCE: [f32; 3] = [0.299, 0.587, 0.114];

/// A picture with the mean and the covariance of another's colours, by the linear map that moves colours the least (Monge and Kantorovich's;
/// Pitie and Kokaram 2007): `A (x - mean(x)) + mean(y)`, `A = Sx^-1/2 (Sx^1/2 Sy Sx^1/2)^1/2 Sx^-1/2`, of the covariances `Sx` and `Sy` of RGB.
/// The map stretches nothing more than four times; where that binds, as for a picture that is nearly grey, the covariance is not reached. What
/// then lies outside of 0 to 1 is cut off.
///
/// Given to the *style* before a run, with the content's colours, it takes colour out of the style, and strokes and texture remain.
/// `colours` is one picture for all of the batch, or one for each; sizes may differ.
///
/// # Errors
/// [`Error::Shape`] for what is not a picture, and another number of them; [`Error::Argument`] for values that are infinite or NaN.
pub fn match_colours(picture: &Tensor, colours: &Tensor) -> Result<Tensor> {
    serves(picture, colours)?;
    let (picture, colours) = (picture.f_detach()?.f_to_kind(Kind::Float)?, colours.f_detach()?.f_to_kind(Kind::Float)?);
    let (own, wanted) = (Statistics::of("picture", &picture)?, Statistics::of("colours", &colours)?);
    let (root, inverse) = (change(&own.covariance, f64::sqrt)?, change(&own.covariance, |variance| 1.0 / variance.sqrt())?);
    let middle = change(&root.f_matmul(&wanted.covariance)?.f_matmul(&root)?, f64::sqrt)?;
    let map = change(&inverse.f_matmul(&middle)?.f_matmul(&inverse)?, |times| times.min(WIDEST))?;
    let map = map.f_to_kind(Kind::Float)?.f_to_device(picture.device())?;
    let moved = map.f_matmul(&own.around)?.f_add(&wanted.mean.f_to_device(picture.device())?)?;
    moved.f_view(picture.size().as_slice())?.within(0.0, 1.0)
}

/// A picture's luminance with the chroma of another of its size: each pixel of `colours`, moved along grey until its luminance (BT.601) is the
/// picture's, which leaves its Cb and Cr. What then lies outside of 0 to 1 is cut off.
///
/// Given a *result* and the content, it puts the content's colours back in their places, and lightness alone is the style's.
/// `colours` is one picture for all of the batch, or one for each. A pixel that is NaN in either is NaN.
///
/// # Errors
/// [`Error::Shape`] for what is not a picture, for another size, and another number of them.
pub fn match_chroma(picture: &Tensor, colours: &Tensor) -> Result<Tensor> {
    serves(picture, colours)?;
    let (height, width) = size(picture)?;
    if size(colours)? != (height, width) {
        return Err(Error::shape("colours", format!("(.., 3, {height}, {width}) as the picture"), colours.size()));
    }
    let (picture, colours) = (picture.f_detach()?.f_to_kind(Kind::Float)?, colours.f_detach()?.f_to_kind(Kind::Float)?);
    let colours = colours.f_to_device(picture.device())?;
    let weights = Tensor::f_from_slice(&LUMINANCE)?.f_view([1, 3, 1, 1])?.f_to_device(picture.device())?;
    let luminance = |x: &Tensor| -> Result<Tensor> { Ok(x.f_mul(&weights)?.f_sum_dim_intlist(1, true, Kind::Float)?) };
    colours.f_add(&luminance(&picture)?.f_sub(&luminance(&colours)?)?)?.within(0.0, 1.0)
}

/// Whether both are pictures, and the one of colours serves the other's batch.
fn serves(picture: &Tensor, colours: &Tensor) -> Result<()> {
    size(picture)?;
    let (batch, ..) = picture.size4()?;
    match colours.size().as_slice() {
        &[own, 3, height, width] if (own == 1 || own == batch) && height > 0 && width > 0 => Ok(()),
        other => Err(Error::shape("colours", format!("a picture (1 or {batch}, 3, height, width)"), other.to_vec())),
    }
}

struct Statistics {
    /// The pixels around their mean, `(batch, 3, pixels)`.
    around: Tensor,
    /// `(batch, 3, 1)`.
    mean: Tensor,
    /// `(batch, 3, 3)`, in f64 on the CPU.
    covariance: Tensor,
}

impl Statistics {
    fn of(name: &'static str, picture: &Tensor) -> Result<Self> {
        let pixels = picture.f_flatten(2, -1)?;
        let mean = pixels.f_mean_dim(Some([2].as_slice()), true, Kind::Float)?;
        let around = pixels.f_sub(&mean)?;
        let count = pixels.size3()?.2;
        let covariance = around.f_matmul(&around.f_transpose(1, 2)?)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.over(count as f64)?;
        if covariance.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Err(Error::argument(name, "has values that are infinite or NaN"));
        }
        let axes = Tensor::f_eye(3, (Kind::Double, Device::Cpu))?.times(EPSILON)?;
        Ok(Self { around, mean, covariance: covariance.f_add(&axes)? })
    }
}

/// A function of symmetric matrices `(batch, 3, 3)`, by their eigenvalues, which are positive but for roundings.
fn change(matrices: &Tensor, function: impl Fn(f64) -> f64) -> Result<Tensor> {
    let (values, vectors) = matrices.f_linalg_eigh("L")?;
    let changed = Vec::<f64>::try_from(values.f_flatten(0, -1)?)?.into_iter().map(|value| function(value.max(f64::MIN_POSITIVE)));
    let changed = Tensor::f_from_slice(&changed.collect::<Vec<_>>())?.f_view(values.size().as_slice())?;
    Ok(vectors.f_mul(&changed.f_unsqueeze(1)?)?.f_matmul(&vectors.f_transpose(1, 2)?)?)
}
