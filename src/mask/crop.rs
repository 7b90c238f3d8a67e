//! Parts of a map under views of its picture.

use super::LabelMap;
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
            let inside = |start: i64, length: i64, side: i64| start >= 0 && length > 0 && start <= side - length;
            if !(inside(top, height, canvas.0) && inside(left, width, canvas.1)) {
                let view = format!("{height}x{width} at {top}, {left}");
                return Err(Error::argument("view", format!("{view} is not within {}x{} latents", canvas.0, canvas.1)));
            }
            let part = whole.f_narrow(2, top * scale.0, height * scale.0)?.f_narrow(3, left * scale.1, width * scale.1)?;
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

    /// A canvas that goes on at its other border, by so many rows and columns: its map, as [`crop`](Self::crop) scales that.
    pub(crate) fn gone_on(&self, canvas: (i64, i64), (rows, columns): (i64, i64)) -> Result<Self> {
        let (height, width) = self.size()?;
        let scale = ((height + canvas.0 - 1) / canvas.0, (width + canvas.1 - 1) / canvas.1);
        let whole = self.of_canvas(canvas, (scale.0 * canvas.0, scale.1 * canvas.1))?;
        let taller = Tensor::f_cat(&[&whole, &whole.f_narrow(2, 0, rows * scale.0)?], 2)?;
        self.with_tensor(Tensor::f_cat(&[&taller, &taller.f_narrow(3, 0, columns * scale.1)?], 3)?)
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
                let whole = self.at(size)?;
                *kept = Some((size, whole.shallow_clone()));
                Ok(whole)
            }
        }
    }
}
