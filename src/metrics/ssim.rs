//! Multi-scale structural similarity.

use crate::scalar::WithNumber;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// Of each scale, finest first, as its authors measured them.
const WEIGHTS: [f64; 5] = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333];

/// Sides of the window in pixels, and the deviation of its Gaussian.
const WINDOW: i64 = 11;
const SIGMA: f64 = 1.5;

/// For a range of values of 1.
const C1: f64 = 0.01 * 0.01;
const C2: f64 = 0.03 * 0.03;

/// MS-SSIM (Wang, Simoncelli, Bovik 2003) of two pictures of equal size, on luma: at most 1, which equal pictures have; never below 0.
///
/// Luma is `0.299 R + 0.587 G + 0.114 B`. Means `m`, variances `v` and the covariance `c` are taken under a Gaussian window of 11 x 11
/// pixels, sigma 1.5, wherever it lies wholly inside; with `C1 = 0.01^2` and `C2 = 0.03^2`
///
/// `l = (2 m_a m_b + C1) / (m_a^2 + m_b^2 + C1)` and `s = (2 c + C2) / (v_a + v_b + C2)`.
///
/// Scale `j` is the picture halved `j` times by means of 2 x 2 pixels (an odd last row or column is left out). Of `M` scales
///
/// `MS-SSIM = product over j < M - 1 of max(mean s_j, 0)^w_j * max(mean(l s), 0)^w_(M - 1)`, the latter of the last scale,
///
/// with weights 0.0448, 0.2856, 0.3001, 0.2363, 0.1333. Five scales need sides of at least 176 pixels; smaller pictures have as
/// many as leave 11 pixels at the coarsest, with the first weights, scaled to the sum 1.
///
/// # Errors
/// [`Error::Shape`] for what is not one picture each, or for two sizes; [`Error::Argument`] for a side below 11 pixels, or for
/// pixels that are not finite.
pub fn ms_ssim(picture: &Tensor, reference: &Tensor) -> Result<f64> {
    let (picture, reference) = super::pair_of_one_size(picture, reference)?;
    let (_, _, height, width) = picture.size4()?;
    let shorter = height.min(width);
    if shorter < WINDOW {
        return Err(Error::argument("picture", format!("is of {width}x{height} pixels; MS-SSIM needs sides of at least {WINDOW}")));
    }
    let weights: Vec<f64> = WEIGHTS.into_iter().zip(0..).take_while(|(_, scale)| shorter >> scale >= WINDOW).map(|(weight, _)| weight).collect();
    let whole: f64 = weights.iter().sum();
    let (mut a, mut b) = (luma(&picture)?, luma(&reference)?);
    let mut product = 1.0;
    for (weight, scale) in weights.iter().zip(1..) {
        let last = scale == weights.len();
        product *= similarity(&a, &b, last)?.max(0.0).powf(weight / whole);
        if !last {
            (a, b) = (super::halved(&a)?, super::halved(&b)?);
        }
    }
    Ok(product)
}

/// `(1, 1, height, width)` in f64: variances are small differences of large numbers.
fn luma(picture: &Tensor) -> Result<Tensor> {
    let weights = Tensor::f_from_slice(&[0.299, 0.587, 0.114])?.f_view([1, 3, 1, 1])?.f_to_device(picture.device())?;
    Ok(picture.f_to_kind(Kind::Double)?.f_mul(&weights)?.f_sum_dim_intlist([1_i64].as_slice(), true, Kind::Double)?)
}

/// The mean of `s`, or of `l s`.
fn similarity(a: &Tensor, b: &Tensor, with_luminance: bool) -> Result<f64> {
    let all = Tensor::f_cat(&[a, b, &a.f_square()?, &b.f_square()?, &a.f_mul(b)?], 0)?;
    let means = blurred(&blurred(&all, 2)?, 3)?;
    let of = |i: i64| means.f_narrow(0, i, 1);
    let (mean_a, mean_b) = (of(0)?, of(1)?);
    let (square_a, square_b, product) = (mean_a.f_square()?, mean_b.f_square()?, mean_a.f_mul(&mean_b)?);
    let (variance_a, variance_b, covariance) = (of(2)?.f_sub(&square_a)?, of(3)?.f_sub(&square_b)?, of(4)?.f_sub(&product)?);
    let mut map = covariance.times(2.0)?.plus(C2)?.f_div(&variance_a.f_add(&variance_b)?.plus(C2)?)?;
    if with_luminance {
        map = map.f_mul(&product.times(2.0)?.plus(C1)?.f_div(&square_a.f_add(&square_b)?.plus(C1)?)?)?;
    }
    Ok(map.f_mean(Kind::Double)?.f_double_value(&[])?)
}

/// Weighted means along one dimension, which gets shorter by the window less one. Sums of shifted pictures need less memory than
/// libtorch's convolution of f64.
fn blurred(maps: &Tensor, dim: i64) -> Result<Tensor> {
    let at = |i: i64| (-((i - WINDOW / 2) as f64).powi(2) / (2.0 * SIGMA * SIGMA)).exp();
    let whole: f64 = (0..WINDOW).map(at).sum();
    let length = if dim == 2 { maps.size4()?.2 } else { maps.size4()?.3 };
    let part = |i: i64| maps.f_narrow(dim, i, length - WINDOW + 1)?.times(at(i) / whole);
    (1..WINDOW).try_fold(part(0)?, |sum, i| Ok(sum.f_add(&part(i)?)?))
}
