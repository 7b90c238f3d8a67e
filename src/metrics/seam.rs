//! Whether a picture tiles.

use crate::{Error, Result};
use tch::{Kind, Tensor};

/// What [`seam_ratio`] gives.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct SeamRatio {
    /// Where the right border meets the left one.
    pub x: f64,
    /// Where the bottom meets the top.
    pub y: f64,
}

/// How visible the seams are between copies of the picture laid side by side (`x`) and one below the other (`y`):
///
/// `x = mean(abs(p[.., 0] - p[.., width - 1])) / mean over i of mean(abs(p[.., i + 1] - p[.., i]))`,
///
/// `y` the same with rows. About 1 where the border is a pair of neighbours like any other, above where it can be seen; a picture that
/// does not change in that direction has 1.
///
/// # Errors
/// [`Error::Shape`] for what is not one picture; [`Error::Argument`] for a side of 1 pixel, which has no inside, or for pixels that are
/// not finite.
pub fn seam_ratio(picture: &Tensor) -> Result<SeamRatio> {
    let picture = super::sound("picture", picture, picture.device())?;
    Ok(SeamRatio { x: ratio(&picture, 3)?, y: ratio(&picture, 2)? })
}

fn ratio(picture: &Tensor, dim: i64) -> Result<f64> {
    let (_, _, height, width) = picture.size4()?;
    let length = if dim == 3 { width } else { height };
    if length < 2 {
        return Err(Error::argument("picture", format!("is of {width}x{height} pixels; a seam needs sides of at least 2")));
    }
    let apart = |a: i64, b: i64, count: i64| -> Result<f64> {
        let difference = picture.f_narrow(dim, a, count)?.f_sub(&picture.f_narrow(dim, b, count)?)?;
        Ok(difference.f_abs()?.f_mean(Kind::Double)?.f_double_value(&[])?)
    };
    let inside = apart(1, 0, length - 1)?;
    // Without any change inside, first and last are equal, too.
    Ok(if inside == 0.0 { 1.0 } else { apart(0, length - 1, 1)? / inside })
}
