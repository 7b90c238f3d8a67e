//! KV-injection, the training-free baseline of the paper's Fig. 3: a second hook.

use crate::{AttentionHook, AttentionSite, Features, Qkv, Result};
use tch::Tensor;

/// Replaces keys and values by a reference's in the layers that the reference has; elsewhere plain attention.
#[derive(Debug)]
pub struct KeyValueInjection<'a> {
    /// Recorded at the same timestep; a batch of 1 serves any batch.
    pub reference: &'a Features,
}

impl AttentionHook for KeyValueInjection<'_> {
    fn attend(&mut self, site: &AttentionSite, mut qkv: Qkv) -> Result<Tensor> {
        if let Some(layer) = self.reference.at(site) {
            let (batch, ..) = qkv.query.size4()?;
            qkv.key = layer.key.f_expand([batch, -1, -1, -1], false)?;
            qkv.value = layer.value.f_expand([batch, -1, -1, -1], false)?;
        }
        qkv.attend()
    }
}
