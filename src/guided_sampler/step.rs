//! One timestep of guided sampling: of whole pictures at once, or view by view.

use super::passes::{Aim, Passes};
use super::GuidedSampler;
use crate::optimizer::copy;
use crate::scalar::WithNumber;
use crate::windows::{Batch, Mean};
use crate::{Denoiser, Error, FeatureExtractor, Features, Guidance, LabelMap, Noise, Optimizer, References, Result, Scheduler, TotalLoss, Windows};
use tch::{Kind, Tensor};

/// What descents are held to, at the timestep that they happen at; made by the first of them.
#[derive(Default)]
struct Targets {
    /// The noised styles that AdaIN takes its statistics from.
    adain: Option<References>,
    /// The styles' features under other noise, and the noised content, whole.
    references: Option<(References<Features>, Option<Tensor>)>,
}

/// The parts of a run that a step reads, and those that it changes on its way.
struct Step<'a, D: Denoiser, O> {
    passes: &'a mut dyn Passes<D, O>,
    extractor: &'a FeatureExtractor<D>,
    scheduler: &'a dyn Scheduler,
    guidance: &'a Guidance<D::Condition>,
    references: &'a References,
    loss: &'a TotalLoss,
    optimizer: &'a mut O,
    noise: &'a mut Noise,
    iterations: usize,
    adain: bool,
    start_time: f64,
    index: usize,
    timestep: f64,
}

impl<D: Denoiser, O: Optimizer> GuidedSampler<D, O> {
    /// Replaces the latents only when all went well.
    pub(super) fn one(&mut self, timestep: f64, passes: &mut dyn Passes<D, O>) -> Result<Option<Tensor>> {
        if self.start_time.is_nan() {
            return Err(Error::argument("start time", "NaN is not a timestep"));
        }
        self.guidance.check()?;
        let before = self.latents.f_to_kind(Kind::Float)?;
        let mut step = Step {
            passes,
            extractor: &self.extractor,
            scheduler: self.scheduler.as_ref(),
            guidance: &self.guidance,
            references: &self.references,
            loss: &self.loss,
            optimizer: &mut self.optimizer,
            noise: &mut self.noise,
            iterations: self.iterations,
            adain: self.adain,
            start_time: self.start_time,
            index: self.step,
            timestep,
        };
        let (after, loss) = match self.windows {
            None => step.further(&before, None, &mut Targets::default())?,
            Some(windows) => step.by_views(&before, windows)?,
        };
        self.latents = self.soundness.judge(&self.latents, after, loss.as_ref(), self.step + 1, timestep)?;
        Ok(loss)
    }
}

