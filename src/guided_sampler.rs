//! The paper's second procedure, attention distillation guided sampling: text-to-image in a style, textures by sampling, their
//! expansion to any size.

mod passes;
mod step;

#[cfg(feature = "cuda-graphs")]
pub(crate) use passes::Aim;
pub(crate) use passes::{OneByOne, Passes};

use crate::progress::start_of_last;
use crate::soundness::Soundness;
use crate::{
    AdLoss, Adam, Checkpoint, ContentLoss, Denoiser, Error, FeatureExtractor, Guidance, Noise, Optimizer, Procedure, Progress, References, Result,
    Scheduler, Settings, TotalLoss, Windows,
};
use tch::Tensor;

/// Diffusion sampling in which each step is followed by descents towards the references.
///
/// A step from timestep `t` to the next, `t'`: the noise prediction under [`guidance`](Self::guidance), the scheduler's step,
/// and then, where `t` is below [`start_time`](Self::start_time):
/// 1. where [`adain`](Self::adain) is on, the latents get mean and deviation of the styles, noised to `t'`
///    ([`References::adain`]: by weights and regions);
/// 2. styles and content are noised to `t'`, and their features taken under the extractor's null prompt;
/// 3. `iterations` steps of a fresh optimizer on the latents, with the loss at `t'`.
///
/// Noise is drawn in the authors' order: AdaIN's for each style, then for each style, then for the content. With the
/// [`Noise`] that drew the first latents, a seed gives the picture that it gives in Python on the CPU.
///
/// Like a [`Distiller`](crate::Distiller) the run is pulled, one timestep per [`advance`](Self::advance): stop calling to
/// cancel; read or change any field between calls; begin at a later [`step`](Self::step) with latents noised to its timestep
/// to edit a picture ([`edited`](Self::edited)). **After an error the run stands exactly at its last finished step**, and the
/// same call makes the same step, with the same noise. Infinite or NaN latents are found as a `Distiller` finds them; where
/// that is later than the step at fault (on a GPU), the noise has moved on, too.
///
/// With [`windows`](Self::windows) a step makes the picture view by view (MultiDiffusion): all of the above is then done for
/// each batch of views, and the picture is the mean of its views. One picture is made at a time, as the
/// batch is one of views: more than one prompt is an error, and so is more than one label map, or a batch of pictures as a style; one
/// serves all views. A content serves them, too, which is cut as the canvas
/// is where it has that size, or else serves every view whole. What a condition says of sizes (SDXL's time ids) is the
/// caller's: give `StableDiffusion::guidance` and `extractor` the size of the whole picture, as `tools/reference` does. A
/// condition that belongs to places of the picture, as a ControlNet's does, cannot be cut.
#[non_exhaustive]
pub struct GuidedSampler<D: Denoiser, O = Adam> {
    /// The network and its layers, under the null prompt.
    pub extractor: FeatureExtractor<D>,
    /// Schedule and solver.
    pub scheduler: Box<dyn Scheduler + Send>,
    /// What to draw, for the noise prediction alone. The features know nothing of it.
    pub guidance: Guidance<D::Condition>,
    /// The clean latents of styles and content. May be empty where `iterations` is 0.
    pub references: References,
    /// What is made small.
    pub loss: TotalLoss,
    /// Reset before each timestep.
    pub optimizer: O,
    /// Optimizer steps per timestep; 0 is plain sampling.
    pub iterations: usize,
    /// Whether the latents get the styles' statistics before the descents, as [`References::adain`] says.
    pub adain: bool,
    /// Descents begin below this timestep.
    pub start_time: f64,
    /// How to make a picture that is larger than the network was trained for; none makes it in one piece.
    pub windows: Option<Windows>,
    /// Where noise comes from: the source that drew the first latents, after it drew them.
    pub noise: Noise,
    /// The picture so far, f32; on a new run standard normal noise, one for each picture of the batch.
    pub latents: Tensor,
    /// Steps done.
    pub step: usize,
    /// Whether the first latents are a picture's already.
    edited: bool,
    soundness: Soundness,
}

