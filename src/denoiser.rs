//! What another program's pipeline implements: one forward pass with a hook in it.

use crate::scalar::WithNumber;
use crate::{AttentionHook, Error, Features, PlainAttention, Result, Seamless};
use std::ops::Range;
use tch::Tensor;

/// A noise predictor whose attention layers call a hook.
///
/// - Latents come as f32, in any shape whose first axis is the batch; the network casts, and returns its prediction
///   in the kind of the latents.
/// - A condition with a batch of 1 serves any batch of latents.
/// - Only the network's own layers call the hook (not a ControlNet's), each layer once, in execution order.
/// - An error of the hook ends the pass and is returned (or kept by a [`DeferredHook`](crate::DeferredHook)).
/// - Weights do not require gradients.
pub trait Denoiser {
    /// Text embeddings and whatever else conditions the network.
    type Condition;

    /// One forward pass. `timestep` is as the network's time embedding takes it: 0 to 1000 for Stable Diffusion,
    /// 0 to 1 for a flow.
    ///
    /// # Errors
    /// The hook's; libtorch's; the network's own as [`Error::denoiser`](crate::Error::denoiser).
    fn forward(&self, latents: &Tensor, timestep: f64, condition: &Self::Condition, hook: &mut dyn AttentionHook) -> Result<Tensor>;

    /// Classifier-free guidance, `negative + scale * (prompt - negative)`; override to run both in one batch.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn forward_guided(&self, latents: &Tensor, timestep: f64, guidance: &Guidance<Self::Condition>) -> Result<Tensor> {
        guidance.one_by_one(|condition| self.forward(latents, timestep, condition, &mut PlainAttention))
    }

    /// A scalar function of the features of latents, and its gradient by the latents, in their shape and kind: one forward
    /// pass that ends after the last of `layers`, and one backward pass. Works inside `tch::no_grad`, too. Override to hold
    /// fewer activations between the two, by gradient checkpointing; `value` is then still called once.
    ///
    /// # Errors
    /// As [`Features::extract`]; those of `value`, and a value that does not depend on the latents.
    fn gradient(
        &self,
        latents: &Tensor,
        timestep: f64,
        condition: &Self::Condition,
        layers: Range<usize>,
        value: &mut dyn FnMut(&Features) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        plain_gradient(self, latents, timestep, condition, layers, value)
    }

    /// Which opposite borders of its pictures meet, by circular padding for one; by default none. [`Windows`](crate::Windows) then
    /// make them meet on the whole canvas. Override it together with [`with_borders`](Self::with_borders).
    fn seamless(&self) -> Seamless {
        Seamless::None
    }

    /// Calls `passes` once. Meanwhile opposite borders meet along the axes of `meet` only, a subset of [`seamless`](Self::seamless)'s, since
    /// the latents are then windows, cut along all other axes. The default just runs them, as is right where no borders ever meet.
    ///
    /// # Errors
    /// Those of `passes`.
    fn with_borders(&self, _meet: Seamless, passes: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        passes()
    }

    /// How many references may be shown in one pass, under a condition that serves any batch. 1, the default, is always right; more is
    /// faster where a device is not kept busy by one, and takes their memory.
    fn references_at_once(&self) -> usize {
        1
    }

    /// The batch that a condition is made for: several prompts, say, serve as many pictures, in their order. 1, the default, serves any batch.
    fn condition_batch(&self, _condition: &Self::Condition) -> i64 {
        1
    }
}

/// [`Denoiser::gradient`] by a graph of the whole pass.
pub(crate) fn plain_gradient<D: Denoiser + ?Sized>(
    denoiser: &D,
    latents: &Tensor,
    timestep: f64,
    condition: &D::Condition,
    layers: Range<usize>,
    value: &mut dyn FnMut(&Features) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    tch::with_grad(|| {
        let leaf = latents.f_detach()?.f_set_requires_grad(true)?;
        let value = value(&Features::extract(denoiser, &leaf, timestep, condition, layers)?)?;
        if !value.requires_grad() {
            return Err(independent());
        }
        let gradients = Tensor::f_run_backward(&[&value], &[&leaf], false, false)?;
        let gradient = gradients.into_iter().next().filter(Tensor::defined).ok_or_else(independent)?;
        Ok((value.f_detach()?, gradient))
    })
}

