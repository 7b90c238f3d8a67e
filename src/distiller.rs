//! The paper's optimisation: style transfer, appearance transfer and texture synthesis.

use crate::optimizer::{copy, copy_state, state_on};
use crate::progress::start_of_last;
use crate::soundness::Soundness;
use crate::Settings;
use crate::{
    AdLoss, Adam, Checkpoint, ContentLoss, Denoiser, Error, FeatureExtractor, Features, Loss, Optimizer, Procedure, Progress, References, Result,
    TotalLoss,
};
use tch::{Kind, Tensor};

/// How much wider AdaIN of start and content may make a channel of the latents. A grey photograph's colours are next to nothing but rounding, which
/// would come out as patches; of the bundled model's 144 judged pairs six would have more, up to 6.2.
const WIDEN: f64 = 4.0;

/// Latents optimised along the timesteps: at each, the features of the (clean) references are taken once, then
/// `iterations` steps of the optimizer follow, and no noise is added.
///
/// A run is pulled: each [`advance`](Self::advance) is one timestep. Stop calling to cancel; read or change any field
/// between calls. **After an error of [`advance`](Self::advance) the run stands exactly at its last finished step**,
/// optimizer included, so that the same call may be made again (out of memory), or the run saved.
///
/// Infinite or NaN latents end the run with [`Error::NotFinite`]: on the CPU in the step that made them, as any error. On
/// a GPU looking costs a wait, so there they are found at the last step, by [`checkpoint`](Self::checkpoint), or when
/// [`check`](Self::check) is called; the run is then back at its last sound step, but with a fresh optimizer.
#[non_exhaustive]
pub struct Distiller<D: Denoiser, O = Adam> {
    /// The network and its layers.
    pub extractor: FeatureExtractor<D>,
    /// From noise to image, as the network's time embedding takes them.
    pub timesteps: Vec<f64>,
    /// The clean latents of styles and content.
    pub references: References,
    /// What is made small.
    pub loss: TotalLoss,
    /// One for the whole run.
    pub optimizer: O,
    /// Optimizer steps per timestep.
    pub iterations: usize,
    /// Whether the latents get the styles' mean and deviation before the first step, and the content before the network looks at it, for
    /// short runs: Adam moves a latent by little more than its learning rate per step, so strong colours that the styles lack would be left
    /// half way, and the content loss would hold on to them. As [`References::adain`], but no deviation becomes more than four times what
    /// it was, since a grey picture's colours are noise. Off, the run is the authors'. Changed on the way, or with a
    /// [draft](Self::with_draft), it concerns the content alone.
    pub adain: bool,
    /// The picture so far, f32; on a new run, where it starts.
    pub latents: Tensor,
    /// Steps done; with a [draft](Self::with_draft) those that it stands for are among them.
    pub step: usize,
    drafted: bool,
    soundness: Soundness,
}

impl<D: Denoiser, O: std::fmt::Debug> std::fmt::Debug for Distiller<D, O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Distiller")
            .field("layers", &self.extractor.layers)
            .field("latents", &self.latents)
            .field("step", &self.step)
            .field("steps", &self.timesteps.len())
            .field("iterations", &self.iterations)
            .field("loss", &self.loss)
            .field("optimizer", &self.optimizer)
            .finish_non_exhaustive()
    }
}

impl<D: Denoiser> Distiller<D> {
    /// With the AD loss alone and Adam, one iteration per timestep. From noise this is texture synthesis.
    pub fn new(extractor: FeatureExtractor<D>, timesteps: Vec<f64>, references: References, latents: Tensor) -> Self {
        let (loss, optimizer) = (TotalLoss::default().plus(1.0, AdLoss::default()), Adam::default());
        Self {
            extractor,
            timesteps,
            references,
            loss,
            optimizer,
            iterations: 1,
            adain: false,
            latents,
            step: 0,
            drafted: false,
            soundness: Soundness::default(),
        }
    }

    /// `L_AD + content_weight L_content`, starting from the content's latents: the higher the weight (0 to 1), the more
    /// of the content's layout stays. The authors use 0.25 with Stable Diffusion 1.5.
    ///
    /// # Errors
    /// No content among the references; a weight that is negative or not a number.
    pub fn style_transfer(extractor: FeatureExtractor<D>, timesteps: Vec<f64>, references: References, content_weight: f64) -> Result<Self> {
        let content =
            references.content.as_ref().ok_or_else(|| Error::argument("references", "style transfer starts from a content; none was given"))?;
        if !(content_weight.is_finite() && content_weight >= 0.0) {
            return Err(Error::argument("content weight", format!("{content_weight} is not a number of at least 0")));
        }
        let start = copy(&content.f_to_kind(Kind::Float)?)?;
        let mut run = Self::new(extractor, timesteps, references, start);
        run.loss = run.loss.plus(content_weight, ContentLoss);
        Ok(run)
    }
}

