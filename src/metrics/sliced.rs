//! Sliced Wasserstein distances of patches and of colours.

use crate::scalar::integer;
use crate::{Error, Noise, Result};
use tch::{Device, Kind, Tensor};

/// Which patches [`patch_distance`] takes, and how exactly it looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PatchConfig {
    /// Sides of a patch in pixels; odd, so that it has a centre, 1 to 63. Default 7.
    pub size: i64,
    /// How many scales at most, each half as high and wide as the one before. Default 4: patches of 7, 14, 28 and 56 pixels.
    pub scales: usize,
    /// How many directions, 1 to 4096; time goes with it. Default 147, an orthonormal basis of patches of 7 x 7 pixels.
    pub directions: usize,
    /// Of the directions.
    pub seed: u64,
}

impl Default for PatchConfig {
    fn default() -> Self {
        Self { size: 7, scales: 4, directions: 147, seed: 42 }
    }
}

impl PatchConfig {
    /// Points are colours: patches of one pixel, in 16 bases.
    pub(super) fn colours(seed: u64) -> Self {
        Self { size: 1, scales: 1, directions: 48, seed }
    }

    fn check(&self) -> Result<()> {
        let Self { size, scales, directions, .. } = *self;
        if !(1..=63).contains(&size) || size % 2 == 0 {
            return Err(Error::argument("patch size", format!("{size} is not an odd number of pixels from 1 to 63")));
        }
        if scales == 0 {
            return Err(Error::argument("scales", "0 is not at least 1"));
        }
        if !(1..=4096).contains(&directions) {
            return Err(Error::argument("directions", format!("{directions} is not 1 to 4096")));
        }
        Ok(())
    }

    /// Unit vectors as kernels, `(directions, 3, size, size)`. Always drawn on the CPU: a seed means the same on every device.
    fn draw(&self, device: Device) -> Result<Tensor> {
        let length = 3 * self.size * self.size;
        let mut noise = Noise::seeded(self.seed);
        let (mut sets, mut left) = (vec![], i64::try_from(self.directions).unwrap_or(i64::MAX));
        while left > 0 {
            let few = left.min(length);
            let drawn = noise.draw(&Tensor::f_empty([length, few], (Kind::Float, Device::Cpu))?)?.f_to_kind(Kind::Double)?;
            sets.push(Tensor::f_linalg_qr(&drawn, "reduced")?.0.f_transpose(0, 1)?);
            left -= few;
        }
        Ok(Tensor::f_cat(&sets, 0)?.f_to_kind(Kind::Float)?.f_view([-1, 3, self.size, self.size])?.f_to_device(device)?)
    }
}

/// What [`patch_distance`] gives, in picture values.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PatchDistance {
    /// At each scale, finest first.
    pub scales: Vec<f64>,
    /// The mean of these.
    pub mean: f64,
}

impl PatchDistance {
    pub(super) fn new(scales: Vec<f64>) -> Self {
        let mean = scales.iter().sum::<f64>() / scales.len().max(1) as f64;
        Self { scales, mean }
    }
}

/// How far two textures are apart: the [sliced Wasserstein distance](super#sliced-wasserstein-distances) of all patches of
/// `size` x `size` pixels that lie inside (`d = 3 size^2`), at several scales. The pictures may differ in size.
///
/// Scale `j` is the picture halved `j` times by means of 2 x 2 pixels (an odd last row or column is left out); there are `scales`
/// of them, fewer where a patch would not fit into both pictures.
///
/// # Errors
/// [`Error::Shape`] for what is not one picture each; [`Error::Argument`] for a picture smaller than a patch, for pixels that are
/// not finite, or for a [`PatchConfig`] out of its ranges.
pub fn patch_distance(picture: &Tensor, reference: &Tensor, config: &PatchConfig) -> Result<PatchDistance> {
    let scales = Scales::new(picture, reference, config)?;
    let distances = scales.pairs.iter().map(|pair| Ok(scales.compare(pair, &[(None, None)])?.into_iter().sum()));
    Ok(PatchDistance::new(distances.collect::<Result<_>>()?))
}

/// How far two palettes are apart, wherever their colours lie: the
/// [sliced Wasserstein distance](super#sliced-wasserstein-distances) of all pixels as points of RGB (`d = 3`), over 48 directions in 16
/// bases drawn by `seed`. The pictures may differ in size.
///
/// Of two flat colours it is the root mean square of the differences of their channels, and of pictures that are lighter and
/// darker versions of each other, by one summand, that summand.
///
/// # Errors
/// [`Error::Shape`] for what is not one picture each; [`Error::Argument`] for pixels that are not finite.
pub fn colour_distance(picture: &Tensor, reference: &Tensor, seed: u64) -> Result<f64> {
    Ok(patch_distance(picture, reference, &PatchConfig::colours(seed))?.mean)
}

/// Which patches take part, by their place among all in reading order, `(patches)`; all of them where there is none.
pub(super) type Selection = Option<Tensor>;

/// So many numbers are sorted at a time: enough for a GPU, little against the pictures' own memory.
const AT_ONCE: i64 = 1 << 22;

/// Two pictures at all scales that both have, with the directions to look along.
pub(super) struct Scales {
    pub(super) pairs: Vec<(Tensor, Tensor)>,
    directions: Tensor,
}

