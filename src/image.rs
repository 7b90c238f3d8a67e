//! Pictures in and out: files, tensors, ndarray, contact sheets.
//!
//! A picture is a tensor `(batch, 3, height, width)` in f32, RGB, values 0 to 1, sRGB as stored.

mod array;
mod colours;
#[cfg(feature = "stable-diffusion")]
mod edges;
mod file;
mod jpeg;

pub use array::{from_array, from_rgb8, to_array, to_rgb8};
pub use colours::{match_chroma, match_colours};
#[cfg(feature = "stable-diffusion")]
pub use edges::{canny, CANNY_HIGH, CANNY_LOW};
pub use file::{check_writable, load, save};

use crate::scalar::WithNumber;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// Longest side of a picture, in pixels.
pub const LONGEST_SIDE: i64 = 32_768;

/// Most pixels of a picture: a 16384 x 16384 canvas.
pub const MOST_PIXELS: i64 = 268_435_456;

/// `(height, width)` in pixels.
///
/// # Errors
/// [`Error::Shape`] if it is not a picture.
pub fn size(picture: &Tensor) -> Result<(i64, i64)> {
    match picture.size().as_slice() {
        &[batch, 3, height, width] if batch > 0 && height > 0 && width > 0 => Ok((height, width)),
        other => Err(Error::shape("picture", "(batch, 3, height, width) with sides of at least 1", other.to_vec())),
    }
}

/// Whether values are a picture's. Resizing and networks overshoot 0 to 1 a little; bytes do by far.
#[cfg(feature = "stable-diffusion")]
pub(crate) fn check_values(picture: &Tensor) -> Result<()> {
    let values = picture.f_to_kind(Kind::Float)?;
    let (least, most) = (values.f_min()?.f_double_value(&[])?, values.f_max()?.f_double_value(&[])?);
    if (-1.0..=2.0).contains(&least) && (-1.0..=2.0).contains(&most) {
        return Ok(());
    }
    let reason = if least.is_nan() || most.is_nan() {
        "has NaN in it".to_owned()
    } else {
        let bytes = if most > 2.0 { "; bytes are to be divided by 255" } else { "" };
        format!("has values from {least} to {most} where 0 to 1 are expected{bytes}")
    };
    Err(Error::argument("picture", reason))
}

/// Checks a size that a user asks for, `(height, width)` in pixels.
///
/// # Errors
/// A side of 0 or less, or a picture too large to mean it.
pub fn check_size((height, width): (i64, i64)) -> Result<()> {
    if height < 1 || width < 1 {
        return Err(Error::argument("size", format!("{width}x{height} is empty; both sides must be at least 1 pixel")));
    }
    if height > LONGEST_SIDE || width > LONGEST_SIDE || height.saturating_mul(width) > MOST_PIXELS {
        return Err(Error::argument(
            "size",
            format!("{width}x{height} is too large; sides of at most {LONGEST_SIDE} and {MOST_PIXELS} pixels in all are possible"),
        ));
    }
    Ok(())
}

/// Scaled to `(height, width)` pixels, bicubic and antialiased. A picture of that size is returned untouched.
///
/// # Errors
/// [`Error::Argument`] for an empty or absurd size; [`Error::Shape`] for what is not a picture.
pub fn resize(picture: &Tensor, (height, width): (i64, i64)) -> Result<Tensor> {
    check_size((height, width))?;
    if size(picture)? == (height, width) {
        return Ok(picture.shallow_clone());
    }
    // Bicubic overshoots at edges.
    picture.f_to_kind(Kind::Float)?.f_internal_upsample_bicubic2d_aa([height, width], false, None, None)?.within(0.0, 1.0)
}

/// The size with about `area` pixels that keeps the aspect ratio of `(height, width)`, sides multiples of `multiple`.
///
/// # Errors
/// As [`check_size`]; a multiple below 1.
pub fn size_of_area((height, width): (i64, i64), area: i64, multiple: i64) -> Result<(i64, i64)> {
    check_size((height, width))?;
    if multiple < 1 {
        return Err(Error::argument("multiple", format!("{multiple} is not at least 1")));
    }
    if area < 1 {
        return Err(Error::argument("area", format!("{area} is not at least 1")));
    }
    let scale = (area as f64 / (height as f64 * width as f64)).sqrt();
    let side = |length: i64| ((length as f64 * scale / multiple as f64).round() as i64).max(1).saturating_mul(multiple);
    let size = (side(height), side(width));
    check_size(size)?;
    Ok(size)
}

/// A file, scaled to about `area` pixels with its aspect ratio kept, sides multiples of 8 and at least 8, which Stable Diffusion can
/// take; a thin picture has more pixels than asked for.
///
/// # Errors
/// As [`load`] and [`size_of_area`].
pub fn load_to_area(path: impl AsRef<std::path::Path>, area: i64) -> Result<Tensor> {
    let picture = load(path)?;
    resize(&picture, size_of_area(size(&picture)?, area, 8)?)
}

/// How many times as wide as the sheet's height a picture may lie in it; a strip could make it of any width.
const WIDEST: i64 = 4;

/// Pictures side by side, 8 white pixels between them, scaled to the height of the last; strips that would be wider than that, and wider than four
/// times the height, to the larger of the two widths, with white below.
///
/// # Errors
/// No pictures; as [`resize`].
pub fn sheet(pictures: &[&Tensor]) -> Result<Tensor> {
    let last = pictures.last().ok_or_else(|| Error::argument("pictures", "a sheet needs at least one"))?;
    let (height, last) = size(last)?;
    let widest = height.saturating_mul(WIDEST).max(last);
    let white = |height: i64, width: i64| Tensor::f_ones([1, 3, height, width], (Kind::Float, tch::Device::Cpu));
    let gap = white(height, 8)?;
    let mut row = vec![];
    for picture in pictures {
        let (h, w) = size(picture)?;
        let width = (w.saturating_mul(height) / h).max(1);
        let scaled = if width > widest {
            let strip = resize(picture, ((h.saturating_mul(widest) / w).max(1), widest))?.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?;
            let ((batch, ..), below) = (strip.size4()?, height - size(&strip)?.0);
            Tensor::f_cat(&[&strip, &white(below, widest)?.f_expand([batch, -1, -1, -1], false)?], 2)?
        } else {
            resize(picture, (height, width))?
        };
        let scaled = scaled.f_to_device(tch::Device::Cpu)?;
        for i in 0..scaled.size4()?.0 {
            if !row.is_empty() {
                row.push(gap.shallow_clone());
            }
            row.push(scaled.f_narrow(0, i, 1)?.f_to_kind(Kind::Float)?);
        }
    }
    Ok(Tensor::f_cat(&row, 3)?)
}
