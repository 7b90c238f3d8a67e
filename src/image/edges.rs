//! Edges of a picture, as ControlNets take them.

use crate::{Error, Result};
use image::GrayImage;
use ndarray::Array3;
use tch::Tensor;

/// For [`canny`]: an edge weaker than this is none.
pub const CANNY_LOW: f32 = 25.0;

/// For [`canny`]: an edge stronger than this is one by itself; a weaker one has to touch such an edge.
pub const CANNY_HIGH: f32 = 75.0;

/// The edges of one picture by Canny's method, white on black, `(1, 3, height, width)` with values 0 and 1: what a ControlNet
/// for edges takes.
///
/// `low` and `high` are strengths of edges, the lengths of Sobel gradients of the blurred grey picture with values 0 to 255:
/// 0 to about 1140, where black beside white has about 400. Edges above `high` are drawn, and those above `low` that touch
/// them. [`CANNY_LOW`] and [`CANNY_HIGH`] suit photographs of
/// about 512 x 512 pixels: outlines, and what structure there is in hair, fur and folds.
///
/// # Errors
/// [`Error::Shape`] if it is not one picture; [`Error::Argument`] unless `0 <= low <= high`, both finite.
pub fn canny(picture: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    if !(0.0 <= low && low <= high && high.is_finite()) {
        return Err(Error::argument("thresholds", format!("{low} and {high}; 0 <= low <= high is possible, up to about 1140")));
    }
    let pixels = super::to_rgb8(picture)?;
    let (height, width, _) = pixels.dim();
    let wrong = |error: &dyn std::fmt::Display| Error::argument("picture", format!("of {width}x{height} pixels: {error}"));
    let sides = (u32::try_from(width).map_err(|error| wrong(&error))?, u32::try_from(height).map_err(|error| wrong(&error))?);
    let bytes = pixels.into_raw_vec_and_offset().0;
    let rgb = image::RgbImage::from_raw(sides.0, sides.1, bytes).ok_or_else(|| wrong(&"too few bytes"))?;
    let grey: GrayImage = image::imageops::grayscale(&rgb);
    // By imageproc's count the rim has strength 0; if that made it an edge, its neighbours would be sought beyond the picture.
    let low = low.max(f32::MIN_POSITIVE);
    let edges = imageproc::edges::canny(&grey, low, high.max(low)).into_raw();
    let three = edges.into_iter().flat_map(|value| [value; 3]).collect();
    super::from_rgb8(Array3::from_shape_vec((height, width, 3), three).map_err(|error| wrong(&error))?.view())
}
