//! Settings of a task, as the authors ship them, and as a model's folder may overrule them.

use crate::{Error, Result};
use std::ops::Range;

/// How a task is run. `Settings::style_transfer()` and its like are the authors' for Stable Diffusion; a model folder's
/// `attention_distillation.json` may overrule them.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Settings {
    /// Self-attention layers in execution order from 0; none means the network's last six.
    pub layers: Option<Range<usize>>,
    /// `(height, width)` in pixels, where no picture says otherwise; none means the model's training size.
    pub size: Option<(i64, i64)>,
    /// Timesteps.
    pub steps: usize,
    /// Adam steps per timestep.
    pub iterations: usize,
    /// Adam's.
    pub learning_rate: f64,
    /// Of the content loss: 0 lets the layout go, 1 hardly changes the picture.
    pub content_weight: f64,
}

impl Settings {
    /// Style and appearance transfer by optimisation.
    pub fn style_transfer() -> Self {
        Self { layers: None, size: None, steps: 200, iterations: 1, learning_rate: 0.05, content_weight: 0.25 }
    }

    /// Texture synthesis by optimisation, from noise.
    pub fn texture_synthesis() -> Self {
        Self { steps: 300, content_weight: 0.0, ..Self::style_transfer() }
    }

    /// Before a long run: what would otherwise be found out in the middle of it.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the setting that is out of range.
    pub fn check(&self) -> Result<()> {
        if let Some(layers) = &self.layers {
            if layers.is_empty() {
                return Err(Error::argument("layers", format!("{}..{} is empty; the first must be below the second", layers.start, layers.end)));
            }
        }
        if let Some(size) = self.size {
            crate::image::check_size(size)?;
        }
        for (name, count) in [("steps", self.steps), ("iterations", self.iterations)] {
            if count == 0 {
                return Err(Error::argument(name, "0 would leave the picture as it is; use at least 1"));
            }
        }
        for (name, number) in [("learning rate", self.learning_rate), ("content weight", self.content_weight)] {
            if !(number.is_finite() && number >= 0.0) {
                return Err(Error::argument(name, format!("{number} is not a number of at least 0")));
            }
        }
        Ok(())
    }
}