impl Scales {
    pub(super) fn new(picture: &Tensor, reference: &Tensor, config: &PatchConfig) -> Result<Self> {
        config.check()?;
        let (picture, reference) = super::pair(picture, reference)?;
        for (name, picture) in [("picture", &picture), ("reference", &reference)] {
            let (_, _, height, width) = picture.size4()?;
            if !holds(picture, config.size)? {
                return Err(Error::argument(name, format!("is of {width}x{height} pixels, smaller than a patch of {0}x{0}", config.size)));
            }
        }
        let directions = config.draw(picture.device())?;
        let mut pairs = vec![];
        let mut next = Some((picture, reference));
        while let Some((a, b)) = next.take() {
            if pairs.len() + 1 < config.scales && holds(&a, 2 * config.size)? && holds(&b, 2 * config.size)? {
                next = Some((super::halved(&a)?, super::halved(&b)?));
            }
            pairs.push((a, b));
        }
        Ok(Self { pairs, directions })
    }

    /// The distance over each pair of selections of patches, none of them empty.
    pub(super) fn compare(&self, (a, b): &(Tensor, Tensor), selections: &[(Selection, Selection)]) -> Result<Vec<f64>> {
        let pixels = |picture: &Tensor| i64::try_from(picture.numel() / 3).unwrap_or(i64::MAX);
        let (count, at_once) = (self.directions.size4()?.0, (AT_ONCE / pixels(a).max(pixels(b))).max(1));
        let mut sums = vec![0.0; selections.len()];
        let mut matchings = vec![];
        for first in (0..count).step_by(usize::try_from(at_once).unwrap_or(1)) {
            let few = self.directions.f_narrow(0, first, at_once.min(count - first))?;
            let (along_a, along_b) = (project(a, &few)?, project(b, &few)?);
            for (i, (sum, (of_a, of_b))) in sums.iter_mut().zip(selections).enumerate() {
                let (sorted_a, sorted_b) = (sorted(&along_a, of_a)?, sorted(&along_b, of_b)?);
                if matchings.len() <= i {
                    matchings.push(Matching::new(&sorted_a, &sorted_b)?);
                }
                if let Some(matching) = matchings.get(i) {
                    *sum += matching.squares(&sorted_a, &sorted_b)?;
                }
            }
        }
        Ok(sums.into_iter().map(|sum| (sum / count as f64).sqrt()).collect())
    }
}

fn holds(picture: &Tensor, side: i64) -> Result<bool> {
    let (_, _, height, width) = picture.size4()?;
    Ok(height.min(width) >= side)
}

/// All patches along each direction, `(directions, patches)`: a convolution, and no patch is ever cut out. TF32, which GPUs
/// would take by themselves, has 10 bits.
fn project(picture: &Tensor, directions: &Tensor) -> Result<Tensor> {
    let none = None::<&Tensor>;
    let maps = picture.f_internal_convolution(directions, none, [1, 1], [0, 0], [1, 1], false, [0, 0], 1, false, true, true, false)?;
    Ok(maps.f_squeeze_dim(0)?.f_flatten(1, -1)?)
}

fn sorted(along: &Tensor, selection: &Selection) -> Result<Tensor> {
    let sort = |along: &Tensor| -> Result<Tensor> { Ok(along.f_sort(1, false)?.0) };
    match selection {
        Some(places) => sort(&along.f_index_select(1, places)?),
        None => sort(along),
    }
}

/// Which of `n` sorted numbers meets which of `m`: in units of `1 / (n m)` of the quantiles, the one's steps end at multiples of
/// `m`, the other's at multiples of `n`.
enum Matching {
    /// Each its own.
    Equal,
    /// Between two ends, of whichever, both functions are flat there: `(n + m)` places in either, and the widths, 0 where two
    /// ends coincide.
    Steps { of_a: Tensor, of_b: Tensor, widths: Tensor },
}

impl Matching {
    fn new(a: &Tensor, b: &Tensor) -> Result<Self> {
        let ((_, n), (_, m)) = (a.size2()?, b.size2()?);
        if n == m {
            return Ok(Self::Equal);
        }
        let ends = |count: i64, step: i64| -> Result<Tensor> {
            let numbers = Tensor::f_ones([count], (Kind::Int64, a.device()))?.f_cumsum(0, Kind::Int64)?;
            Ok(numbers.f_mul(&integer(step)?)?)
        };
        let (ends, _) = Tensor::f_cat(&[ends(n, m)?, ends(m, n)?], 0)?.f_sort(0, false)?;
        let start = Tensor::f_zeros([1], (Kind::Int64, a.device()))?;
        let widths = ends.f_diff(1, 0, Some(&start), None)?.f_to_kind(Kind::Double)?;
        let inside = ends.f_sub(&integer(1)?)?;
        let place = |step: i64| -> Result<Tensor> { Ok(inside.f_divide_tensor_mode(&integer(step)?, "floor")?) };
        let whole = widths.f_sum(Kind::Double)?;
        Ok(Self::Steps { of_a: place(m)?, of_b: place(n)?, widths: widths.f_div(&whole)? })
    }

    /// The squared distances of rows of sorted numbers, summed over the rows.
    fn squares(&self, a: &Tensor, b: &Tensor) -> Result<f64> {
        let square = |a: &Tensor, b: &Tensor| -> Result<Tensor> { Ok(a.f_sub(b)?.f_square()?) };
        let rows = match self {
            Self::Equal => square(a, b)?.f_mean_dim([1_i64].as_slice(), false, Kind::Double)?,
            Self::Steps { of_a, of_b, widths } => {
                let squares = square(&a.f_index_select(1, of_a)?, &b.f_index_select(1, of_b)?)?;
                squares.f_to_kind(Kind::Double)?.f_mv(widths)?
            }
        };
        Ok(rows.f_sum(Kind::Double)?.f_double_value(&[])?)
    }
}
