//! A run's state as a file.

use crate::optimizer::{copy, copy_state, OptimizerState};
use crate::{tensor_file, Error, Procedure, Result};
use std::path::Path;
use tch::{Kind, Tensor};

/// All that a stopped run needs to go on to the same picture, beside its settings and references.
#[derive(Debug)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Of which procedure's run.
    pub procedure: Procedure,
    /// Steps done.
    pub step: usize,
    /// Those of the whole run, done or not.
    pub timesteps: Vec<f64>,
    /// `(batch, channels, height, width)`, in latents.
    pub latents: Tensor,
    /// The optimizer's state.
    pub optimizer: OptimizerState,
    /// Where the run's noise was, if it draws any: see [`Noise::state`](crate::Noise::state).
    pub noise: Option<Tensor>,
}

/// Before the names of the optimizer's tensors in the file.
const OPTIMIZER: &str = "optimizer.";

/// 1 there in a run by sampling.
const SAMPLING: &str = "sampling";

/// The name of the noise's state there.
const NOISE: &str = "noise";

impl Checkpoint {
    /// Of copies.
    pub(crate) fn new(procedure: Procedure, step: usize, timesteps: &[f64], latents: &Tensor, optimizer: &[(String, Tensor)]) -> Result<Self> {
        Ok(Self { procedure, step, timesteps: timesteps.to_vec(), latents: copy(latents)?, optimizer: copy_state(optimizer)?, noise: None })
    }

    pub(crate) fn with_noise(mut self, noise: Option<Tensor>) -> Self {
        self.noise = noise;
        self
    }

    /// A copy of the latents for a run through these timesteps that now stands at `current`.
    ///
    /// # Errors
    /// A checkpoint of the other procedure, of other timesteps, of latents of another shape, or that are not finite.
    pub(crate) fn latents_for(&self, procedure: Procedure, timesteps: &[f64], current: &Tensor) -> Result<Tensor> {
        if self.procedure != procedure {
            return Err(Error::argument("checkpoint", format!("is of a run by {:?}, this one is by {procedure:?}", self.procedure)));
        }
        let steps = self.timesteps.len();
        if steps != timesteps.len() || self.step > steps {
            return Err(Error::argument("checkpoint", format!("is at step {} of {steps}, this run has {} steps", self.step, timesteps.len())));
        }
        if let Some((theirs, ours)) = self.timesteps.iter().zip(timesteps).find(|(theirs, ours)| theirs != ours) {
            return Err(Error::argument("checkpoint", format!("is of a run through other timesteps: {theirs} where this one has {ours}")));
        }
        if self.latents.size() != current.size() {
            return Err(Error::shape("checkpoint", format!("latents {:?}, this run's", current.size()), self.latents.size()));
        }
        let latents = copy(&self.latents.f_to_device(current.device())?.f_to_kind(Kind::Float)?)?;
        if latents.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Err(Error::argument("checkpoint", "its latents are infinite or NaN"));
        }
        Ok(latents)
    }

    /// Writes a safetensors file, first under a temporary name: an older file stays until the new one is whole.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let count = |n: usize| Tensor::f_from_slice(&[i64::try_from(n).unwrap_or(i64::MAX)]);
        let mut tensors = vec![
            ("latents".to_owned(), self.latents.shallow_clone()),
            ("step".to_owned(), count(self.step)?),
            ("timesteps".to_owned(), Tensor::f_from_slice(&self.timesteps)?),
            (SAMPLING.to_owned(), count(usize::from(self.procedure == Procedure::Sampling))?),
        ];
        tensors.extend(self.noise.iter().map(|state| (NOISE.to_owned(), state.shallow_clone())));
        tensors.extend(self.optimizer.iter().map(|(name, tensor)| (format!("{OPTIMIZER}{name}"), tensor.shallow_clone())));
        tensor_file::write(&tensors, path.as_ref())
    }

    /// Reads what [`save`](Self::save) wrote, on the CPU.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Weights`] if the file is damaged or something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (mut latents, mut step, mut timesteps, mut procedure, mut noise, mut optimizer) =
            (None, None, None, Procedure::Optimisation, None, vec![]);
        for (name, tensor) in tensor_file::read(path)? {
            match name.as_str() {
                "latents" => latents = Some(tensor),
                "step" => step = count(&tensor),
                "timesteps" => timesteps = numbers(&tensor),
                SAMPLING if count(&tensor) == Some(1) => procedure = Procedure::Sampling,
                NOISE => noise = Some(tensor),
                other => {
                    if let Some(name) = other.strip_prefix(OPTIMIZER) {
                        optimizer.push((name.to_owned(), tensor));
                    }
                }
            }
        }
        match (latents, step, timesteps) {
            (Some(latents), Some(step), Some(timesteps)) => Ok(Self { procedure, step, timesteps, latents, optimizer, noise }),
            _ => Err(Error::Weights { file: path.to_owned(), reason: "is not a run's checkpoint: it lacks `latents`, `step` or `timesteps`".into() }),
        }
    }
}

fn count(tensor: &Tensor) -> Option<usize> {
    (tensor.numel() == 1 && tensor.f_kind().ok()? == Kind::Int64).then(|| tensor.f_int64_value(&[0]).ok())?.and_then(|n| usize::try_from(n).ok())
}

fn numbers(tensor: &Tensor) -> Option<Vec<f64>> {
    (tensor.dim() == 1 && tensor.f_kind().ok()? == Kind::Double).then(|| Vec::<f64>::try_from(tensor).ok())?
}
