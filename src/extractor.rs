//! The network as a measure of pictures: four calls make the method, and the runs are loops over them.

use crate::scalar::WithNumber;
use crate::{Denoiser, Error, FeatureRecorder, Features, Loss, Optimizer, References, Result};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Gradients of a mean over a million features are below f16's smallest number; the loss is scaled by this
/// before the backward pass of an f16 network, and the gradient back afterwards, in f32.
const HALF_LOSS_SCALE: f64 = 65536.0;

/// A network, seen through some of its self-attention layers under the null prompt.
#[derive(Debug)]
pub struct FeatureExtractor<D: Denoiser> {
    /// A network, or any pointer to one.
    pub denoiser: D,
    /// The null prompt.
    pub condition: D::Condition,
    /// Self-attention layers, counted in execution order from 0. The paper's are the last six.
    pub layers: Range<usize>,
}

impl<D: Denoiser> FeatureExtractor<D> {
    /// A network under its null prompt.
    pub fn new(denoiser: D, condition: D::Condition, layers: Range<usize>) -> Self {
        Self { denoiser, condition, layers }
    }

    /// The features of latents at a timestep: one forward pass that ends after the last of the layers. Differentiable
    /// where `latents` is.
    ///
    /// # Errors
    /// As [`Features::extract`].
    pub fn extract(&self, latents: &Tensor, timestep: f64) -> Result<Features> {
        check_timestep(timestep)?;
        Features::extract(&self.denoiser, latents, timestep, &self.condition, self.layers.clone())
    }

    /// The features of references, without a graph: one forward pass each, which ends before the last layer's
    /// [output](crate::LayerFeatures::output), and none for what is in a style's [cache](crate::FeatureCache). Styles of weight 0 are left out.
    ///
    /// # Errors
    /// As [`Features::extract`].
    pub fn references(&self, latents: &References, timestep: f64) -> Result<References<Features>> {
        let mut features = latents.try_map_styles(|style| match &style.cache {
            Some(cache) => cache.features(timestep, &self.layers, || self.reference(&style.of, timestep)),
            None => self.reference(&style.of, timestep),
        })?;
        features.content = latents.content.as_ref().map(|content| self.reference(content, timestep)).transpose()?;
        Ok(features)
    }

    /// The features of one reference.
    pub(crate) fn reference(&self, latents: &Tensor, timestep: f64) -> Result<Features> {
        check_timestep(timestep)?;
        let recorder = FeatureRecorder::new(self.layers.clone()).without_outputs();
        tch::no_grad(|| recorder.record(&self.denoiser, latents, timestep, &self.condition))
    }

    /// The loss (a scalar, still on its device) and its gradient by `latents` (in their shape and kind): one forward
    /// and one backward pass. Works inside `tch::no_grad`, too.
    ///
    /// # Errors
    /// As [`Features::extract`] and [`Loss::evaluate`].
    pub fn gradient(&self, latents: &Tensor, timestep: f64, references: &References<Features>, loss: &dyn Loss) -> Result<(Tensor, Tensor)> {
        check_timestep(timestep)?;
        let mut scale = 1.0;
        let mut evaluate = |features: &Features| {
            let value = loss.evaluate(features, references)?;
            if features.layers().any(|layer| matches!(layer.query.f_kind(), Ok(Kind::Half))) {
                scale = HALF_LOSS_SCALE;
                return value.times(scale);
            }
            Ok(value)
        };
        let (value, gradient) = self.denoiser.gradient(latents, timestep, &self.condition, self.layers.clone(), &mut evaluate)?;
        if scale == 1.0 {
            return Ok((value, gradient));
        }
        Ok((value.over(scale)?, gradient.over(scale)?))
    }

    /// One step of `optimizer` on `latents`, in place; returns the loss before it (a scalar, still on its device).
    ///
    /// # Errors
    /// As [`gradient`](Self::gradient) and [`Optimizer::step`]; the latents are then as they were.
    pub fn descend(
        &self,
        latents: &mut Tensor,
        timestep: f64,
        references: &References<Features>,
        loss: &dyn Loss,
        optimizer: &mut dyn Optimizer,
    ) -> Result<Tensor> {
        let (value, gradient) = self.gradient(latents, timestep, references, loss)?;
        optimizer.step(latents, &gradient)?;
        Ok(value)
    }
}

fn check_timestep(timestep: f64) -> Result<()> {
    if timestep.is_finite() {
        Ok(())
    } else {
        Err(Error::argument("timestep", format!("{timestep} is not a number")))
    }
}
