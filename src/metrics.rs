//! How alike two pictures are, in numbers that need no network.
//!
//! | question | function | best | unit |
//! |---|---|---|---|
//! | Is it the same texture, wherever its parts lie? | [`patch_distance`], [`patch_distance_by_region`] | 0 | picture values, 0 to 1 |
//! | Are these the same colours? | [`colour_distance`], [`colour_distance_by_region`] | 0 | picture values, 0 to 1 |
//! | Is the layout the same? | [`ms_ssim`] | 1 | none |
//! | Is every pixel the same? | [`psnr`] | infinite | decibels |
//! | Does it tile without a seam? | [`seam_ratio`] | about 1 | none |
//!
//! Every picture here is one `(1, 3, height, width)` of a floating kind, finite, with values 0 to 1 (others are taken as they
//! are); gradients are not followed. The work is done on the device of the first picture, which the others are moved to, in f32
//! with sums in f64. What is random comes from a [`Noise::seeded`](crate::Noise::seeded) of its own: equal input gives equal numbers.
//!
//! # Sliced Wasserstein distances
//! A texture is taken for the set of its patches, a palette for the set of its colours: points with `d` coordinates. Along a
//! direction `u`, a vector of length 1, the points of a picture are plain numbers, and the distance of two such sets of numbers has a
//! closed form over their quantile functions `F` (the sorted numbers, each as wide as its share of them):
//!
//! `W(u)^2 = integral over q from 0 to 1 of (F_a(q) - F_b(q))^2`.
//!
//! Where both have equally many points, that is the mean squared difference of the sorted numbers; where they have not, the
//! integral is still taken exactly, over the steps of both functions. The distance is
//!
//! `D = sqrt(mean over the directions u of W(u)^2)`.
//!
//! Directions are drawn in orthonormal sets of up to `d` (the factor Q of a matrix of normal noise), each uniform on the sphere.
//! `D` is then a root mean square per coordinate: black to white is 1, equal sets have 0. If the number of directions is a multiple of
//! `d`, it is exact for two sets that are moved against one another, but otherwise equal (the root mean square of the move), and never
//! more than `W / sqrt d` with the distance `W` of the sets themselves; with other numbers both hold on average over the seeds.
//!
//! Of an ordinary picture's patches, the coarse colours weigh more than the fine strokes: compare distances to one reference
//! with each other, scale by scale, rather than with 0.

mod regions;
mod seam;
mod sliced;
mod ssim;

pub use regions::{colour_distance_by_region, patch_distance_by_region};
pub use seam::{seam_ratio, SeamRatio};
pub use sliced::{colour_distance, patch_distance, PatchConfig, PatchDistance};
pub use ssim::ms_ssim;

use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Peak signal-to-noise ratio of two pictures of equal size, in decibels: `-10 log10(mean((a - b)^2))` over pixels and channels,
/// for a peak of 1. Infinite for equal pictures; 20 dB is an error of 0.1 in every pixel, each halving of the error adds 6.02 dB.
///
/// # Errors
/// [`Error::Shape`] for what is not one picture each, or for two sizes; [`Error::Argument`] for pixels that are not finite.
pub fn psnr(picture: &Tensor, reference: &Tensor) -> Result<f64> {
    let (picture, reference) = pair_of_one_size(picture, reference)?;
    let mean = picture.f_sub(&reference)?.f_square()?.f_mean(Kind::Double)?.f_double_value(&[])?;
    Ok(-10.0 * mean.log10())
}

/// Both in f32 on the first one's device.
fn pair(picture: &Tensor, reference: &Tensor) -> Result<(Tensor, Tensor)> {
    let device = picture.device();
    Ok((sound("picture", picture, device)?, sound("reference", reference, device)?))
}

fn pair_of_one_size(picture: &Tensor, reference: &Tensor) -> Result<(Tensor, Tensor)> {
    let (picture, reference) = pair(picture, reference)?;
    if picture.size() != reference.size() {
        let expected = format!("{:?}, as the picture it is compared with; `image::resize` makes it so", picture.size());
        return Err(Error::shape("reference", expected, reference.size()));
    }
    Ok((picture, reference))
}

/// One picture, in f32, all of it finite.
fn sound(name: &'static str, picture: &Tensor, device: Device) -> Result<Tensor> {
    match picture.size().as_slice() {
        [1, 3, height, width] if *height > 0 && *width > 0 => {}
        other => return Err(Error::shape(name, "(1, 3, height, width) with sides of at least 1", other.to_vec())),
    }
    let kind = picture.f_kind()?;
    if !matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
        return Err(Error::argument(name, format!("is of kind {kind:?}; pictures are floating, with values 0 to 1")));
    }
    let picture = picture.f_detach()?.f_to_device(device)?.f_to_kind(Kind::Float)?;
    if picture.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
        return Err(Error::argument(name, "has pixels that are infinite or not a number"));
    }
    Ok(picture)
}

/// Half as high and wide, means of 2 x 2 pixels; a last odd row or column is left out.
fn halved(picture: &Tensor) -> Result<Tensor> {
    Ok(picture.f_avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None)?)
}
