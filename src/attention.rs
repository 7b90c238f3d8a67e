//! The seam: a network calls its hook once per attention layer, and the hook computes the attention.

mod cudnn;
#[cfg(fused_attention)]
mod fused;
mod product;

pub(crate) use cudnn::{without_cudnn, without_cudnn_on};
pub(crate) use product::scaled_dot_product;

use crate::{Error, Result};
use tch::Tensor;

/// Whether the keys come from the picture itself or from its condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttentionKind {
    /// Queries, keys and values all come from the picture (in a joint attention, with text tokens before it).
    SelfAttention,
    /// Keys and values come from the condition.
    CrossAttention,
}

/// Where in the network an attention layer sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct AttentionSite {
    /// Self or cross.
    pub kind: AttentionKind,
    /// Position among the layers of this kind, in execution order, from 0.
    pub index: usize,
    /// Height and width of the grid of query tokens.
    pub grid: (i64, i64),
    /// Query tokens before the grid: the text of a joint attention, else 0.
    pub prefix: i64,
}

impl AttentionSite {
    /// The `index`th self-attention layer, over a grid of `(height, width)` tokens.
    pub fn self_attention(index: usize, grid: (i64, i64)) -> Self {
        Self { kind: AttentionKind::SelfAttention, index, grid, prefix: 0 }
    }

    /// The `index`th cross-attention layer, over a grid of `(height, width)` query tokens.
    pub fn cross_attention(index: usize, grid: (i64, i64)) -> Self {
        Self { kind: AttentionKind::CrossAttention, index, grid, prefix: 0 }
    }

    /// The same site with `tokens` query tokens before the grid.
    #[must_use]
    pub fn with_prefix(mut self, tokens: i64) -> Self {
        self.prefix = tokens;
        self
    }

    /// Query tokens in all.
    pub fn tokens(&self) -> i64 {
        self.prefix.saturating_add(self.grid.0.saturating_mul(self.grid.1))
    }
}

/// Queries, keys and values after projection and head split, each `(batch, heads, tokens, head_dim)`; after
/// rotary embeddings, where there are any.
///
/// Heads folded into the batch? `q.f_reshape([-1, heads, tokens, head_dim])`.
#[derive(Debug)]
#[non_exhaustive]
pub struct Qkv {
    /// Q.
    pub query: Tensor,
    /// K.
    pub key: Tensor,
    /// V.
    pub value: Tensor,
    /// Added to the scores, or boolean (true: keep), as in `scaled_dot_product_attention`.
    pub mask: Option<Tensor>,
    /// Of the scores; none is `1 / sqrt(head_dim)`. A network that scales its queries itself says 1.
    pub scale: Option<f64>,
}

impl Qkv {
    /// Without mask, scaled by `1 / sqrt(head_dim)`.
    pub fn new(query: Tensor, key: Tensor, value: Tensor) -> Self {
        Self { query, key, value, mask: None, scale: None }
    }

    /// `Attn(Q, K, V) = softmax(Q K^T * scale + mask) V`, shape `(batch, heads, tokens, head_dim)`. On a GPU
    /// never by cuDNN, see [`device`](crate::device).
    ///
    /// # Errors
    /// libtorch's: tensors of shapes, kinds or devices that do not go together.
    pub fn attend(&self) -> Result<Tensor> {
        scaled_dot_product(&self.query, &self.key, &self.value, self.mask.as_ref(), self.scale)
    }

    /// A second handle on the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            query: self.query.shallow_clone(),
            key: self.key.shallow_clone(),
            value: self.value.shallow_clone(),
            mask: self.mask.as_ref().map(Tensor::shallow_clone),
            scale: self.scale,
        }
    }
}

/// Computes an attention layer's output; may record, replace, or stop.
pub trait AttentionHook {
    /// Returns the layer's output before heads are merged, `(batch, heads, tokens, head_dim)`, the query's but for the values'
    /// `head_dim`. This crate's networks and [`DeferredHook`] refuse another shape.
    ///
    /// # Errors
    /// [`Error::Stopped`] ends the forward pass; the network hands it on with `?`.
    fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor>;
}

impl<H: AttentionHook + ?Sized> AttentionHook for &mut H {
    fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
        (**self).attend(site, qkv)
    }
}

impl<H: AttentionHook + ?Sized> AttentionHook for Box<H> {
    fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
        (**self).attend(site, qkv)
    }
}

/// Attention with nothing added.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlainAttention;

impl AttentionHook for PlainAttention {
    fn attend(&mut self, _: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
        qkv.attend()
    }
}

/// What a hook returns, if it can be a layer's output: one of fewer tokens would be spread over all of them.
pub(crate) fn attend_by(hook: &mut dyn AttentionHook, site: &AttentionSite, qkv: Qkv) -> Result<Tensor> {
    let mut expected = qkv.query.size();
    if let (Some(last), Some(&of_values)) = (expected.last_mut(), qkv.value.size().last()) {
        *last = of_values;
    }
    let output = hook.attend(site, qkv)?;
    if output.size() != expected {
        return Err(Error::shape("attention hook's output", format!("{expected:?} in {:?} layer {}", site.kind, site.index), output.size()));
    }
    Ok(output)
}

/// A hook for networks whose layers return bare tensors instead of results: keeps the first error
/// ([`Error::Stopped`], too) until [`finish`](Self::finish), and until then goes on with plain attention.
///
/// The price against a network that hands errors on: the pass runs to its end.
pub struct DeferredHook<'h> {
    hook: &'h mut dyn AttentionHook,
    error: Option<Error>,
}

impl std::fmt::Debug for DeferredHook<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeferredHook").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<'h> DeferredHook<'h> {
    /// Around the hook that the network was given.
    pub fn new(hook: &'h mut dyn AttentionHook) -> Self {
        Self { hook, error: None }
    }

    /// The layer's output; after the first error plain attention, or where even that fails, the queries.
    pub fn attend(&mut self, site: &AttentionSite, qkv: Qkv) -> Tensor {
        if self.error.is_none() {
            match attend_by(self.hook, site, qkv.shallow_clone()) {
                Ok(output) => return output,
                Err(error) => self.error = Some(error),
            }
        }
        match qkv.attend() {
            Ok(output) => output,
            Err(error) => {
                self.error.get_or_insert(error);
                qkv.query
            }
        }
    }

    /// The network's output, or the error that was kept.
    ///
    /// # Errors
    /// The first of the hook.
    pub fn finish(self, output: Tensor) -> Result<Tensor> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(output),
        }
    }
}
