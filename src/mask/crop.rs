//! Parts of a map under views of its picture.

use super::LabelMap;
use crate::windows::{joined, pieces};
use crate::{image, Error, Result};
use std::sync::PoisonError;
use tch::Tensor;

/// A latent's pixels, usually.
const PIXELS: i64 = 64;

impl LabelMap {
    /// The parts of one map under views of its picture, one map of the batch for each view. `canvas` is the picture's size in
    /// latents, `(height, width)`; so are the views, `[top, left, height, width]`, all of one size. The map is brought to whole
    /// pixels for each latent; that is done once for a canvas, and not at all for a map of a multiple of its size.
    ///
    /// # Errors
    /// A batch of maps; no view; a view that is empty or beyond the canvas, or of another size than the first;
    /// a map that is much shorter than the canvas along one side, and much longer along the other.
    pub fn crop(&self, canvas: (i64, i64), views: impl IntoIterator<Item = [i64; 4]>) -> Result<Self> {
        let inside = |start: i64, length: i64, side: i64| start >= 0 && length > 0 && start <= side - length;
        self.parts(canvas, views, inside)
    }

    /// The same of a canvas whose borders meet: views may go on at the other one.
    pub(crate) fn crop_around(&self, canvas: (i64, i64), views: impl IntoIterator<Item = [i64; 4]>) -> Result<Self> {
        self.parts(canvas, views, |start, length, side| (0..side).contains(&start) && (1..=side).contains(&length))
    }

    fn parts(&self, canvas: (i64, i64), views: impl IntoIterator<Item = [i64; 4]>, inside: impl Fn(i64, i64, i64) -> bool) -> Result<Self> {
        image::check_size(canvas)?;
        if self.batch()? != 1 {
            return Err(Error::shape("labels", "(1, ..): views are of one picture", self.tensor().size()));
        }
        // Whole pixels for each latent, or the views' parts would have different sizes.
        let (height, width) = self.size()?;
        let scale = ((height + canvas.0 - 1) / canvas.0, (width + canvas.1 - 1) / canvas.1);
        let whole = self.of_canvas(canvas, (scale.0 * canvas.0, scale.1 * canvas.1))?;
        let mut parts: Vec<Tensor> = vec![];
        for [top, left, height, width] in views {
            if !(inside(top, height, canvas.0) && inside(left, width, canvas.1)) {
                let view = format!("{height}x{width} at {top}, {left}");
                return Err(Error::argument("view", format!("{view} is not within {}x{} latents", canvas.0, canvas.1)));
            }
            let rows = joined(&whole, 2, pieces(top * scale.0, height * scale.0, canvas.0 * scale.0))?;
            let part = joined(&rows, 3, pieces(left * scale.1, width * scale.1, canvas.1 * scale.1))?;
            if let Some(first) = parts.first().filter(|first| first.size() != part.size()) {
                return Err(Error::shape("view", format!("that of the first, {:?} in pixels of the map", first.size()), part.size()));
            }
            parts.push(part);
        }
        if parts.is_empty() {
            return Err(Error::argument("views", "there are none"));
        }
        self.with_tensor(Tensor::f_cat(&parts, 0)?)
    }

    /// The map in `size` pixels, kept for the next views of the same canvas.
    fn of_canvas(&self, canvas: (i64, i64), size: (i64, i64)) -> Result<Tensor> {
        let (height, width) = self.size()?;
        if size == (height, width) {
            return self.at(size);
        }
        let area = |(height, width): (i64, i64)| height.saturating_mul(width);
        // Sides that the canvas makes longer are no longer than its own, others less than twice the map's: more than four times the
        // area has only what is stretched one way alone.
        if area(size) > area((height, width)).max(area(canvas).saturating_mul(PIXELS)).saturating_mul(4) {
            let reason = format!(
                "{width}x{height} pixels over {}x{} latents would be brought to {}x{}; bring them nearer to the picture's size by `LabelMap::resized`",
                canvas.1, canvas.0, size.1, size.0
            );
            return Err(Error::argument("labels", reason));
        }
        let mut kept = self.identity().0.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.as_ref() {
            Some((at, whole)) if *at == size => Ok(whole.shallow_clone()),
            _ => {
                tracing::debug!(height = size.0, width = size.1, "labels are brought to a canvas");
                let whole = self.at(size)?;
                *kept = Some((size, whole.shallow_clone()));
                Ok(whole)
            }
        }
    }
}
