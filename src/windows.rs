//! MultiDiffusion's geometry (Bar-Tal et al. 2023): a canvas of any size, in overlapping windows of a size that the network
//! knows.

use crate::scalar::number;
use crate::{Error, LabelMap, Result, Seamless};
use tch::{Kind, Tensor};

/// A part of the canvas, in latents. Where the windows [wrap](Windows::wrap), what would lie beyond the canvas goes on at its
/// other border.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Rows above it.
    pub top: i64,
    /// Columns to its left.
    pub left: i64,
    /// Its rows.
    pub height: i64,
    /// Its columns.
    pub width: i64,
}

impl View {
    /// This part of `(batch, channels, height, width)`, without a copy where it is in one piece.
    fn of(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = latents.size4()?;
        let rows = joined(latents, 2, pieces(self.top, self.height, height))?;
        joined(&rows, 3, pieces(self.left, self.width, width))
    }

    /// Adds what belongs to it, `(1, channels, its height, its width)`.
    fn add(&self, sum: &Tensor, latents: &Tensor) -> Result<()> {
        let (_, _, height, width) = sum.size4()?;
        for (y, top, rows) in pieces(self.top, self.height, height) {
            for (x, left, columns) in pieces(self.left, self.width, width) {
                let part = latents.f_narrow(2, y, rows)?.f_narrow(3, x, columns)?;
                let _ = sum.f_narrow(2, top, rows)?.f_narrow(3, left, columns)?.f_add_(&part)?;
            }
        }
        Ok(())
    }
}

/// A stretch of a side, in one piece or, beyond its end, two: each with its beginning in the stretch, its place, and its length.
pub(crate) fn pieces(start: i64, length: i64, side: i64) -> impl Iterator<Item = (i64, i64, i64)> {
    let first = length.min(side - start);
    [(0, start, first), (first, 0, length - first)].into_iter().filter(|(_, _, length)| *length > 0)
}

pub(crate) fn joined(latents: &Tensor, axis: i64, pieces: impl Iterator<Item = (i64, i64, i64)>) -> Result<Tensor> {
    let parts = pieces.map(|(_, place, length)| Ok(latents.f_narrow(axis, place, length)?)).collect::<Result<Vec<_>>>()?;
    match parts.as_slice() {
        [whole] => Ok(whole.shallow_clone()),
        parts => Ok(Tensor::f_cat(parts, axis)?),
    }
}

/// How a [`GuidedSampler`](crate::GuidedSampler) makes a picture larger than its network was trained for: in each timestep view by
/// view, all of them cut from the canvas as it was, and then each latent is the mean of the views that have it. The
/// defaults are the authors' for Stable Diffusion 1.5, but for [`reference_per_batch`](Self::reference_per_batch).
///
/// The start of a large canvas is drawn by [`Noise::draw`](crate::Noise::draw), of its own shape: `StableDiffusion::noise`
/// refuses what the network could not take whole. Besides the canvas and a sum of its size, a step takes the memory of one batch
/// of views, however large the canvas. Its time grows with the number of views: halving the stride makes four times as many, and seams fainter.
///
/// Along axes that [`wrap`](Self::wrap), and those where the network's pictures are [seamless](crate::Denoiser::seamless), views go
/// around the canvas, which becomes a tile. Borders of a view do not meet, as they do not on the canvas: only where one view is as
/// long as the canvas, and the network seamless, the network itself closes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Windows {
    /// The side of the square windows, in latents: the network's training size, 64 by default. Along a side of the canvas
    /// that is shorter, windows are as long as that side.
    pub size: i64,
    /// From one window to the next, in latents, in 1..=`size`; 8 by default. The last of a row or column ends where the canvas
    /// does, and may so be closer to the one before.
    pub stride: i64,
    /// Views per forward pass, at least 1; 8 by default. Prompt and negative are two passes or one of twice as many.
    pub batch: usize,
    /// The noise on the references: `true` is the authors' way, new noise (and AdaIN's, where that is on) for each batch of views,
    /// and so a forward pass per style, too. `false`, the default, draws once in a step, where the first batch would, for all views:
    /// less work, and with Adam, which does not mind the scale of gradients (apart from its epsilon), `batch` changes roundings only.
    /// To plain gradient descent the scale is all: losses are means over a batch, so that its views move by 1/`batch` of what one alone
    /// would, those of a smaller last batch by more; take a `batch` that divides the number of views. The noise on
    /// a content is then one for the whole canvas, too, so that views see the same where they overlap.
    pub reference_per_batch: bool,
    /// Along which axes views go on at the canvas' other border, by default none. It works over any network, also where windows are
    /// as long as the canvas: there are then at least two along that axis, which begin at different places (over a seamless network
    /// one). They are spread evenly, at most a stride apart, so that the numbers of views which any two latents have along an axis
    /// differ by 1 at most.
    pub wrap: Seamless,
}

