//! Networks that take their timestep as a tensor.

use crate::denoiser::plain_gradient;
use crate::{AttentionHook, Denoiser, FeatureExtractor, Features, Guidance, PlainAttention, Result, Seamless};
use std::ops::Range;
use tch::Tensor;

/// A denoiser whose passes a graph may repeat: what it computes depends on the contents of tensors alone.
///
/// A graph repeats kernels, not the code that queued them. So a pass must not copy between CPU and GPU, must not read a
/// number back, and must find its weights and condition where they were. A network that breaks this fails while it is
/// captured; one that turns a number of the CPU into kernels, as [`Denoiser::forward`] does with its timestep, would be
/// repeated with the number that it was captured with.
///
/// # Safety
/// A graph reads addresses. The tensors of the network that passes read (weights, what it keeps between passes) must stay alive, in their places of
/// memory, for as long as the network is there and shared: nothing that a shared borrow allows may free or replace one, as `set_data` does. Writing into
/// them is allowed. Conditions are the caller's, see [`GraphedDistiller`](super::GraphedDistiller).
#[allow(unsafe_code)] // Only declared here.
pub unsafe trait Capturable: Denoiser {
    /// [`Denoiser::forward`] with the timestep as a tensor, `(1)` in f32 on the device of the latents: the same prediction.
    ///
    /// # Errors
    /// As [`Denoiser::forward`].
    fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &Self::Condition, hook: &mut dyn AttentionHook) -> Result<Tensor>;

    /// [`Denoiser::forward_guided`] likewise. Override it together with that.
    ///
    /// # Errors
    /// As [`Denoiser::forward_guided`].
    fn forward_guided_at(&self, latents: &Tensor, timestep: &Tensor, guidance: &Guidance<Self::Condition>) -> Result<Tensor> {
        guidance.one_by_one(|condition| self.forward_at(latents, timestep, condition, &mut PlainAttention))
    }

    /// Whether noise predictions under this condition may be captured, as they may by default; those under others are made by
    /// [`Denoiser::forward_guided`]. Override it where what the network does under a condition depends on more than its tensors.
    fn can_capture(&self, _condition: &Self::Condition) -> bool {
        true
    }

    /// [`Denoiser::gradient`] likewise. Override it together with that.
    ///
    /// # Errors
    /// As [`Denoiser::gradient`].
    fn gradient_at(
        &self,
        latents: &Tensor,
        timestep: &Tensor,
        condition: &Self::Condition,
        layers: Range<usize>,
        value: &mut dyn FnMut(&Features) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        plain_gradient_at(self, latents, timestep, condition, layers, value)
    }
}

/// [`Capturable::gradient_at`] by a graph of the whole pass.
pub(crate) fn plain_gradient_at<D: Capturable + ?Sized>(
    denoiser: &D,
    latents: &Tensor,
    timestep: &Tensor,
    condition: &D::Condition,
    layers: Range<usize>,
    value: &mut dyn FnMut(&Features) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    plain_gradient(&At { denoiser, timestep }, latents, NO_NUMBER, &condition, layers, value)
}

macro_rules! by_pointer {
    ($($pointer:ty),*) => {$(
        // SAFETY: what it points at keeps its tensors where they are.
        #[allow(unsafe_code)]
        unsafe impl<D: Capturable + ?Sized> Capturable for $pointer {
            fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &D::Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
                (**self).forward_at(latents, timestep, condition, hook)
            }
            fn forward_guided_at(&self, latents: &Tensor, timestep: &Tensor, guidance: &Guidance<D::Condition>) -> Result<Tensor> {
                (**self).forward_guided_at(latents, timestep, guidance)
            }
            fn can_capture(&self, condition: &D::Condition) -> bool {
                (**self).can_capture(condition)
            }
            fn gradient_at(
                &self,
                latents: &Tensor,
                timestep: &Tensor,
                condition: &D::Condition,
                layers: Range<usize>,
                value: &mut dyn FnMut(&Features) -> Result<Tensor>,
            ) -> Result<(Tensor, Tensor)> {
                (**self).gradient_at(latents, timestep, condition, layers, value)
            }
        }
    )*};
}
by_pointer!(&D, Box<D>, std::rc::Rc<D>, std::sync::Arc<D>);

/// For the timestep that [`At`] does not look at.
pub(super) const NO_NUMBER: f64 = 0.0;

/// A network at the timestep that a tensor holds, whatever number it is asked for.
#[derive(Debug)]
pub(super) struct At<'a, D: ?Sized> {
    denoiser: &'a D,
    timestep: &'a Tensor,
}

impl<'a, D: Capturable + ?Sized> Denoiser for At<'a, D> {
    type Condition = &'a D::Condition;

    fn forward(&self, latents: &Tensor, _: f64, condition: &Self::Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        self.denoiser.forward_at(latents, self.timestep, condition, hook)
    }

    fn gradient(
        &self,
        latents: &Tensor,
        _: f64,
        condition: &Self::Condition,
        layers: Range<usize>,
        value: &mut dyn FnMut(&Features) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        self.denoiser.gradient_at(latents, self.timestep, condition, layers, value)
    }

    fn seamless(&self) -> Seamless {
        self.denoiser.seamless()
    }

    fn with_borders(&self, meet: Seamless, passes: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.denoiser.with_borders(meet, passes)
    }

    fn references_at_once(&self) -> usize {
        self.denoiser.references_at_once()
    }

    fn condition_batch(&self, condition: &Self::Condition) -> i64 {
        self.denoiser.condition_batch(condition)
    }
}

/// The same extractor at the timestep that a tensor holds.
pub(super) fn at<'a, D: Capturable>(extractor: &'a FeatureExtractor<D>, timestep: &'a Tensor) -> FeatureExtractor<At<'a, D>> {
    FeatureExtractor::new(At { denoiser: &extractor.denoiser, timestep }, &extractor.condition, extractor.layers.clone())
}
