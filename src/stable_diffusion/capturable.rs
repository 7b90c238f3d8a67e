//! The networks with their timestep as a tensor, for graphs.

use super::{checkpointing, Condition, StableDiffusion, UNet};
use crate::cuda_graphs::{plain_gradient_at, Capturable};
use crate::{AttentionHook, Error, Features, Result};
use std::ops::Range;
use tch::Tensor;

impl Capturable for UNet {
    fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        Self::forward_at(self, latents, timestep, condition, hook)
    }
}

/// Without controls, which the features have no part in: these act at some timesteps and not at others.
impl Capturable for StableDiffusion {
    fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        check(condition)?;
        self.unet.forward_with(latents, timestep, condition, None, hook)
    }

    fn gradient_at(
        &self,
        latents: &Tensor,
        timestep: &Tensor,
        condition: &Condition,
        layers: Range<usize>,
        value: &mut dyn FnMut(&Features) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        check(condition)?;
        if self.checkpointing {
            return checkpointing::gradient(&self.unet, latents, timestep, condition, layers, value);
        }
        plain_gradient_at(self, latents, timestep, condition, layers, value)
    }
}

fn check(condition: &Condition) -> Result<()> {
    if condition.controls.is_empty() {
        return Ok(());
    }
    Err(Error::argument("condition", "has controls, which a graph cannot follow: they act at some timesteps and not at others"))
}