impl<D: Denoiser, O: std::fmt::Debug> std::fmt::Debug for GuidedSampler<D, O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuidedSampler")
            .field("layers", &self.extractor.layers)
            .field("latents", &self.latents)
            .field("step", &self.step)
            .field("steps", &self.scheduler.timesteps().len())
            .field("guidance", &self.guidance.scale)
            .field("iterations", &self.iterations)
            .field("adain", &self.adain)
            .field("start_time", &self.start_time)
            .field("windows", &self.windows)
            .field("loss", &self.loss)
            .field("optimizer", &self.optimizer)
            .field("noise", &self.noise)
            .finish_non_exhaustive()
    }
}

impl<D: Denoiser> GuidedSampler<D> {
    /// With the AD loss alone, three iterations of Adam at each timestep, and no AdaIN; a content is of use with a content loss
    /// ([`with_settings`](Self::with_settings) adds one) or with [`References::smoothing`] only. `noise` is to be the source that drew
    /// `latents`: with the numbers of the latents once more, the references' noise would not be independent of them.
    pub fn new(
        extractor: FeatureExtractor<D>,
        scheduler: impl Scheduler + Send + 'static,
        guidance: Guidance<D::Condition>,
        references: References,
        latents: Tensor,
        noise: Noise,
    ) -> Self {
        Self {
            extractor,
            scheduler: Box::new(scheduler),
            guidance,
            references,
            loss: TotalLoss::default().plus(1.0, AdLoss::default()),
            optimizer: Adam::default(),
            iterations: 3,
            adain: false,
            start_time: 999.0,
            windows: None,
            noise,
            latents,
            step: 0,
            edited: false,
            soundness: Soundness::default(),
        }
    }

    /// Applies those of a task's settings that a run can take once it is made: iterations, learning rate, scale of the guidance,
    /// AdaIN, the references' smoothing, and the loss: the AD loss and, where there is a content among the references, a content loss of that
    /// weight. Call it first: the loss takes the place of the one before, as do the other fields. Timesteps are the schedule's, layers the
    /// extractor's.
    ///
    /// # Errors
    /// As [`Settings::check`].
    pub fn with_settings(mut self, settings: &Settings) -> Result<Self> {
        settings.check()?;
        self.iterations = settings.iterations;
        self.optimizer.config.learning_rate = settings.learning_rate;
        self.adain = settings.adain;
        self.references.smoothing = settings.smoothing;
        self.guidance.scale = settings.guidance;
        self.loss = TotalLoss::default().plus(1.0, AdLoss::default());
        if self.references.content.is_some() {
            self.loss = self.loss.plus(settings.content_weight, ContentLoss);
        }
        Ok(self)
    }

    /// The same run in overlapping windows, for a picture larger than the network was trained for.
    #[must_use]
    pub fn with_windows(mut self, windows: Windows) -> Self {
        self.windows = Some(windows);
        self
    }

    /// The same run as an edit (SDEdit): of its timesteps only the last `strength` (above 0, 1 are all) are taken, from the
    /// latents of `picture` under as much of the run's first noise as belongs there. `picture` is `(1 or batch, channels, height,
    /// width)`; it may also be the content, whose layout the content loss keeps.
    ///
    /// # Errors
    /// A strength that leaves no step or is above 1; a picture of another shape; a run that has begun, or is an edit already.
    pub fn edited(mut self, picture: &Tensor, strength: f64) -> Result<Self> {
        let (first, timestep) = start_of_last(self.scheduler.timesteps(), strength, 0.6)?;
        if self.step != 0 || self.edited {
            let done = if self.edited { "the run is an edit already".to_owned() } else { format!("{} of its steps are done", self.step) };
            return Err(Error::argument("step", format!("{done}; edit with a new run, whose latents are noise")));
        }
        let (size, noise) = (picture.size(), self.latents.size());
        if size.get(1..) != noise.get(1..) || !(size.first() == Some(&1) || size == noise) {
            return Err(Error::shape("edited picture", format!("{noise:?}, the run's, or a batch of 1"), size));
        }
        self.latents = tch::no_grad(|| self.scheduler.add_noise(&picture.f_expand_as(&self.latents)?, &self.latents, timestep))?;
        (self.step, self.edited) = (first, true);
        Ok(self)
    }
}