impl<D: Denoiser> Distiller<D, Adam> {
    /// Applies those of a task's settings that a run can take once it is made: iterations, learning rate, AdaIN and the references'
    /// smoothing. Timesteps and content weight are arguments of what makes a run, layers its extractor's.
    ///
    /// # Errors
    /// As [`Settings::check`].
    pub fn with_settings(mut self, settings: &Settings) -> Result<Self> {
        settings.check()?;
        self.iterations = settings.iterations;
        self.optimizer.config.learning_rate = settings.learning_rate;
        self.adain = settings.adain;
        self.references.smoothing = settings.smoothing;
        Ok(self)
    }
}

impl<D: Denoiser, O: Optimizer> Distiller<D, O> {
    /// The same run with another optimizer.
    pub fn with_optimizer<P: Optimizer>(self, optimizer: P) -> Distiller<D, P> {
        let Self { extractor, timesteps, references, loss, optimizer: _, iterations, adain, latents, step, drafted, soundness } = self;
        Distiller { extractor, timesteps, references, loss, optimizer, iterations, adain, latents, step, drafted, soundness }
    }

    /// The same run as the second part of one from coarse to fine: a whole run makes the picture at half the size, say, and this one takes
    /// only the last `strength` (above 0, at most 1) of its timesteps, from that picture. Large forms are settled at the small size, where
    /// a step costs a quarter or less: with 0.4 both take a little more than half the time of one whole run, for much the same picture.
    /// For sizes of about twice what the network was trained at. The authors have no such thing.
    ///
    /// `draft` are latents `(1 or batch, channels, height, width)` of this run's size, those of the enlarged picture: decode what the first
    /// run made, enlarge it, with [`image::resize`](crate::image::resize) for instance, and encode it. It has the styles' statistics already,
    /// so [`adain`](Self::adain) concerns the content alone. (With that on and a strength of 1, a run that is
    /// resumed from a [checkpoint](Self::checkpoint) taken before its first step must be given the draft, too.)
    ///
    /// # Errors
    /// A strength that leaves no step or is above 1; a draft of another shape; a run that has begun, or has a draft already.
    pub fn with_draft(mut self, draft: &Tensor, strength: f64) -> Result<Self> {
        let (first, _) = start_of_last(&self.timesteps, strength, 0.4)?;
        if self.step != 0 || self.drafted {
            let done = if self.drafted { "the run has a draft already".to_owned() } else { format!("{} of its steps are done", self.step) };
            return Err(Error::argument("step", format!("{done}; give the draft to a new run")));
        }
        let (size, wanted) = (draft.size(), self.latents.size());
        if size.get(1..) != wanted.get(1..) || !(size.first() == Some(&1) || size == wanted) {
            return Err(Error::shape("draft", format!("{wanted:?}, the run's, or a batch of 1"), size));
        }
        let draft = draft.f_to_kind(Kind::Float)?.f_to_device(self.latents.device())?;
        self.latents = copy(&draft.f_expand(&wanted, false)?)?;
        (self.step, self.drafted) = (first, true);
        Ok(self)
    }

    /// What the steps go towards: the [references](Self::references), without a content that the loss [does not use](crate::Loss::uses_content);
    /// where [`adain`](Self::adain) is on with the content in the styles' mean and deviation, in f32; where these are each picture's own, a
    /// content that serves a whole batch becomes one for each. The references themselves stay as they are.
    ///
    /// # Errors
    /// As [`References::adain`].
    pub fn targets(&self) -> Result<References> {
        let mut targets = self.references.shallow_clone();
        if !self.loss.uses_content(&self.references) {
            targets.content = None;
            return Ok(targets);
        }
        if let (true, Some(content)) = (self.adain, &self.references.content) {
            let pictures = self.latents.size().first().copied().unwrap_or(1);
            targets.content = Some(tch::no_grad(|| self.references.adain_of_content(content, pictures, WIDEN))?);
        }
        Ok(targets)
    }

    /// The next timestep; none after the last. Costs a forward pass per [target](Self::targets), and per iteration one forward and
    /// one backward pass of the picture.
    ///
    /// # Errors
    /// References or latents that do not fit the network or one another, also for AdaIN; [`Error::NotFinite`]; libtorch's. The run
    /// then stands at its last finished step.
    pub fn advance(&mut self) -> Result<Option<Progress>> {
        let Some(&timestep) = self.timesteps.get(self.step) else { return self.check().map(|()| None) };
        let references = self.extractor.references(&self.targets()?, timestep)?;
        self.advance_towards(&references)
    }

    /// The next timestep, towards features of [`targets`](Self::targets) that the caller kept from an earlier run of the same references, loss, smoothing
    /// and [`adain`](Self::adain), which say what is in them; nothing checks which were given. Their labels and their smoothing count, not
    /// those of the run.
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    pub fn advance_towards(&mut self, references: &References<Features>) -> Result<Option<Progress>> {
        self.advance_by(|run, timestep| run.descents(timestep, references))
    }

