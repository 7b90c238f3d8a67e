//! Large pictures through the autoencoder, in overlapping tiles that are blended.

use super::AutoencoderKl;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// Most pixels that [`Tiling::Auto`] leaves whole: 1536 x 1536. Stable Diffusion's decoder in f32 holds up to 4.7 kB per
/// pixel, measured on a CPU (256 channels at full size, four times over): 11 GB for this many, which a GPU of 24 GB has beside
/// SDXL's weights in half precision; 2048 x 2048 would be 20 GB.
const AUTO_PIXELS: i64 = 1536 * 1536;

/// How a picture is cut for the autoencoder; sides in latents, which are 8 pixels in Stable Diffusion.
///
/// What a tile makes of its part differs a little from what the whole picture would: normalisation takes mean and deviation
/// over the tile, the attention in the middle sees the tile alone, and at its borders the convolutions see nothing beyond.
/// Large tiles keep the first two small; the overlap hides the third and turns what is left into a slow change of shade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// Longest side of a tile, at least 1. By default 128.
    pub size: i64,
    /// Least overlap of neighbours, from 0 (which shows seams) to below `size`. By default 32, nearly
    /// twice as far as the convolutions of Stable Diffusion's decoder see.
    pub overlap: i64,
}

impl Default for Tiles {
    fn default() -> Self {
        Self { size: 128, overlap: 32 }
    }
}

/// When [`StableDiffusion`](crate::StableDiffusion) cuts pictures into tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Tiling {
    /// Pictures of more than 1536 x 1536 pixels, of any aspect ratio, into the default [`Tiles`].
    #[default]
    Auto,
    /// Never.
    Off,
    /// Whatever is larger than one of these tiles.
    Always(Tiles),
}

impl Tiling {
    /// # Errors
    /// As [`Tiles::check`].
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Always(tiles) => tiles.check(),
            Self::Auto | Self::Off => Ok(()),
        }
    }

    /// The tiles for a picture of `(height, width)` pixels.
    pub(crate) fn tiles(self, (height, width): (i64, i64)) -> Option<Tiles> {
        match self {
            Self::Auto => (height.saturating_mul(width) > AUTO_PIXELS).then(Tiles::default),
            Self::Off => None,
            Self::Always(tiles) => Some(tiles),
        }
    }
}

impl Tiles {
    /// # Errors
    /// [`Error::Argument`] for a size below 1, an overlap that is negative or not below the size.
    fn check(self) -> Result<()> {
        let Self { size, overlap } = self;
        if size < 1 {
            return Err(Error::argument("tiles", format!("a size of {size} latents is not at least 1")));
        }
        if overlap < 0 || overlap >= size {
            return Err(Error::argument("tiles", format!("an overlap of {overlap} latents must be from 0 to below the size, {size}")));
        }
        Ok(())
    }

    /// Where tiles begin along a side of `length` latents, and how long they are: all the same, evenly spread, so that none
    /// is a narrow rest with statistics of its own.
    fn along(self, length: i64) -> (Vec<i64>, i64) {
        let rest = length - self.size;
        if rest <= 0 {
            return (vec![0], length);
        }
        let step = self.size - self.overlap;
        let gaps = (rest - 1) / step + 1;
        ((0..=gaps).map(|i| (i128::from(rest) * i128::from(i) / i128::from(gaps)) as i64).collect(), self.size)
    }
}

/// One tile's share of the picture along one side.
struct Span {
    /// In latents.
    start: i64,
    length: i64,
    /// One for each of its places in the output, `length` times the output's scale. Those of all spans add up to 1.
    weights: Vec<f32>,
}

/// The spans along a side of `length` latents, for an output of `scale` places per latent.
fn spans(tiles: Tiles, length: i64, scale: i64) -> Vec<Span> {
    let (starts, size) = tiles.along(length);
    let places = size * scale;
    let overlaps = starts.windows(2).map(|pair| match pair {
        &[this, next] => (this + size - next) * scale,
        _ => 0,
    });
    let overlaps = overlaps.collect::<Vec<_>>();
    let before = std::iter::once(0).chain(overlaps.iter().copied());
    let after = overlaps.iter().copied().chain(std::iter::once(0));
    let raw = before.zip(after).map(|(before, after)| (0..places).map(|i| rise(i, before) * rise(places - 1 - i, after)).collect::<Vec<_>>());
    let raw = raw.collect::<Vec<_>>();
    let mut sums = vec![0.0; usize::try_from(length * scale).unwrap_or(0)];
    let skip = |start: i64| usize::try_from(start * scale).unwrap_or(0);
    for (&start, window) in starts.iter().zip(&raw) {
        sums.iter_mut().skip(skip(start)).zip(window).for_each(|(sum, weight)| *sum += weight);
    }
    let share = |(&start, window): (&i64, Vec<f64>)| {
        let weights = window.iter().zip(sums.iter().skip(skip(start))).map(|(weight, sum)| (weight / sum) as f32).collect();
        Span { start, length: size, weights }
    };
    starts.iter().zip(raw).map(share).collect()
}

