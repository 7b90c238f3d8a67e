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
    /// Pictures of more than 1536 x 1536 pixels, of any aspect ratio, into the default [`Tiles`]; and those that memory does not suffice for as a
    /// whole, into these or smaller ones, of which `tracing` warns: a long run is not lost for the want of memory at its end.
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

    /// What `network` makes of a picture of `(height, width)` pixels, whole or in tiles.
    pub(in crate::stable_diffusion) fn through<T>(self, size: (i64, i64), network: impl Fn(Option<Tiles>) -> Result<T>) -> Result<T> {
        let first = network(self.tiles(size));
        let lacks = |outcome: &Result<T>| outcome.as_ref().is_err_and(Error::is_out_of_memory);
        if self != Self::Auto || !lacks(&first) {
            return first;
        }
        for tiles in IN_LESS_MEMORY.into_iter().filter(|&tiles| self.tiles(size) != Some(tiles)) {
            tracing::warn!(
                tile = tiles.size,
                "there is not enough memory for the autoencoder; the picture goes through it in tiles of so many latents"
            );
            let outcome = network(Some(tiles));
            if !lacks(&outcome) {
                return outcome;
            }
        }
        first
    }
}

/// Tried one after the other where memory lacks.
const IN_LESS_MEMORY: [Tiles; 2] = [Tiles { size: 128, overlap: 32 }, Tiles { size: 64, overlap: 32 }];

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
    /// is a narrow rest with statistics of its own. On a ring the last one overlaps the first.
    fn along(self, length: i64, ring: bool) -> (Vec<i64>, i64) {
        if length <= self.size {
            return (vec![0], length);
        }
        let step = self.size - self.overlap;
        let way = if ring { length } else { length - self.size };
        let gaps = (way - 1) / step + 1;
        let count = if ring { gaps } else { gaps + 1 };
        ((0..count).map(|i| (i128::from(way) * i128::from(i) / i128::from(gaps)) as i64).collect(), self.size)
    }
}

/// One tile's share of the picture along one side.
struct Span {
    /// In latents. On a ring a span may reach beyond the end, and goes on at the beginning.
    start: i64,
    length: i64,
    /// One for each of its places in the output, `length` times the output's scale. Those of all spans add up to 1.
    weights: Vec<f32>,
}

impl Span {
    /// Where it lies among `total` latents, in one piece or two: each with its own beginning within the span, its place, and its
    /// length.
    fn pieces(&self, total: i64) -> impl Iterator<Item = (i64, i64, i64)> {
        let first = self.length.min(total - self.start);
        let pieces = [(0, self.start, first), (first, 0, self.length - first)];
        pieces.into_iter().filter(|(_, _, length)| *length > 0)
    }

    /// Its part of an input of `scale` places per latent.
    fn of(&self, input: &Tensor, axis: i64, (total, scale): (i64, i64)) -> Result<Tensor> {
        let pieces = self.pieces(total).map(|(_, place, length)| Ok(input.f_narrow(axis, place * scale, length * scale)?));
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        match pieces.as_slice() {
            [whole] => Ok(whole.shallow_clone()),
            pieces => Ok(Tensor::f_cat(pieces, axis)?),
        }
    }
}

