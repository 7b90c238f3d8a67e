//! The networks with their timestep as a tensor, for graphs.

use super::{checkpointing, guidance, Condition, StableDiffusion, UNet};
use crate::cuda_graphs::{plain_gradient_at, Capturable};
use crate::{AttentionHook, Error, Features, Guidance, PlainAttention, Result};
use std::ops::Range;
use tch::Tensor;

// SAFETY: nothing replaces weights but methods that borrow the network mutably.
#[allow(unsafe_code)]
unsafe impl Capturable for UNet {
    fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        Self::forward_at(self, latents, timestep, condition, hook)
    }

    fn forward_guided_at(&self, latents: &Tensor, timestep: &Tensor, guidance: &Guidance<Condition>) -> Result<Tensor> {
        guided(self, latents, timestep, guidance)
    }
}

/// Without controls: these act at some timesteps and not at others. Features have no part in them, and noise predictions under them are
/// made pass by pass.
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Capturable for StableDiffusion {
    fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        check(condition)?;
        self.unet.forward_with(latents, timestep, condition, None, hook)
    }

    fn forward_guided_at(&self, latents: &Tensor, timestep: &Tensor, guidance: &Guidance<Condition>) -> Result<Tensor> {
        guided(self, latents, timestep, guidance)
    }

    fn can_capture(&self, condition: &Condition) -> bool {
        condition.controls.is_empty()
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

/// Prompt and negative in one batch.
fn guided<D>(network: &D, latents: &Tensor, timestep: &Tensor, guidance: &Guidance<Condition>) -> Result<Tensor>
where
    D: Capturable<Condition = Condition>,
{
    guidance::in_one_pass(latents, guidance, |latents, condition| network.forward_at(latents, timestep, condition, &mut PlainAttention))
}

fn check(condition: &Condition) -> Result<()> {
    if condition.controls.is_empty() {
        return Ok(());
    }
    Err(Error::argument("condition", "has controls, which a graph cannot follow: they act at some timesteps and not at others"))
}
