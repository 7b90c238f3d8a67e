//! A run's state as a file.

use crate::{optimizer::OptimizerState, tensor_file, Error, Result};
use std::path::Path;
use tch::{Kind, Tensor};

/// All that a stopped run needs to go on to the same picture, beside its settings and references.
#[derive(Debug)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// `(batch, channels, height, width)`, in latents.
    pub latents: Tensor,
    /// The optimizer's state.
    pub optimizer: OptimizerState,
}

/// Before the names of the optimizer's tensors in the file.
const OPTIMIZER: &str = "optimizer.";

impl Checkpoint {
    pub(crate) fn new(step: usize, steps: usize, latents: Tensor, optimizer: OptimizerState) -> Self {
        Self { step, steps, latents, optimizer }
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
            ("steps".to_owned(), count(self.steps)?),
        ];
        tensors.extend(self.optimizer.iter().map(|(name, tensor)| (format!("{OPTIMIZER}{name}"), tensor.shallow_clone())));
        tensor_file::write(&tensors, path.as_ref())
    }

    /// Reads what [`save`](Self::save) wrote, on the CPU.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Weights`] if the file is damaged or something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (mut latents, mut step, mut steps, mut optimizer) = (None, None, None, vec![]);
        for (name, tensor) in tensor_file::read(path)? {
            match name.as_str() {
                "latents" => latents = Some(tensor),
                "step" => step = count(&tensor),
                "steps" => steps = count(&tensor),
                other => {
                    if let Some(name) = other.strip_prefix(OPTIMIZER) {
                        optimizer.push((name.to_owned(), tensor));
                    }
                }
            }
        }
        match (latents, step, steps) {
            (Some(latents), Some(step), Some(steps)) => Ok(Self { step, steps, latents, optimizer }),
            _ => Err(Error::Weights { file: path.to_owned(), reason: "is not a run's checkpoint: it lacks `latents`, `step` or `steps`".into() }),
        }
    }
}

fn count(tensor: &Tensor) -> Option<usize> {
    (tensor.numel() == 1 && tensor.f_kind().ok()? == Kind::Int64).then(|| tensor.f_int64_value(&[0]).ok())?.and_then(|n| usize::try_from(n).ok())
}