impl Default for Windows {
    fn default() -> Self {
        Self { size: 64, stride: 8, batch: 8, reference_per_batch: false, wrap: Seamless::None }
    }
}

impl Windows {
    /// Windows of another size and stride, in latents; the rest as by default. Fields may be set to anything; a run
    /// [checks](Self::check) them before each step.
    pub fn new(size: i64, stride: i64) -> Self {
        Self { size, stride, ..Self::default() }
    }

    /// The same with another number of views per forward pass.
    #[must_use]
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch;
        self
    }

    /// The same with new noise on the references for each batch of views, or with one for all.
    #[must_use]
    pub fn with_reference_per_batch(mut self, on: bool) -> Self {
        self.reference_per_batch = on;
        self
    }

    /// The same around the canvas along these axes.
    #[must_use]
    pub fn with_wrap(mut self, wrap: Seamless) -> Self {
        self.wrap = wrap;
        self
    }

    /// Whether these settings cover a canvas.
    ///
    /// # Errors
    /// A size, stride or batch below 1; a stride above the size, which would leave gaps.
    pub fn check(&self) -> Result<()> {
        if self.size < 1 {
            return Err(Error::argument("window size", format!("{} is not at least 1 latent; 64 is usual", self.size)));
        }
        if !(1..=self.size).contains(&self.stride) {
            let size = self.size;
            return Err(Error::argument("window stride", format!("{} is not in 1..={size}; above the size it would leave gaps", self.stride)));
        }
        if self.batch < 1 {
            return Err(Error::argument("window batch", "0 views per forward pass would make no step; use at least 1"));
        }
        Ok(())
    }

    /// The views of a canvas of `(height, width)` latents, row by row, one after the other: none is kept.
    ///
    /// # Errors
    /// As [`check`](Self::check); a side below 1.
    pub fn views(&self, (height, width): (i64, i64)) -> Result<impl Iterator<Item = View>> {
        self.check()?;
        if height < 1 || width < 1 {
            return Err(Error::argument("canvas", format!("{width}x{height} latents have no view; both sides must be at least 1")));
        }
        let windows = *self;
        Ok(windows.starts(height, windows.wrap.y()).flat_map(move |top| {
            let lefts = windows.starts(width, windows.wrap.x());
            lefts.map(move |left| View { top, left, height: windows.size.min(height), width: windows.size.min(width) })
        }))
    }

    /// Over a network whose own pictures are seamless along some axes, on a canvas of `(height, width)` latents: such an axis wraps,
    /// too, but where a window is as long as the canvas, there the network closes it. Also returns the latter axes.
    pub(crate) fn over(mut self, network: Seamless, (height, width): (i64, i64)) -> (Self, Seamless) {
        let closed = Seamless::of(network.x() && self.size >= width, network.y() && self.size >= height);
        let wraps = |asked: bool, network: bool, closed: bool| (asked || network) && !closed;
        self.wrap = Seamless::of(wraps(self.wrap.x(), network.x(), closed.x()), wraps(self.wrap.y(), network.y(), closed.y()));
        (self, closed)
    }

    /// Where windows begin along a side.
    fn starts(&self, side: i64, wraps: bool) -> impl Iterator<Item = i64> {
        let stride = self.stride.max(1);
        let steps = |way: i64| way / stride + i64::from(way % stride != 0);
        let last = (side - self.size).max(0);
        let count = if wraps { steps(side).max(2).min(side) } else { steps(last) + 1 };
        (0..count)
            .map(move |i| if wraps { (i128::from(i) * i128::from(side) / i128::from(count)) as i64 } else { i.saturating_mul(stride).min(last) })
    }

    /// How many views have each latent, `(height, width)`, on the canvas' device: counted along the sides and multiplied,
    /// without asking the device or sending it anything.
    fn coverage(&self, canvas: &Tensor, (height, width): (i64, i64)) -> Result<Tensor> {
        let along = |side: i64, wraps: bool| {
            let count = Tensor::f_zeros([side], (Kind::Float, canvas.device()))?;
            for start in self.starts(side, wraps) {
                for (_, place, length) in pieces(start, self.size.min(side), side) {
                    let _ = count.f_narrow(0, place, length)?.f_add_(&number(1.0)?)?;
                }
            }
            Ok::<_, Error>(count)
        };
        Ok(along(height, self.wrap.y())?.f_unsqueeze(1)?.f_mul(&along(width, self.wrap.x())?)?)
    }
}

