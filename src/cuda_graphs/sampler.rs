//! Guided sampling by graphs.

use super::capturable::Capturable;
use super::passes::{ByGraphs, Captured};
use super::{CudaGraphs, Recorder};
use crate::{Adam, Checkpoint, GuidedSampler, Progress, Result};
use tch::Tensor;

/// A [`GuidedSampler`] whose passes and optimizer steps are captured when they first come, and repeated from then on: one graph of the
/// noise prediction, one of the styles' passes, one of the content's, one of an iteration; with windows one more of the prediction, the
/// content's pass and the iteration where the last batch of views is smaller. Same pictures, up to roundings. Scheduler, noise and AdaIN are as ever.
///
/// Made one by one are noise predictions under a condition that [cannot be captured](Capturable::can_capture), such as a
/// ControlNet's, and the iterations of windows with labels, which are other ones for each view.
///
/// What is said of [`GraphedDistiller`](super::GraphedDistiller) holds here, too: errors leave the run at its last finished step, fields are read by
/// [`run`](Self::run) and changed by [`change`](Self::change) alone, and network, conditions and loss must keep their tensors where they were.
/// The features are kept twice, as they are seen and for the iterations, and once more for a smaller last batch.
pub struct GraphedSampler<D: Capturable, R: Recorder = CudaGraphs> {
    // Dropped first: it works on the run's tensors.
    captured: Captured<R::Graph>,
    run: GuidedSampler<D, Adam>,
    recorder: R,
}

impl<D: Capturable, R: Recorder> std::fmt::Debug for GraphedSampler<D, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GraphedSampler").field("run", &self.run).field("graphs", &self.captured.count()).finish_non_exhaustive()
    }
}

impl<D: Capturable> GuidedSampler<D, Adam> {
    /// The same run by graphs: [`CudaGraphs::new`] for a GPU's. It may have begun.
    pub fn with_graphs<R: Recorder>(self, recorder: R) -> GraphedSampler<D, R> {
        GraphedSampler { captured: Captured::default(), run: self, recorder }
    }
}

impl<D: Capturable, R: Recorder> GraphedSampler<D, R> {
    /// The next timestep, as [`GuidedSampler::advance`]. One in which something is captured costs some passes more: the first, and the first below
    /// [`start_time`](GuidedSampler::start_time). After the last one, and after an error, the graphs and their memory are gone.
    ///
    /// # Errors
    /// As [`GuidedSampler::advance`], and what cannot be captured, such as a run on the CPU. The run then stands at its last finished step,
    /// and may go on [without graphs](Self::into_run).
    pub fn advance(&mut self) -> Result<Option<Progress>> {
        let Self { captured, run, recorder } = self;
        let in_windows = run.windows.is_some();
        let outcome = run.advance_by(&mut ByGraphs { captured, recorder, in_windows });
        if outcome.is_err() || self.run.step >= self.run.scheduler.timesteps().len() {
            self.captured = Captured::default();
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

    /// As [`GuidedSampler::check`].
    ///
    /// # Errors
    /// As there.
    pub fn check(&mut self) -> Result<()> {
        self.run.check()
    }

    /// As [`GuidedSampler::checkpoint`]: a run with graphs goes on without, and the other way round.
    ///
    /// # Errors
    /// As there.
    pub fn checkpoint(&mut self) -> Result<Checkpoint> {
        self.run.checkpoint()
    }

    /// As [`GuidedSampler::resume`].
    ///
    /// # Errors
    /// As there.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.run.resume(checkpoint)
    }

    /// The run and its fields.
    pub fn run(&self) -> &GuidedSampler<D, Adam> {
        &self.run
    }

    /// Changes the run's fields. The next step is captured anew.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut GuidedSampler<D, Adam>) -> T) -> T {
        self.captured = Captured::default();
        change(&mut self.run)
    }

    /// The same run without graphs.
    pub fn into_run(self) -> GuidedSampler<D, Adam> {
        drop(self.captured);
        self.run
    }
}
