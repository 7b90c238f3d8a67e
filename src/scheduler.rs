//! Noise schedules and their one-step solvers.

mod ddim;

pub use ddim::{BetaSchedule, Ddim, DdimConfig, Prediction, Spacing};

use crate::Result;
use tch::Tensor;

/// A noise schedule and a one-step solver of it. Without state: one schedule serves many runs and many views of one
/// canvas. Latents are as the network sees them: a solver that keeps them at another scale (Euler's
/// `x / sqrt(sigma^2 + 1)`) converts inside `step` and `add_noise`.
pub trait Scheduler {
    /// From noise to image.
    fn timesteps(&self) -> &[f64];

    /// The timestep that step `index` lands on.
    fn next_timestep(&self, index: usize) -> f64;

    /// Clean latents with noise of the same shape added, as they would be at `timestep`.
    ///
    /// # Errors
    /// A timestep outside of the schedule; shapes that do not fit.
    fn add_noise(&self, clean: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor>;

    /// The latents after step `index`, from the network's prediction for those before it.
    ///
    /// # Errors
    /// An index beyond the last step; shapes that do not fit.
    fn step(&self, index: usize, prediction: &Tensor, latents: &Tensor) -> Result<Tensor>;
}

impl<S: Scheduler + ?Sized> Scheduler for Box<S> {
    fn timesteps(&self) -> &[f64] {
        (**self).timesteps()
    }

    fn next_timestep(&self, index: usize) -> f64 {
        (**self).next_timestep(index)
    }

    fn add_noise(&self, clean: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        (**self).add_noise(clean, noise, timestep)
    }

    fn step(&self, index: usize, prediction: &Tensor, latents: &Tensor) -> Result<Tensor> {
        (**self).step(index, prediction, latents)
    }
}