impl<D: Denoiser, O: Optimizer> GuidedSampler<D, O> {
    /// The same run with another optimizer.
    pub fn with_optimizer<P: Optimizer>(self, optimizer: P) -> GuidedSampler<D, P> {
        let Self {
            extractor,
            scheduler,
            guidance,
            references,
            loss,
            optimizer: _,
            iterations,
            adain,
            start_time,
            windows,
            noise,
            latents,
            step,
            edited,
            soundness,
        } = self;
        GuidedSampler {
            extractor,
            scheduler,
            guidance,
            references,
            loss,
            optimizer,
            iterations,
            adain,
            start_time,
            windows,
            noise,
            latents,
            step,
            edited,
            soundness,
        }
    }

    /// The next timestep; none after the last. Costs a guided noise prediction, a forward pass per reference, and per
    /// iteration one forward and one backward pass of the pictures; with windows all this for each batch of views (styles, by
    /// default, once). The loss is then the mean over all views.
    ///
    /// # Errors
    /// A guidance or windows out of range; references or latents that do not fit the network or one another; windows on
    /// several pictures, or on latents other than `(1, channels, height, width)`; [`Error::NotFinite`]; the denoiser's and libtorch's. The run then stands at its last finished step.
    pub fn advance(&mut self) -> Result<Option<Progress>> {
        self.advance_by(&mut OneByOne)
    }

    /// The next timestep, whose passes are made by these.
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    pub(crate) fn advance_by(&mut self, passes: &mut dyn Passes<D, O>) -> Result<Option<Progress>> {
        let Some(&timestep) = self.scheduler.timesteps().get(self.step) else { return self.check().map(|()| None) };
        self.noise.mark();
        match self.one(timestep, passes) {
            Ok(loss) => {
                self.step += 1;
                let steps = self.scheduler.timesteps().len();
                if self.step == steps {
                    if let Err(error) = self.check() {
                        if self.step + 1 == steps {
                            // It was this very step.
                            self.noise.rewind();
                        }
                        return Err(error);
                    }
                }
                self.noise.unmark();
                Ok(Some(Progress::new(self.step, steps, timestep, loss)))
            }
            Err(error) => {
                self.noise.rewind();
                Err(error)
            }
        }
    }

    /// Whether all steps so far were sound; on a GPU this waits for them. Called by the last step; call it yourself
    /// where you show a preview.
    ///
    /// # Errors
    /// [`Error::NotFinite`]: the run is then back at the step before.
    pub fn check(&mut self) -> Result<()> {
        let Some(step) = self.soundness.first_unsound()? else { return Ok(()) };
        self.step = step.saturating_sub(1);
        let timestep = self.scheduler.timesteps().get(self.step).copied().unwrap_or(f64::NAN);
        Err(Error::NotFinite { what: "loss or latents", step, timestep })
    }

    /// All that is left; returns the final latents (another handle on [`latents`](Self::latents)).
    ///
    /// # Errors
    /// As [`advance`](Self::advance), after which the run can go on, too.
    pub fn finish(&mut self) -> Result<Tensor> {
        while self.advance()?.is_some() {}
        Ok(self.latents.shallow_clone())
    }

    /// The run's state, in storage of its own: latents, step, and where the noise is. Waits for a GPU. The optimizer begins
    /// anew with each step, so it has none; a [`Noise::from_fn`] cannot be kept, so bring it back to its place yourself.
    ///
    /// # Errors
    /// As [`check`](Self::check): what is saved is sound.
    pub fn checkpoint(&mut self) -> Result<Checkpoint> {
        self.check()?;
        let checkpoint = Checkpoint::new(Procedure::Sampling, self.step, self.scheduler.timesteps(), &self.latents, &[])?;
        Ok(checkpoint.with_noise(self.noise.state()?))
    }