    /// The next timestep, whose latents and loss `descents` makes, by steps of the optimizer. All is undone where it fails.
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    pub(crate) fn advance_by(&mut self, descents: impl FnOnce(&mut Self, f64) -> Result<(Tensor, Tensor)>) -> Result<Option<Progress>> {
        let Some(&timestep) = self.timesteps.get(self.step) else { return self.check().map(|()| None) };
        if self.iterations == 0 {
            return Err(Error::argument("iterations", "0 would leave the picture as it is; use at least 1"));
        }
        let (before, start) = (copy_state(&self.optimizer.state()?)?, self.latents.shallow_clone());
        let outcome = self.first_latents().and_then(|()| descents(self, timestep)).and_then(|(latents, loss)| {
            self.latents = self.soundness.judge(&start, latents, Some(&loss), self.step + 1, timestep)?;
            Ok(loss)
        });
        match outcome {
            Ok(loss) => {
                self.step += 1;
                if self.step == self.timesteps.len() {
                    self.check()?;
                }
                Ok(Some(Progress::new(self.step, self.timesteps.len(), timestep, Some(loss))))
            }
            Err(error) => {
                // Its own state, and nothing is allocated: what remains to be told is the first error.
                let _ = self.optimizer.load_state(before);
                self.latents = start;
                Err(error)
            }
        }
    }

    /// What the first step begins with.
    fn first_latents(&mut self) -> Result<()> {
        if self.adain && self.step == 0 && !self.drafted {
            self.latents = tch::no_grad(|| self.references.adain_within(&self.latents, WIDEN))?;
        }
        Ok(())
    }

    /// The iterations of one timestep: latents and loss.
    fn descents(&mut self, timestep: f64, references: &References<Features>) -> Result<(Tensor, Tensor)> {
        let mut latents = copy(&self.latents.f_to_kind(Kind::Float)?)?;
        let mut loss = self.extractor.descend(&mut latents, timestep, references, &self.loss, &mut self.optimizer)?;
        for _ in 1..self.iterations {
            loss = self.extractor.descend(&mut latents, timestep, references, &self.loss, &mut self.optimizer)?;
        }
        Ok((latents, loss))
    }

    /// Whether all steps so far were sound; on a GPU this waits for them. Called by the last step; call it yourself
    /// where you show a preview.
    ///
    /// # Errors
    /// [`Error::NotFinite`]: the run is then back at the step before, with a fresh optimizer.
    pub fn check(&mut self) -> Result<()> {
        let Some(step) = self.soundness.first_unsound()? else { return Ok(()) };
        self.step = step.saturating_sub(1);
        self.optimizer.reset();
        let timestep = self.timesteps.get(self.step).copied().unwrap_or(f64::NAN);
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

    /// The run's state, in storage of its own. Waits for a GPU.
    ///
    /// # Errors
    /// As [`check`](Self::check): what is saved is sound.
    pub fn checkpoint(&mut self) -> Result<Checkpoint> {
        self.check()?;
        Checkpoint::new(Procedure::Optimisation, self.step, &self.timesteps, &self.latents, &self.optimizer.state()?)
    }

    /// Goes on from a checkpoint of a run with the same settings, to the same picture.
    ///
    /// # Errors
    /// A checkpoint of other timesteps, of latents of another shape or that are not finite, or with a state that
    /// this run's optimizer cannot take; the run is then as it was.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let latents = checkpoint.latents_for(Procedure::Optimisation, &self.timesteps, &self.latents)?;
        let state = state_on(&checkpoint.optimizer, self.latents.device())?;
        self.optimizer.check_state(&state, &latents)?;
        self.optimizer.load_state(state)?;
        (self.latents, self.step, self.soundness) = (latents, checkpoint.step, Soundness::default());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soundness::tests::{alike, deferred, Net};
    use crate::Noise;
    use tch::Device;

    fn distiller(net: &Net) -> Result<Distiller<&Net>> {
        let (like, mut noise) = (Tensor::f_zeros([1, 4, 3, 5], (Kind::Float, Device::Cpu))?, Noise::seeded(7));
        let (references, latents) = (References::style(noise.draw(&like)?), noise.draw(&like)?);
        let mut run = Distiller::new(FeatureExtractor::new(net, (), 0..1), vec![801.0, 601.0, 401.0, 201.0], references, latents);
        (run.iterations, run.soundness) = (2, deferred());
        Ok(run)
    }

    #[test]
    fn nan_that_is_found_late_leads_back_to_the_last_sound_step() -> Result<()> {
        tch::set_num_threads(1);
        let net = Net::default();
        // In a middle step and in the last; found at the end, or where somebody asks.
        for (index, asked) in [(1, false), (1, true), (3, false)] {
            let (mut run, mut undisturbed) = (distiller(&net)?, distiller(&net)?);
            for _ in 0..index {
                let _ = undisturbed.advance()?;
            }
            net.nan_at.set(run.timesteps.get(index).copied());
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
            assert_eq!((step, Some(&timestep), run.step), (index + 1, run.timesteps.get(index), index));
            assert!(alike(&run.latents, &undisturbed.latents)?, "{index} {asked}");
            // The moments of Adam, which are NaN, begin anew.
            undisturbed.optimizer.reset();
            assert!(alike(&run.finish()?, &undisturbed.finish()?)?, "{index} {asked}");
        }
        Ok(())
    }
}