/// The spans along a side of `length` latents, for an output of `scale` places per latent.
fn spans(tiles: Tiles, length: i64, scale: i64, ring: bool) -> Vec<Span> {
    let (starts, size) = tiles.along(length, ring);
    let places = size * scale;
    let overlaps = starts.windows(2).map(|pair| match pair {
        &[this, next] => (this + size - next) * scale,
        _ => 0,
    });
    let overlaps = overlaps.collect::<Vec<_>>();
    let closing = match starts.last() {
        Some(last) if ring && starts.len() > 1 => (last + size - length) * scale,
        _ => 0,
    };
    let before = std::iter::once(closing).chain(overlaps.iter().copied());
    let after = overlaps.iter().copied().chain(std::iter::once(closing));
    let raw = before.zip(after).map(|(before, after)| (0..places).map(|i| rise(i, before) * rise(places - 1 - i, after)).collect::<Vec<_>>());
    let raw = raw.collect::<Vec<_>>();
    let total = usize::try_from(length * scale).unwrap_or(0);
    let mut sums = vec![0.0; total];
    let skip = |start: i64| usize::try_from(start * scale).unwrap_or(0);
    for (&start, window) in starts.iter().zip(&raw) {
        // What does not fit before the end goes on at the beginning.
        let (first, second) = window.split_at_checked(total - skip(start)).unwrap_or((window, &[]));
        sums.iter_mut().skip(skip(start)).zip(first).for_each(|(sum, weight)| *sum += weight);
        sums.iter_mut().zip(second).for_each(|(sum, weight)| *sum += weight);
    }
    let share = |(&start, window): (&i64, Vec<f64>)| {
        let sums = sums.iter().cycle().skip(skip(start));
        Span { start, length: size, weights: window.iter().zip(sums).map(|(weight, sum)| (weight / sum) as f32).collect() }
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
    /// larger than a tile give what `decode` gives. Where opposite borders [meet](Self::set_seamless), tiles overlap across them.
    ///
    /// # Errors
    /// As `decode`; [`Error::Argument`] for tiles of a size below 1 or an overlap that is not from 0 to below the size.
    pub fn decode_tiled(&self, latents: &Tensor, tiles: Tiles) -> Result<Tensor> {
        tiles.check()?;
        let shape = self.check_latents(latents)?;
        if shape.height <= tiles.size && shape.width <= tiles.size {
            return self.decode(latents);
        }
        self.blend(latents, shape, tiles, (1, self.factor()), self.pixel_channels, |tile| self.decode(tile))
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
        self.blend(pixels, shape, tiles, (self.factor(), 1), self.latent_channels, |tile| self.encode(tile))
    }

    /// Tile by tile through the network, each weighted and added to its place. `scales` are places per latent of input and output.
    fn blend(
        &self,
        input: &Tensor,
        shape: Extent,
        tiles: Tiles,
        scales: (i64, i64),
        channels: i64,
        network: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (Extent { batch, height, width }, (from, to), device) = (shape, scales, input.device());
        let seamless = self.borders.get();
        let output = Tensor::f_zeros([batch, channels, height * to, width * to], (Kind::Float, device))?;
        let rows = spans(tiles, height, to, seamless.y());
        let columns = spans(tiles, width, to, seamless.x());
        // Borders of a tile meet where they are the picture's.
        let _restored = self.borders.within_parts(columns.len() > 1, rows.len() > 1);
        for row in &rows {
            let strip = row.of(input, 2, (height, from))?;
            let down = Tensor::f_from_slice(&row.weights)?.f_to_device(device)?.f_unsqueeze(1)?;
            for column in &columns {
                let tile = network(&column.of(&strip, 3, (width, from))?)?;
                let across = Tensor::f_from_slice(&column.weights)?.f_to_device(device)?;
                let tile = tile.f_mul(&down)?.f_mul(&across)?;
                for (top, y, high) in row.pieces(height) {
                    for (left, x, wide) in column.pieces(width) {
                        let part = tile.f_narrow(2, top * to, high * to)?.f_narrow(3, left * to, wide * to)?;
                        let mut place = output.f_narrow(2, y * to, high * to)?.f_narrow(3, x * to, wide * to)?;
                        let _ = place.f_add_(&part)?;
                    }
                }
            }
        }
        Ok(output)
    }
}

/// What a batch is in latents, on either side of the autoencoder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub(super) batch: i64,
    pub(super) height: i64,
    pub(super) width: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every place is covered, by weights that add up to 1, and no overlap is below the one asked for.
    #[test]
    fn weights_add_up() {
        for (size, overlap) in [(1, 0), (4, 0), (4, 1), (5, 4), (16, 4), (16, 12), (128, 32), (i64::MAX, 7)] {
            for (length, scale) in [(1, 8), (3, 1), (4, 1), (5, 4), (17, 8), (129, 1), (300, 2)] {
                for ring in [false, true] {
                    let spans = spans(Tiles { size, overlap }, length, scale, ring);
                    let case = format!("{size} {overlap} {length} {ring}");
                    let mut sums = vec![0.0_f32; (length * scale) as usize];
                    for span in &spans {
                        assert!(span.length == size.min(length) && (0..length).contains(&span.start), "{case}");
                        assert!(span.start + span.length <= length || ring, "{case}");
                        for (first, place, count) in span.pieces(length) {
                            let weights = span.weights.iter().skip((first * scale) as usize).take((count * scale) as usize);
                            sums.iter_mut().skip((place * scale) as usize).zip(weights).for_each(|(sum, weight)| *sum += weight);
                        }
                    }
                    assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{case}: {sums:?}");
                    for pair in spans.windows(2) {
                        assert!(pair[0].start < pair[1].start && pair[0].start + size - pair[1].start >= overlap, "{case}");
                    }
                    if ring && spans.len() > 1 {
                        assert!(spans[spans.len() - 1].start + size - length >= overlap, "{case}: the last meets the first");
                    }
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

    /// With memory for so many latents a side: in which tiles, and after which others.
    #[test]
    fn tiles_where_memory_lacks() {
        let lacks = || Error::Memory { what: "a tile".into(), needed: 2, free: 1, advice: String::new() };
        let run = |tiling: Tiling, size: i64, enough: i64| {
            let tried = std::cell::RefCell::new(vec![]);
            let outcome = tiling.through((size, size), |tiles| {
                let side = tiles.map_or(size / 8, |tiles| tiles.size);
                tried.borrow_mut().push(side);
                if side <= enough {
                    Ok(side)
                } else {
                    Err(lacks())
                }
            });
            (outcome.ok(), tried.into_inner())
        };
        assert_eq!(run(Tiling::Auto, 1024, 200), (Some(128), vec![128]), "of 128 latents as a whole");
        assert_eq!(run(Tiling::Auto, 1536, 150), (Some(128), vec![192, 128]));
        assert_eq!(run(Tiling::Auto, 1536, 70), (Some(64), vec![192, 128, 64]));
        assert_eq!(run(Tiling::Auto, 1536, 10), (None, vec![192, 128, 64]));
        assert_eq!(run(Tiling::Auto, 4096, 70), (Some(64), vec![128, 64]), "in tiles from the start");
        // Who said what to do is not overruled.
        assert_eq!(run(Tiling::Off, 1536, 70), (None, vec![192]));
        assert_eq!(run(Tiling::Always(Tiles { size: 100, overlap: 0 }), 1536, 70), (None, vec![100]));
        // Nor is anything else tried again.
        let times = std::cell::Cell::new(0);
        let outcome = Tiling::Auto.through((1536, 1536), |_| -> Result<()> {
            times.set(times.get() + 1);
            Err(Error::argument("latents", "are none"))
        });
        assert!(matches!(outcome, Err(Error::Argument { argument: "latents", .. })) && times.get() == 1);
    }
}