    /// Goes on from a checkpoint of a run with the same settings, to the same picture.
    ///
    /// # Errors
    /// A checkpoint of the other procedure, of other timesteps, of latents of another shape or that are not finite,
    /// or of a run with another kind of [`Noise`]; the run is then as it was.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let latents = checkpoint.latents_for(Procedure::Sampling, self.scheduler.timesteps(), &self.latents)?;
        self.noise.load_state(checkpoint.noise.as_ref())?;
        (self.latents, self.step, self.soundness) = (latents, checkpoint.step, Soundness::default());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::copy;
    use crate::soundness::tests::{alike, deferred, Net};
    use crate::{Ddim, DdimConfig};
    use tch::{Device, Kind};

    const STEPS: usize = 4;

    fn sampler(net: &Net, custom: bool) -> Result<GuidedSampler<&Net>> {
        let (like, mut noise) = (Tensor::f_zeros([1, 4, 3, 5], (Kind::Float, Device::Cpu))?, Noise::seeded(7));
        let (references, latents) = (References::style(noise.draw(&like)?), noise.draw(&like)?);
        if custom {
            let mut seeded = noise;
            noise = Noise::from_fn(move |like| seeded.draw(like));
        }
        let (extractor, scheduler) = (FeatureExtractor::new(net, (), 0..1), Ddim::new(&DdimConfig::default(), STEPS)?);
        let mut run = GuidedSampler::new(extractor, scheduler, Guidance::none(()), references, latents, noise);
        run.soundness = deferred();
        Ok(run)
    }

    /// Latents and noise as they are now.
    fn place(run: &GuidedSampler<&Net>) -> Result<(Tensor, Option<Tensor>)> {
        Ok((copy(&run.latents)?, run.noise.state()?))
    }

    /// The noise of the last step comes back with it; that of an earlier one, behind which more was drawn, is the caller's to bring back.
    #[test]
    fn nan_that_is_found_late_leads_back_to_the_last_sound_step() -> Result<()> {
        tch::set_num_threads(1);
        let net = Net::default();
        let mut undisturbed = sampler(&net, false)?;
        let mut sound = vec![place(&undisturbed)?];
        while undisturbed.advance()?.is_some() {
            sound.push(place(&undisturbed)?);
        }
        // Found at the end, or where somebody asks.
        for (index, asked, noise_of) in [(1, false, STEPS), (1, true, 2), (STEPS - 1, false, STEPS - 1)] {
            for custom in [false, true] {
                let mut run = sampler(&net, custom)?;
                // Where the descents of this step are, of which the loss is then NaN, too.
                net.nan_at.set(Some(run.scheduler.next_timestep(index)));
                let outcome = if asked {
                    for _ in 0..=index {
                        assert!(run.advance()?.is_some(), "as on a GPU, a step does not tell");
                    }
                    run.checkpoint().map(drop)
                } else {
                    run.finish().map(drop)
                };
                net.nan_at.set(None);
                let Err(Error::NotFinite { step, timestep, .. }) = outcome else { panic!("{outcome:?}") };
                assert_eq!((step, Some(&timestep), run.step), (index + 1, run.scheduler.timesteps().get(index), index));
                let (latents, noise) = sound.get(index).unwrap_or_else(|| panic!("no step {index}"));
                assert!(alike(&run.latents, latents)?, "{index} {asked}");
                if !custom {
                    assert_eq!(run.noise.state()?, sound.get(noise_of).and_then(|(_, noise)| noise.as_ref().map(Tensor::shallow_clone)));
                    run.noise.load_state(noise.as_ref())?;
                }
                if !custom || noise_of == index {
                    assert!(alike(&run.finish()?, &undisturbed.latents)?, "{index} {asked} {custom}");
                }
            }
        }
        Ok(())
    }
}
