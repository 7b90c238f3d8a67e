//! What conditions the U-Net.

use super::Control;
use tch::Tensor;

/// Encoded prompts. A batch of 1 serves any batch of latents.
#[derive(Debug)]
#[non_exhaustive]
pub struct Condition {
    /// `(batch, tokens, cross_attention_dim)`.
    pub text: Tensor,
    /// SDXL: pooled text, `(batch, width)`.
    pub pooled: Option<Tensor>,
    /// SDXL: original size, crop, target size, each `(height, width)` in pixels, `(batch, 6)`.
    pub time_ids: Option<Tensor>,
    /// Control pictures; a [`StableDiffusion`](super::StableDiffusion) follows them, a bare [`UNet`](super::UNet) refuses
    /// them.
    pub controls: Vec<Control>,
}

impl Condition {
    /// Text alone, as Stable Diffusion 1 and 2 want it.
    pub fn new(text: Tensor) -> Self {
        Self { text, pooled: None, time_ids: None, controls: vec![] }
    }

    /// With what SDXL wants beside the text.
    #[must_use]
    pub fn with_pooled(mut self, pooled: Tensor, time_ids: Tensor) -> Self {
        (self.pooled, self.time_ids) = (Some(pooled), Some(time_ids));
        self
    }

    /// With one control picture more, see [`StableDiffusion::control`](super::StableDiffusion::control).
    #[must_use]
    pub fn with_control(mut self, control: Control) -> Self {
        self.controls.push(control);
        self
    }

    /// For how many latents it is; 1 serves any batch.
    pub(crate) fn batch(&self) -> i64 {
        let tensors = std::iter::once(&self.text).chain(&self.pooled).chain(&self.time_ids);
        tensors.filter_map(|tensor| tensor.size().first().copied()).chain(self.controls.iter().map(Control::batch)).max().unwrap_or(1)
    }

    /// Whether both are handles on the same tensors, with controls that do the same.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let same = |a: &Tensor, b: &Tensor| a.data_ptr() == b.data_ptr() && a.size() == b.size();
        let both = |a: &Option<Tensor>, b: &Option<Tensor>| match (a, b) {
            (Some(a), Some(b)) => same(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        same(&self.text, &other.text) && both(&self.pooled, &other.pooled) && both(&self.time_ids, &other.time_ids) && self.same_controls(other)
    }

    pub(crate) fn same_controls(&self, other: &Self) -> bool {
        self.controls.len() == other.controls.len() && self.controls.iter().zip(&other.controls).all(|(a, b)| a.same(b))
    }

    /// A second handle on the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            text: self.text.shallow_clone(),
            pooled: self.pooled.as_ref().map(Tensor::shallow_clone),
            time_ids: self.time_ids.as_ref().map(Tensor::shallow_clone),
            controls: self.controls.iter().map(Control::shallow_clone).collect(),
        }
    }
}
