//! The paper's second procedure, attention distillation guided sampling: text-to-image in a style, textures by sampling.

use crate::adain::adain;
use crate::optimizer::copy;
use crate::soundness::Soundness;
use crate::{
    AdLoss, Adam, Checkpoint, ContentLoss, Denoiser, Error, FeatureExtractor, Guidance, Noise, Optimizer, Progress, References, Result, Scheduler,
    Settings, TotalLoss,
};
use tch::{Kind, Tensor};

/// Diffusion sampling in which each step is followed by descents towards the references.
///
/// A step from timestep `t` to the next, `t'`: the noise prediction under [`guidance`](Self::guidance), the scheduler's step,
/// and then, where `t` is below [`start_time`](Self::start_time):
/// 1. where [`adain`](Self::adain) is on, the latents get mean and deviation of the styles, noised to `t'`;
/// 2. styles and content are noised to `t'`, and their features taken under the extractor's null prompt;
/// 3. `iterations` steps of a fresh optimizer on the latents, with the loss at `t'`.
///
/// Noise is drawn in the authors' order: AdaIN's for each style, then for each style, then for the content. With the
/// [`Noise`] that drew the first latents, a seed gives the picture that it gives in Python on the CPU.
///
/// Like a [`Distiller`](crate::Distiller) the run is pulled, one timestep per [`advance`](Self::advance): stop calling to
/// cancel; read or change any field between calls; begin at a later [`step`](Self::step) with latents noised to its timestep
/// to edit a picture (SDEdit). **After an error the run stands exactly at its last finished step**, and the same call makes
/// the same step, with the same noise. Infinite or NaN latents are found as a `Distiller` finds them; where that is later
/// than the step at fault (on a GPU), the noise has moved on, too.
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
    /// Whether the latents get the styles' statistics before the descents.
    pub adain: bool,
    /// Descents begin below this timestep.
    pub start_time: f64,
    /// Where noise comes from: the source that drew the first latents, after it drew them.
    pub noise: Noise,
    /// The picture so far, f32; on a new run standard normal noise, one for each picture of the batch.
    pub latents: Tensor,
    /// Steps done.
    pub step: usize,
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
            .field("loss", &self.loss)
            .field("optimizer", &self.optimizer)
            .field("noise", &self.noise)
            .finish_non_exhaustive()
    }
}

impl<D: Denoiser> GuidedSampler<D> {
    /// With the AD loss alone, three iterations of Adam at each timestep, and no AdaIN. `noise` is to be the source that drew
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
            noise,
            latents,
            step: 0,
            soundness: Soundness::default(),
        }
    }

    /// Takes over what of a task's settings concerns a run that exists: iterations, learning rate, AdaIN, and, where there
    /// is a content among the references, a content loss of that weight.
    ///
    /// # Errors
    /// As [`Settings::check`].
    pub fn with_settings(mut self, settings: &Settings) -> Result<Self> {
        settings.check()?;
        self.iterations = settings.iterations;
        self.optimizer.config.learning_rate = settings.learning_rate;
        self.adain = settings.adain;
        if self.references.content.is_some() {
            self.loss = self.loss.plus(settings.content_weight, ContentLoss);
        }
        Ok(self)
    }
}

impl<D: Denoiser, O: Optimizer> GuidedSampler<D, O> {
    /// The same run with another optimizer.
    pub fn with_optimizer<P: Optimizer>(self, optimizer: P) -> GuidedSampler<D, P> {
        let Self { extractor, scheduler, guidance, references, loss, optimizer: _, iterations, adain, start_time, noise, latents, step, soundness } =
            self;
        GuidedSampler { extractor, scheduler, guidance, references, loss, optimizer, iterations, adain, start_time, noise, latents, step, soundness }
    }

    /// The next timestep; none after the last. Costs a guided noise prediction, a forward pass per reference, and per
    /// iteration one forward and one backward pass of the pictures.
    ///
    /// # Errors
    /// A guidance out of range; references or latents that do not fit the network or one another;
    /// [`Error::NotFinite`]; the denoiser's and libtorch's. The run then stands at its last finished step.
    pub fn advance(&mut self) -> Result<Option<Progress>> {
        let Some(&timestep) = self.scheduler.timesteps().get(self.step) else { return self.check().map(|()| None) };
        self.noise.mark();
        match self.one(timestep) {
            Ok(loss) => {
                self.step += 1;
                let steps = self.scheduler.timesteps().len();
                if self.step == steps {
                    self.check()?;
                }
                Ok(Some(Progress::new(self.step, steps, timestep, loss)))
            }
            Err(error) => {
                self.noise.rewind();
                Err(error)
            }
        }
    }

    /// Replaces the latents only when all went well.
    fn one(&mut self, timestep: f64) -> Result<Option<Tensor>> {
        if self.start_time.is_nan() {
            return Err(Error::argument("start time", "NaN is not a timestep"));
        }
        self.guidance.check()?;
        let before = self.latents.f_to_kind(Kind::Float)?;
        let mut latents = tch::no_grad(|| {
            let prediction = self.extractor.denoiser.forward_guided(&before, timestep, &self.guidance)?;
            self.scheduler.step(self.step, &prediction, &before)
        })?;
        let mut loss = None;
        if self.iterations > 0 && timestep < self.start_time {
            let next = self.scheduler.next_timestep(self.step);
            if self.adain {
                let counted = self.references.styles.iter().filter(|style| style.weight != 0.0);
                let styles = counted.map(|style| noised(self.scheduler.as_ref(), &mut self.noise, &style.of, next));
                let styles = styles.collect::<Result<Vec<_>>>()?;
                latents = tch::no_grad(|| adain(&latents, &styles))?;
            } else {
                // The optimizer works in place, and a scheduler may hand on what it was given.
                latents = copy(&latents)?;
            }
            let references = self.references.try_map(|clean| noised(self.scheduler.as_ref(), &mut self.noise, clean, next))?;
            let references = self.extractor.references(&references, next)?;
            self.optimizer.reset();
            for _ in 0..self.iterations {
                loss = Some(self.extractor.descend(&mut latents, next, &references, &self.loss, &mut self.optimizer)?);
            }
        }
        self.latents = self.soundness.judge(&self.latents, latents, loss.as_ref(), self.step + 1, timestep)?;
        Ok(loss)
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
        Err(Error::NotFinite { what: "latents", step, timestep })
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
        let checkpoint = Checkpoint::new(self.step, self.scheduler.timesteps().len(), &self.latents, &[])?;
        Ok(checkpoint.with_noise(self.noise.state()?))
    }

    /// Goes on from a checkpoint of a run with the same settings, to the same picture.
    ///
    /// # Errors
    /// A checkpoint of another number of steps, of latents of another shape or that are not finite, or with a noise
    /// state that is none; the run is then as it was.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let latents = checkpoint.latents_for(self.scheduler.timesteps().len(), &self.latents)?;
        if let Some(state) = &checkpoint.noise {
            self.noise.load_state(state)?;
        }
        (self.latents, self.step, self.soundness) = (latents, checkpoint.step, Soundness::default());
        Ok(())
    }
}

/// Clean latents as they would be at a timestep.
fn noised(scheduler: &dyn Scheduler, noise: &mut Noise, clean: &Tensor, timestep: f64) -> Result<Tensor> {
    let drawn = noise.draw(clean)?;
    tch::no_grad(|| scheduler.add_noise(clean, &drawn, timestep))
}