/// Views that go through the network together.
#[derive(Debug)]
pub(crate) struct Batch {
    /// `(height, width)` of what they are views of.
    canvas: (i64, i64),
    views: Vec<View>,
}

impl Batch {
    pub(crate) fn len(&self) -> usize {
        self.views.len()
    }

    /// Cut from `(1, channels, height, width)` and stacked: `(views, channels, view's height, view's width)`.
    pub(crate) fn cut(&self, canvas: &Tensor) -> Result<Tensor> {
        let parts = self.views.iter().map(|view| view.of(canvas)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&parts, 0)?)
    }

    /// Cut, where it has the size of the canvas; anything else stays whole, for all views.
    pub(crate) fn cut_if_of_canvas(&self, latents: &Tensor) -> Result<Tensor> {
        match latents.size().as_slice() {
            &[_, _, height, width] if (height, width) == self.canvas => self.cut(latents),
            _ => Ok(latents.shallow_clone()),
        }
    }

    /// The canvas' labels under each view.
    pub(crate) fn cut_labels(&self, labels: &LabelMap) -> Result<LabelMap> {
        let views = self.views.iter().map(|view| [view.top, view.left, view.height, view.width]);
        labels.crop_around(self.canvas, views)
    }
}

/// The mean of all views of a canvas, taken while they come in.
#[derive(Debug)]
pub(crate) struct Mean {
    sum: Tensor,
    windows: Windows,
    canvas: (i64, i64),
    /// The axes along which the borders of each view meet.
    pub(crate) closed: Seamless,
}

impl Mean {
    /// For a canvas `(1, channels, height, width)` in f32 and a network that is seamless so; and its views, in batches that are
    /// made when they are asked for.
    ///
    /// # Errors
    /// As [`Windows::views`]; another number of axes; more than one picture.
    pub(crate) fn new(windows: Windows, network: Seamless, canvas: &Tensor) -> Result<(Self, impl Iterator<Item = Batch>)> {
        let size = match canvas.size().as_slice() {
            &[1, _, height, width] => (height, width),
            _ => {
                let expected = "(1, channels, height, width): windows make one picture, run after run";
                return Err(Error::shape("latents", expected, canvas.size()));
            }
        };
        let (windows, closed) = windows.over(network, size);
        let mut views = windows.views(size)?;
        let batches = std::iter::from_fn(move || {
            let views: Vec<View> = views.by_ref().take(windows.batch).collect();
            (!views.is_empty()).then_some(Batch { canvas: size, views })
        });
        Ok((Self { sum: canvas.f_zeros_like()?, windows, canvas: size, closed }, batches))
    }

    /// What became of a batch.
    pub(crate) fn add(&mut self, batch: &Batch, latents: &Tensor) -> Result<()> {
        for (i, view) in (0..).zip(&batch.views) {
            view.add(&self.sum, &latents.f_narrow(0, i, 1)?)?;
        }
        Ok(())
    }

    /// Once all views came.
    pub(crate) fn finish(self) -> Result<Tensor> {
        Ok(self.sum.f_div(&self.windows.coverage(&self.sum, self.canvas)?)?)
    }
}