/// From 0 at a tile's border to 1 where the overlap ends, without a kink at either end.
fn rise(place: i64, overlap: i64) -> f64 {
    if place >= overlap {
        return 1.0;
    }
    (std::f64::consts::FRAC_PI_2 * (place as f64 + 0.5) / overlap as f64).sin().powi(2)
}

impl AutoencoderKl {
    /// [`decode`](Self::decode) in overlapping tiles: takes the memory of one tile beside the picture. Latents that are no
    /// larger than a tile give what `decode` gives.
    ///
    /// # Errors
    /// As `decode`; [`Error::Argument`] for tiles of a size below 1 or an overlap that is not from 0 to below the size.
    pub fn decode_tiled(&self, latents: &Tensor, tiles: Tiles) -> Result<Tensor> {
        tiles.check()?;
        let shape = self.check_latents(latents)?;
        if shape.height <= tiles.size && shape.width <= tiles.size {
            return self.decode(latents);
        }
        blend(latents, shape, tiles, (1, self.factor()), self.pixel_channels, |tile| self.decode(tile))
    }

    /// [`encode`](Self::encode) in overlapping tiles, whose sides are in latents here, too.
    ///
    /// # Errors
    /// As `encode`, and as [`decode_tiled`](Self::decode_tiled).
    pub fn encode_tiled(&self, pixels: &Tensor, tiles: Tiles) -> Result<Tensor> {
        tiles.check()?;
        let shape = self.check_pixels(pixels)?;
        if shape.height <= tiles.size && shape.width <= tiles.size {
            return self.encode(pixels);
        }
        blend(pixels, shape, tiles, (self.factor(), 1), self.latent_channels, |tile| self.encode(tile))
    }
}

/// What a batch is in latents, on either side of the autoencoder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub(super) batch: i64,
    pub(super) height: i64,
    pub(super) width: i64,
}

/// Tile by tile through the network, each weighted and added to its place. `scales` are places per latent of input and output.
fn blend(
    input: &Tensor,
    shape: Extent,
    tiles: Tiles,
    scales: (i64, i64),
    channels: i64,
    network: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (from, to) = scales;
    let device = input.device();
    let output = Tensor::f_zeros([shape.batch, channels, shape.height * to, shape.width * to], (Kind::Float, device))?;
    let rows = spans(tiles, shape.height, to);
    let columns = spans(tiles, shape.width, to);
    for row in &rows {
        let strip = input.f_narrow(2, row.start * from, row.length * from)?;
        let down = Tensor::f_from_slice(&row.weights)?.f_to_device(device)?.f_unsqueeze(1)?;
        for column in &columns {
            let tile = network(&strip.f_narrow(3, column.start * from, column.length * from)?)?;
            let across = Tensor::f_from_slice(&column.weights)?.f_to_device(device)?;
            let mut place = output.f_narrow(2, row.start * to, row.length * to)?.f_narrow(3, column.start * to, column.length * to)?;
            let _ = place.f_add_(&tile.f_mul(&down)?.f_mul(&across)?)?;
        }
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every place is covered, by weights that add up to 1, and no overlap is below the one asked for.
    #[test]
    fn weights_add_up() {
        for (size, overlap) in [(1, 0), (4, 0), (4, 1), (5, 4), (16, 4), (16, 12), (128, 32), (i64::MAX, 7)] {
            for (length, scale) in [(1, 8), (3, 1), (4, 1), (5, 4), (17, 8), (129, 1), (300, 2)] {
                let spans = spans(Tiles { size, overlap }, length, scale);
                let mut sums = vec![0.0_f32; (length * scale) as usize];
                for span in &spans {
                    assert!(span.length == size.min(length) && span.start >= 0 && span.start + span.length <= length);
                    let first = (span.start * scale) as usize;
                    sums.iter_mut().skip(first).zip(&span.weights).for_each(|(sum, weight)| *sum += weight);
                }
                assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{size} {overlap} {length}: {sums:?}");
                for pair in spans.windows(2) {
                    assert!(pair[0].start < pair[1].start && pair[0].start + size - pair[1].start >= overlap, "{size} {overlap} {length}");
                }
            }
        }
    }

    #[test]
    fn only_beyond_the_limit() {
        assert_eq!(Tiling::Auto.tiles((1536, 1536)), None);
        assert_eq!(Tiling::Auto.tiles((1024, 2304)), None);
        assert_eq!(Tiling::Auto.tiles((1536, 1544)), Some(Tiles::default()));
        assert_eq!(Tiling::Off.tiles((8192, 8192)), None);
    }
}
