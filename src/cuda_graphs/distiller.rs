//! The paper's optimisation by graphs.

use super::capturable::Capturable;
use super::statics::{overwrite_latents, Statics};
use super::{CudaGraphs, Recorder};
use crate::optimizer::copy;
use crate::{Adam, Checkpoint, Distiller, Progress, References, Result};
use tch::Tensor;

/// A [`Distiller`] whose passes and optimizer steps are captured by the first [`advance`](Self::advance) and repeated by all: one graph
/// of the references' passes, one of an iteration. Same pictures, up to roundings.
///
/// All that a `Distiller` says of its runs holds, errors and unsound latents included: a graph works on tensors of its own, and what comes
/// out replaces latents and optimizer only where all went well. That costs the memory of one more set of features, and for as long as the graphs
/// are there that of a whole step, which nothing else can use meanwhile.
///
/// A graph repeats what was captured, not what the run's fields say now. So these are read by [`run`](Self::run), and changed by
/// [`change`](Self::change) alone, after which the next step is captured anew. What a network, a condition or a loss changes within itself goes unseen.
/// A network keeps its tensors where they are ([`Capturable`]'s promise), the latents of references are copied in each step. **A [`Loss`](crate::Loss) with tensors of
/// its own must keep these in place, and whoever has a second handle on a tensor of a condition must leave it there**: where one is freed or replaced,
/// as by `set_data`, the graph reads memory that is no longer its.
pub struct GraphedDistiller<D: Capturable, R: Recorder = CudaGraphs> {
    // Dropped first: it works on the run's tensors.
    captured: Option<Captured<R::Graph>>,
    run: Distiller<D, Adam>,
    recorder: R,
}

impl<D: Capturable, R: Recorder> std::fmt::Debug for GraphedDistiller<D, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GraphedDistiller").field("run", &self.run).field("captured", &self.captured.is_some()).finish_non_exhaustive()
    }
}

impl<D: Capturable> Distiller<D, Adam> {
    /// The same run by graphs: [`CudaGraphs::new`] for a GPU's. It may have begun.
    pub fn with_graphs<R: Recorder>(self, recorder: R) -> GraphedDistiller<D, R> {
        GraphedDistiller { captured: None, run: self, recorder }
    }
}

impl<D: Capturable, R: Recorder> GraphedDistiller<D, R> {
    /// The next timestep, as [`Distiller::advance`]. The first one, and the first after a [`change`](Self::change), costs some
    /// passes more. After the last one, and after an error, the graphs and their memory are gone.
    ///
    /// # Errors
    /// As [`Distiller::advance`], and what cannot be captured, such as a run on the CPU. The run then stands at its last finished step, and may
    /// go on [without graphs](Self::into_run).
    pub fn advance(&mut self) -> Result<Option<Progress>> {
        let Self { captured, run, recorder } = self;
        let outcome = run.advance_by(|run, timestep| {
            let captured = match captured {
                Some(captured) => captured,
                none => none.insert(Captured::new(recorder, run, timestep)?),
            };
            captured.descents(recorder, run, timestep)
        });
        if outcome.is_err() || self.run.step >= self.run.timesteps.len() {
            self.captured = None;
        }
        outcome
    }

    /// All that is left; returns the final latents (another handle on those of the run).
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    pub fn finish(&mut self) -> Result<Tensor> {
        while self.advance()?.is_some() {}
        Ok(self.run.latents.shallow_clone())
    }

    /// As [`Distiller::check`].
    ///
    /// # Errors
    /// As there.
    pub fn check(&mut self) -> Result<()> {
        self.run.check()
    }

    /// As [`Distiller::checkpoint`]: a run with graphs goes on without, and the other way round.
    ///
    /// # Errors
    /// As there.
    pub fn checkpoint(&mut self) -> Result<Checkpoint> {
        self.run.checkpoint()
    }

    /// As [`Distiller::resume`].
    ///
    /// # Errors
    /// As there.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.run.resume(checkpoint)
    }

    /// The run and its fields.
    pub fn run(&self) -> &Distiller<D, Adam> {
        &self.run
    }

    /// Changes the run's fields. The next step is captured anew.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut Distiller<D, Adam>) -> T) -> T {
        self.captured = None;
        change(&mut self.run)
    }

    /// The same run without graphs.
    pub fn into_run(self) -> Distiller<D, Adam> {
        drop(self.captured);
        self.run
    }
}

struct Captured<G> {
    /// With what it reads: copies, which nobody else has. None where a style has a cache: what is in it then decides.
    look: Option<(G, References)>,
    descend: G,
    statics: Statics,
}

#[allow(unsafe_code)]
impl<G> Captured<G> {
    fn new<D: Capturable, R: Recorder<Graph = G>>(recorder: &mut R, run: &Distiller<D, Adam>, timestep: f64) -> Result<Self> {
        let device = run.latents.device();
        // Sound ones from the first: what is captured is done a few times before.
        let now = run.targets()?;
        let mut statics = Statics::new(&run.latents, run.optimizer.config, &run.extractor.references(&now, timestep)?)?;
        statics.load(&run.latents, &run.optimizer, timestep)?;
        let cached = run.references.counted().any(|style| style.cache.is_some());
        // SAFETY: what the work reads and writes are `statics` and `copies`, which are kept beside the graphs and dropped after them, and the run's
        // network, condition and loss, which GraphedDistiller drops after both and gives nobody to change while they are there. (Somebody who
        // changes condition or loss through handles of his own breaks what GraphedDistiller asks for.)
        let capture = |copies: References| Ok((unsafe { recorder.capture(device, &mut || statics.look(&run.extractor, &copies)) }?, copies));
        let look = if cached { None } else { Some(now.try_map(copy).and_then(capture)?) };
        // SAFETY: as above.
        let descend = unsafe { recorder.capture(device, &mut || statics.descend(&run.extractor, &run.loss)) }?;
        Ok(Self { look, descend, statics })
    }

    /// The iterations of one timestep: latents and loss.
    fn descents<D, R>(&mut self, recorder: &mut R, run: &mut Distiller<D, Adam>, timestep: f64) -> Result<(Tensor, Tensor)>
    where
        D: Capturable,
        R: Recorder<Graph = G>,
    {
        let Self { look, descend, statics } = self;
        statics.load(&run.latents, &run.optimizer, timestep)?;
        let now = run.targets()?;
        match look {
            Some((look, copies)) => {
                overwrite_latents(copies, &now)?;
                // SAFETY: as in `new`, and by the same recorder.
                unsafe { recorder.replay(look, &mut || statics.look(&run.extractor, copies)) }?;
            }
            None => statics.take(&run.extractor.references(&now, timestep)?)?,
        }
        for _ in 0..run.iterations {
            // SAFETY: as in `new`, and by the same recorder.
            unsafe { recorder.replay(descend, &mut || statics.descend(&run.extractor, &run.loss)) }?;
        }
        statics.store(&mut run.optimizer, run.iterations)?;
        statics.result()
    }
}
