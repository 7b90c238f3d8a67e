//! Where a run is.

use crate::{Error, Result};
use tch::Tensor;

/// Where a run is after a step. Holds nothing of the run: read its `latents` beside it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Progress {
    /// Steps done, from 1.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// The timestep of this step.
    pub timestep: f64,
    loss: Option<Tensor>,
}

impl Progress {
    pub(crate) fn new(step: usize, steps: usize, timestep: f64, loss: Option<Tensor>) -> Self {
        Self { step, steps, timestep, loss }
    }

    /// The loss at the beginning of the step's last iteration; none if the step had no descent. Of a step in
    /// [windows](crate::Windows) the mean over its views. **Waits for the GPU**,
    /// so ask for it where you show it, not in every step.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if it is infinite or NaN.
    pub fn loss(&self) -> Result<Option<f64>> {
        let Some(loss) = &self.loss else { return Ok(None) };
        let value = loss.f_double_value(&[])?;
        if value.is_finite() {
            Ok(Some(value))
        } else {
            Err(Error::NotFinite { what: "loss", step: self.step, timestep: self.timestep })
        }
    }
}

/// Index and timestep of the first step that is taken, where only the last `strength` (above 0, 1 are all) of the timesteps are.
pub(crate) fn start_of_last(timesteps: &[f64], strength: f64, advised: f64) -> Result<(usize, f64)> {
    let steps = timesteps.len();
    // 0.8 of 20 are 16, though their product in f64 may be a little more.
    let taken = (steps as f64 * strength - 1e-9).ceil();
    let first = steps.saturating_sub(taken as usize);
    match timesteps.get(first) {
        Some(&timestep) if strength > 0.0 && strength <= 1.0 => Ok((first, timestep)),
        _ => Err(Error::argument("strength", format!("{strength} of {steps} steps are none, or more than all; use {advised} or so"))),
    }
}
