//! One timestep of guided sampling: of whole pictures at once, or view by view.

use super::GuidedSampler;
use crate::optimizer::copy;
use crate::scalar::WithNumber;
use crate::windows::{Batch, Mean};
use crate::{Denoiser, Error, Features, LabelMap, Noise, Optimizer, References, Result, Scheduler, Windows};
use tch::{Kind, Tensor};

/// What descents are held to, at the timestep that they happen at; made by the first of them.
#[derive(Default)]
struct Targets {
    /// The noised styles that AdaIN takes its statistics from.
    adain: Option<References>,
    /// The styles' features under other noise, and the noised content, whole.
    references: Option<(References<Features>, Option<Tensor>)>,
}

impl<D: Denoiser, O: Optimizer> GuidedSampler<D, O> {
    /// Replaces the latents only when all went well.
    pub(super) fn one(&mut self, timestep: f64) -> Result<Option<Tensor>> {
        if self.start_time.is_nan() {
            return Err(Error::argument("start time", "NaN is not a timestep"));
        }
        self.guidance.check()?;
        let before = self.latents.f_to_kind(Kind::Float)?;
        let (after, loss) = match self.windows {
            None => self.further(&before, timestep, None, &mut Targets::default())?,
            Some(windows) => self.by_views(&before, timestep, windows)?,
        };
        self.latents = self.soundness.judge(&self.latents, after, loss.as_ref(), self.step + 1, timestep)?;
        Ok(loss)
    }

    /// MultiDiffusion: each view of the canvas for itself, then their mean; and the mean of their losses.
    fn by_views(&mut self, canvas: &Tensor, timestep: f64, windows: Windows) -> Result<(Tensor, Option<Tensor>)> {
        let (mut mean, batches) = Mean::new(windows, canvas)?;
        let references =
            self.references.styles.iter().map(|style| ("style", &style.of)).chain(self.references.content.iter().map(|of| ("content", of)));
        for (name, of) in references {
            // In a batch of as many views it would be taken for one each.
            if of.size().first() != Some(&1) {
                return Err(Error::shape(name, "a batch of 1, which serves all views", of.size()));
            }
        }
        let mut targets = Targets::default();
        let (mut count, mut total) = (0, None);
        for batch in batches {
            if windows.reference_per_batch {
                targets = Targets::default();
            }
            let (latents, loss) = self.further(&batch.cut(canvas)?, timestep, Some(&batch), &mut targets)?;
            mean.add(&batch, &latents)?;
            count += batch.len();
            // A loss is itself a mean over its batch, and the last batch may be smaller.
            let loss = loss.map(|loss| loss.times(batch.len() as f64)).transpose()?;
            total = match (total, loss) {
                (Some(total), Some(loss)) => Some(Tensor::f_add(&total, &loss)?),
                (_, loss) => loss,
            };
        }
        Ok((mean.finish()?, total.map(|total| total.over(count as f64)).transpose()?))
    }

    /// Latents, whole or a batch of views, one timestep further; and the loss of the last iteration, where there is one.
    fn further(&mut self, before: &Tensor, timestep: f64, views: Option<&Batch>, targets: &mut Targets) -> Result<(Tensor, Option<Tensor>)> {
        let mut latents = tch::no_grad(|| {
            let prediction = self.extractor.denoiser.forward_guided(before, timestep, &self.guidance)?;
            self.scheduler.step(self.step, &prediction, before)
        })?;
        if self.iterations == 0 || timestep >= self.start_time {
            return Ok((latents, None));
        }
        let next = self.scheduler.next_timestep(self.step);
        let labels = match (&self.references.labels, views) {
            (Some(labels), Some(views)) => Some(views.cut_labels(labels)?),
            (labels, _) => labels.as_ref().map(LabelMap::shallow_clone),
        };
        if self.adain {
            let styles = match &mut targets.adain {
                Some(styles) => styles,
                none => none.insert(self.noised_styles(next)?),
            };
            styles.labels = labels.as_ref().map(LabelMap::shallow_clone);
            latents = tch::no_grad(|| styles.adain(&latents))?;
        } else {
            // The optimizer works in place, and a scheduler may hand on what it was given.
            latents = copy(&latents)?;
        }
        let (styles, content) = match &mut targets.references {
            Some(references) => references,
            none => none.insert(self.noised_references(next)?),
        };
        let mut references = self.references_of_views(styles, content.as_ref(), next, views)?;
        references.labels = labels;
        self.optimizer.reset();
        let mut loss = None;
        for _ in 0..self.iterations {
            loss = Some(self.extractor.descend(&mut latents, next, &references, &self.loss, &mut self.optimizer)?);
        }
        Ok((latents, loss))
    }

    fn noised_styles(&mut self, timestep: f64) -> Result<References> {
        self.references.try_map_styles(|clean| noised(self.scheduler.as_ref(), &mut self.noise, clean, timestep))
    }

    /// The styles' features and the content's latents; the noise of all is drawn before the first pass.
    fn noised_references(&mut self, timestep: f64) -> Result<(References<Features>, Option<Tensor>)> {
        let mut all = self.references.try_map_counted(|clean| noised(self.scheduler.as_ref(), &mut self.noise, clean, timestep))?;
        let content = all.content.take();
        Ok((self.extractor.references(&all, timestep)?, content))
    }

    /// The references of these views, or of whole pictures, but for the labels. Styles serve all views; the content, which belongs
    /// to places of the canvas, is cut here as the canvas was.
    fn references_of_views(
        &self,
        styles: &References<Features>,
        content: Option<&Tensor>,
        timestep: f64,
        views: Option<&Batch>,
    ) -> Result<References<Features>> {
        let mut references = styles.shallow_clone();
        let features = |content: &Tensor| {
            let content = views.map(|views| views.cut_if_of_canvas(content)).transpose()?.unwrap_or_else(|| content.shallow_clone());
            tch::no_grad(|| self.extractor.extract(&content, timestep))
        };
        references.content = content.map(features).transpose()?;
        Ok(references)
    }
}

/// Clean latents as they would be at a timestep.
fn noised(scheduler: &dyn Scheduler, noise: &mut Noise, clean: &Tensor, timestep: f64) -> Result<Tensor> {
    let drawn = noise.draw(clean)?;
    tch::no_grad(|| scheduler.add_noise(clean, &drawn, timestep))
}
