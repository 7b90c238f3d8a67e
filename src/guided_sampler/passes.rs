//! The network's part of a step, which may be done pass by pass or by graphs.

use crate::optimizer::Optimizer;
use crate::{Denoiser, FeatureExtractor, Features, Guidance, References, Result, TotalLoss};
use tch::Tensor;

/// What latents are to come near to, and by how many steps of the optimizer.
pub(crate) struct Aim<'a> {
    pub(crate) references: &'a References<Features>,
    pub(crate) loss: &'a TotalLoss,
    /// At least 1.
    pub(crate) iterations: usize,
}

/// The three kinds of passes.
pub(crate) trait Passes<D: Denoiser, O> {
    /// As [`Denoiser::forward_guided`], without a graph of autograd.
    fn predict(&mut self, denoiser: &D, latents: &Tensor, timestep: f64, guidance: &Guidance<D::Condition>) -> Result<Tensor>;

    /// As [`FeatureExtractor::references`]. The features are good until the next call for references of these shapes.
    fn references(&mut self, extractor: &FeatureExtractor<D>, latents: &References, timestep: f64) -> Result<References<Features>>;

    /// Latents after the iterations of a fresh optimizer, and the loss before the last. The given ones, which are the callee's, may
    /// be overwritten.
    fn descents(&mut self, extractor: &FeatureExtractor<D>, latents: Tensor, timestep: f64, aim: &Aim, optimizer: &mut O)
        -> Result<(Tensor, Tensor)>;
}

/// Each pass as the network makes it.
pub(crate) struct OneByOne;

impl<D: Denoiser, O: Optimizer> Passes<D, O> for OneByOne {
    fn predict(&mut self, denoiser: &D, latents: &Tensor, timestep: f64, guidance: &Guidance<D::Condition>) -> Result<Tensor> {
        tch::no_grad(|| denoiser.forward_guided(latents, timestep, guidance))
    }

    fn references(&mut self, extractor: &FeatureExtractor<D>, latents: &References, timestep: f64) -> Result<References<Features>> {
        extractor.references(latents, timestep)
    }

    fn descents(
        &mut self,
        extractor: &FeatureExtractor<D>,
        mut latents: Tensor,
        timestep: f64,
        aim: &Aim,
        optimizer: &mut O,
    ) -> Result<(Tensor, Tensor)> {
        optimizer.reset();
        let mut loss = extractor.descend(&mut latents, timestep, aim.references, aim.loss, optimizer)?;
        for _ in 1..aim.iterations {
            loss = extractor.descend(&mut latents, timestep, aim.references, aim.loss, optimizer)?;
        }
        Ok((latents, loss))
    }
}