impl<D: Denoiser, O: Optimizer> Step<'_, D, O> {
    /// MultiDiffusion: each view of the canvas for itself, then their mean; and the mean of their losses.
    fn by_views(&mut self, canvas: &Tensor, windows: Windows) -> Result<(Tensor, Option<Tensor>)> {
        self.check_serves_all_views()?;
        let denoiser = &self.extractor.denoiser;
        let (mut mean, mut batches) = Mean::new(windows, denoiser.seamless(), canvas)?;
        let mut targets = Targets::default();
        let (mut count, mut total) = (0, None);
        denoiser.with_borders(mean.closed, &mut || {
            for batch in batches.by_ref() {
                if windows.reference_per_batch {
                    targets = Targets::default();
                }
                let (latents, loss) = self.further(&batch.cut(canvas)?, Some(&batch), &mut targets)?;
                mean.add(&batch, &latents)?;
                count += batch.len();
                // A loss is itself a mean over its batch, and the last batch may be smaller.
                let loss = loss.map(|loss| loss.times(batch.len() as f64)).transpose()?;
                total = match (total.take(), loss) {
                    (Some(total), Some(loss)) => Some(Tensor::f_add(&total, &loss)?),
                    (_, loss) => loss,
                };
            }
            Ok(())
        })?;
        if count == 0 {
            return Err(Error::argument("denoiser", "its `with_borders` did not run the passes that it was given"));
        }
        Ok((mean.finish()?, total.map(|total| total.over(count as f64)).transpose()?))
    }

    /// In a batch of as many views, what there is several times would be taken for one each.
    fn check_serves_all_views(&self) -> Result<()> {
        let styles = &self.references.styles;
        let clean = styles.iter().map(|style| ("style", &style.of)).chain(self.references.content.iter().map(|of| ("content", of)));
        for (name, of) in clean {
            if of.size().first() != Some(&1) {
                return Err(Error::shape(name, "a batch of 1, which serves all views", of.size()));
            }
        }
        for map in styles.iter().filter_map(|style| style.labels.as_ref()).chain(&self.references.labels) {
            if map.batch()? != 1 {
                return Err(Error::argument("labels", format!("are {} maps; views of one picture want one, for all of them", map.batch()?)));
            }
        }
        let guidance = [("prompt", Some(&self.guidance.prompt)), ("negative prompt", self.guidance.active_negative())];
        for (name, condition) in guidance.into_iter().chain([("null prompt", Some(&self.extractor.condition))]) {
            let batch = condition.map_or(1, |condition| self.extractor.denoiser.condition_batch(condition));
            if batch != 1 {
                return Err(Error::argument(name, format!("is a batch of {batch}; windows make one picture, of one prompt, run after run")));
            }
        }
        Ok(())
    }

    /// Latents, whole or a batch of views, one timestep further; and the loss of the last iteration, where there is one.
    fn further(&mut self, before: &Tensor, views: Option<&Batch>, targets: &mut Targets) -> Result<(Tensor, Option<Tensor>)> {
        let prediction = self.passes.predict(&self.extractor.denoiser, before, self.timestep, self.guidance)?;
        let mut latents = tch::no_grad(|| self.scheduler.step(self.index, &prediction, before))?;
        if self.iterations == 0 || self.timestep >= self.start_time {
            return Ok((latents, None));
        }
        let next = self.scheduler.next_timestep(self.index);
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
        let aim = Aim { references: &references, loss: self.loss, iterations: self.iterations };
        let (latents, loss) = self.passes.descents(self.extractor, latents, next, &aim, self.optimizer)?;
        Ok((latents, Some(loss)))
    }

    fn noised_styles(&mut self, timestep: f64) -> Result<References> {
        self.references.try_map_styles(|clean| noised(self.scheduler, self.noise, &clean.of, timestep))
    }

    /// The styles' features and the content's latents; the noise of all is drawn before the first pass.
    fn noised_references(&mut self, timestep: f64) -> Result<(References<Features>, Option<Tensor>)> {
        let mut all = self.references.try_map_counted(|clean| noised(self.scheduler, self.noise, clean, timestep))?;
        let content = all.content.take();
        Ok((self.passes.references(self.extractor, &all, timestep)?, content))
    }

    /// The references of these views, or of whole pictures, but for the labels. Styles serve all views; the content, which belongs
    /// to places of the canvas, is cut here as the canvas was.
    fn references_of_views(
        &mut self,
        styles: &References<Features>,
        content: Option<&Tensor>,
        timestep: f64,
        views: Option<&Batch>,
    ) -> Result<References<Features>> {
        let mut references = styles.shallow_clone();
        if let Some(content) = content {
            let content = views.map(|views| views.cut_if_of_canvas(content)).transpose()?.unwrap_or_else(|| content.shallow_clone());
            references.content = self.passes.references(self.extractor, &References::default().with_content(content), timestep)?.content;
        }
        Ok(references)
    }
}

/// Clean latents as they would be at a timestep.
fn noised(scheduler: &dyn Scheduler, noise: &mut Noise, clean: &Tensor, timestep: f64) -> Result<Tensor> {
    let drawn = noise.draw(clean)?;
    tch::no_grad(|| scheduler.add_noise(clean, &drawn, timestep))
}
