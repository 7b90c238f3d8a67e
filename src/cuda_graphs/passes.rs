//! The passes of guided sampling, captured when they first come.

use super::capturable::Capturable;
use super::statics::{all_latents, Look, Prediction, Statics};
use super::Recorder;
use crate::guided_sampler::{Aim, OneByOne, Passes};
use crate::{Adam, FeatureExtractor, Features, Guidance, References, Result};
use tch::Tensor;

/// A graph, and the tensors that it works on, which are dropped after it.
struct Kept<G, S> {
    graph: G,
    statics: S,
}

/// All that a run has captured so far: of each kind of pass one for each shape, and styles and content are looked at apart.
pub(super) struct Captured<G> {
    predictions: Vec<Kept<G, Prediction>>,
    looks: Vec<Kept<G, Look>>,
    descents: Vec<Kept<G, Statics>>,
}

impl<G> Default for Captured<G> {
    fn default() -> Self {
        Self { predictions: vec![], looks: vec![], descents: vec![] }
    }
}

impl<G> Captured<G> {
    pub(super) fn count(&self) -> usize {
        self.predictions.len() + self.looks.len() + self.descents.len()
    }
}

/// By what was captured of a run whose fields have not changed since.
pub(super) struct ByGraphs<'a, R: Recorder> {
    pub(super) captured: &'a mut Captured<R::Graph>,
    pub(super) recorder: &'a mut R,
    pub(super) in_windows: bool,
}

// SAFETY, of all captures and replays here: what the work reads and writes are the statics, which are kept beside the graph and dropped
// after it, and the run's network, conditions and loss, which GraphedSampler drops after all graphs and gives nobody to change while they
// are there. (Somebody who changes them through handles of his own breaks what GraphedSampler asks for.) All graphs are of one recorder.
#[allow(unsafe_code)]
impl<D: Capturable, R: Recorder> Passes<D, Adam> for ByGraphs<'_, R> {
    fn predict(&mut self, denoiser: &D, latents: &Tensor, timestep: f64, guidance: &Guidance<D::Condition>) -> Result<Tensor> {
        let mut conditions = std::iter::once(&guidance.prompt).chain(guidance.active_negative());
        if !conditions.all(|condition| denoiser.can_capture(condition)) {
            return Passes::<D, Adam>::predict(&mut OneByOne, denoiser, latents, timestep, guidance);
        }
        let Self { captured, recorder, .. } = self;
        let work = |statics: &mut Prediction| statics.predict(denoiser, guidance);
        let mut kept = match take(&mut captured.predictions, |statics| statics.fits(latents)) {
            Some(kept) => kept,
            None => {
                let mut statics = Prediction::new(latents)?;
                statics.load(latents, timestep)?;
                // SAFETY: above.
                let graph = unsafe { recorder.capture(latents.device(), &mut || work(&mut statics)) }?;
                Kept { graph, statics }
            }
        };
        kept.statics.load(latents, timestep)?;
        // SAFETY: above.
        unsafe { recorder.replay(&mut kept.graph, &mut || work(&mut kept.statics)) }?;
        let predicted = kept.statics.result();
        captured.predictions.push(kept);
        predicted
    }

    fn references(&mut self, extractor: &FeatureExtractor<D>, latents: &References, timestep: f64) -> Result<References<Features>> {
        // None where a content, which is looked at apart, is all there is.
        let Some(device) = all_latents(latents).next().map(Tensor::device) else { return extractor.references(latents, timestep) };
        let Self { captured, recorder, .. } = self;
        let work = |statics: &mut Look| statics.look(extractor);
        let mut kept = match take(&mut captured.looks, |statics| statics.fits(latents)) {
            Some(kept) => kept,
            None => {
                let mut statics = Look::new(latents, &extractor.references(latents, timestep)?, device)?;
                statics.load(latents, timestep)?;
                // SAFETY: above.
                let graph = unsafe { recorder.capture(device, &mut || work(&mut statics)) }?;
                Kept { graph, statics }
            }
        };
        kept.statics.load(latents, timestep)?;
        // SAFETY: above.
        unsafe { recorder.replay(&mut kept.graph, &mut || work(&mut kept.statics)) }?;
        let features = kept.statics.features();
        captured.looks.push(kept);
        Ok(features)
    }

    fn descents(
        &mut self,
        extractor: &FeatureExtractor<D>,
        latents: Tensor,
        timestep: f64,
        aim: &Aim,
        optimizer: &mut Adam,
    ) -> Result<(Tensor, Tensor)> {
        if self.in_windows && aim.references.labels.is_some() {
            return OneByOne.descents(extractor, latents, timestep, aim, optimizer);
        }
        let Self { captured, recorder, .. } = self;
        let work = |statics: &mut Statics| statics.descend(extractor, aim.loss);
        let fresh = Adam::new(optimizer.config);
        let mut kept = match take(&mut captured.descents, |statics| statics.fits(&latents)) {
            Some(kept) => kept,
            None => {
                let mut statics = Statics::new(&latents, optimizer.config, aim.references)?;
                statics.load(&latents, &fresh, timestep)?;
                // SAFETY: above.
                let graph = unsafe { recorder.capture(latents.device(), &mut || work(&mut statics)) }?;
                Kept { graph, statics }
            }
        };
        kept.statics.load(&latents, &fresh, timestep)?;
        kept.statics.take(aim.references)?;
        for _ in 0..aim.iterations {
            // SAFETY: above.
            unsafe { recorder.replay(&mut kept.graph, &mut || work(&mut kept.statics)) }?;
        }
        let outcome = kept.statics.result();
        captured.descents.push(kept);
        outcome
    }
}

/// What fits is taken out, to be put back if all goes well.
fn take<G, S>(all: &mut Vec<Kept<G, S>>, fits: impl Fn(&S) -> bool) -> Option<Kept<G, S>> {
    all.iter().position(|kept| fits(&kept.statics)).map(|at| all.swap_remove(at))
}