pub(crate) fn independent() -> Error {
    Error::argument("loss", "does not depend on the latents")
}

/// What to draw, what to avoid, how strongly.
#[derive(Debug)]
pub struct Guidance<C> {
    /// What to draw.
    pub prompt: C,
    /// What to avoid; with none, `scale` is without effect.
    pub negative: Option<C>,
    /// 1 draws the prompt alone and leaves the negative out, 0 the negative alone; the usual 5 to 10 go beyond the prompt.
    pub scale: f64,
}

impl<C> Guidance<C> {
    /// Classifier-free guidance away from `negative`.
    ///
    /// # Errors
    /// A scale that is negative, infinite or NaN.
    pub fn new(prompt: C, negative: C, scale: f64) -> Result<Self> {
        let guidance = Self { prompt, negative: Some(negative), scale };
        guidance.check()?;
        Ok(guidance)
    }

    /// The prompt alone, one forward pass per prediction.
    pub fn none(prompt: C) -> Self {
        Self { prompt, negative: None, scale: 1.0 }
    }

    /// Fields may be set to anything; a run asks before each step.
    ///
    /// # Errors
    /// A scale that is negative, infinite or NaN.
    pub fn check(&self) -> Result<()> {
        if self.scale.is_finite() && self.scale >= 0.0 {
            Ok(())
        } else {
            Err(Error::argument("guidance", format!("{} is not a number of at least 0; 1 is none, 7.5 is usual", self.scale)))
        }
    }

    /// The negative, unless it is without effect.
    pub(crate) fn active_negative(&self) -> Option<&C> {
        self.negative.as_ref().filter(|_| self.scale != 1.0)
    }

    /// A pass for the prompt, and one for the negative where it counts.
    pub(crate) fn one_by_one(&self, mut pass: impl FnMut(&C) -> Result<Tensor>) -> Result<Tensor> {
        let prompt = pass(&self.prompt)?;
        match self.active_negative() {
            None => Ok(prompt),
            Some(negative) => self.combine(&prompt, &pass(negative)?),
        }
    }

    /// `negative + scale * (prompt - negative)`.
    pub(crate) fn combine(&self, prompt: &Tensor, negative: &Tensor) -> Result<Tensor> {
        Ok(negative.f_add(&prompt.f_sub(negative)?.times(self.scale)?)?)
    }
}

macro_rules! by_pointer {
    ($($pointer:ty),*) => {$(
        impl<D: Denoiser + ?Sized> Denoiser for $pointer {
            type Condition = D::Condition;
            fn forward(&self, latents: &Tensor, timestep: f64, condition: &D::Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
                (**self).forward(latents, timestep, condition, hook)
            }
            fn forward_guided(&self, latents: &Tensor, timestep: f64, guidance: &Guidance<D::Condition>) -> Result<Tensor> {
                (**self).forward_guided(latents, timestep, guidance)
            }
            fn gradient(
                &self,
                latents: &Tensor,
                timestep: f64,
                condition: &D::Condition,
                layers: Range<usize>,
                value: &mut dyn FnMut(&Features) -> Result<Tensor>,
            ) -> Result<(Tensor, Tensor)> {
                (**self).gradient(latents, timestep, condition, layers, value)
            }
            fn seamless(&self) -> Seamless {
                (**self).seamless()
            }
            fn with_borders(&self, meet: Seamless, passes: &mut dyn FnMut() -> Result<()>) -> Result<()> {
                (**self).with_borders(meet, passes)
            }
            fn references_at_once(&self) -> usize {
                (**self).references_at_once()
            }
            fn condition_batch(&self, condition: &D::Condition) -> i64 {
                (**self).condition_batch(condition)
            }
        }
    )*};
}
by_pointer!(&D, Box<D>, std::rc::Rc<D>, std::sync::Arc<D>);
