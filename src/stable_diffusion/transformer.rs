//! The transformers between a U-Net's residual blocks: self-attention, cross-attention, feed-forward.

use super::layers::{merge_heads, split_heads, Conv2d, GroupNorm, LayerNorm};
use super::linear::Linear;
use super::weights::Scope;
use crate::attention::attend_by;
use crate::{AttentionHook, AttentionSite, Error, Qkv, Result};
use tch::Tensor;

/// One forward pass on its way through the network: the condition, the hook, and how many attention layers it met.
pub(crate) struct Pass<'a> {
    /// Text embeddings, `(1 or batch, tokens, width)`.
    text: &'a Tensor,
    hook: &'a mut dyn AttentionHook,
    place: Place,
}

/// How many attention layers a pass has met.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Place {
    self_attentions: usize,
    cross_attentions: usize,
}

impl<'a> Pass<'a> {
    pub(crate) fn new(text: &'a Tensor, hook: &'a mut dyn AttentionHook) -> Self {
        Self { text, hook, place: Place::default() }
    }

    /// The same way, taken up at a later place.
    pub(crate) fn starting_at(mut self, place: Place) -> Self {
        self.place = place;
        self
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }

    fn self_attention(&mut self, grid: (i64, i64), qkv: Qkv) -> Result<Tensor> {
        self.place.self_attentions += 1;
        attend_by(self.hook, &AttentionSite::self_attention(self.place.self_attentions - 1, grid), qkv)
    }

    fn cross_attention(&mut self, grid: (i64, i64), qkv: Qkv) -> Result<Tensor> {
        self.place.cross_attentions += 1;
        attend_by(self.hook, &AttentionSite::cross_attention(self.place.cross_attentions - 1, grid), qkv)
    }
}

/// Sizes of one transformer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TransformerShape {
    pub(crate) channels: i64,
    pub(crate) heads: i64,
    pub(crate) layers: i64,
    /// Width of the text embeddings.
    pub(crate) text: i64,
    pub(crate) groups: i64,
    pub(crate) use_linear: bool,
}

/// A picture's channels in and out, tokens between.
#[derive(Debug)]
pub(crate) struct Transformer {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<Block>,
    proj_out: Projection,
}

/// The same numbers either way: a convolution of kernel 1 before, or a linear layer after, pixels become tokens.
#[derive(Debug)]
enum Projection {
    Conv(Conv2d),
    Linear(Linear),
}

impl Projection {
    fn new(at: &Scope<'_>, inputs: i64, outputs: i64, use_linear: bool) -> Result<Self> {
        Ok(if use_linear { Self::Linear(Linear::new(at, inputs, outputs)?) } else { Self::Conv(Conv2d::new(at, inputs, outputs, 1)?) })
    }
}

impl Transformer {
    pub(crate) fn new(at: &Scope<'_>, shape: TransformerShape) -> Result<Self> {
        // As wide as whole heads can be.
        let width = shape.heads * (shape.channels / shape.heads);
        Ok(Self {
            norm: GroupNorm::new(&at.at("norm"), shape.groups, shape.channels, 1e-6)?,
            proj_in: Projection::new(&at.at("proj_in"), shape.channels, width, shape.use_linear)?,
            blocks: (0..shape.layers).map(|i| Block::new(&at.at("transformer_blocks").at(i), width, shape)).collect::<Result<_>>()?,
            proj_out: Projection::new(&at.at("proj_out"), width, shape.channels, shape.use_linear)?,
        })
    }

    /// Self-attention layers in it.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(crate) fn forward(&self, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let (_, _, height, width) = x.size4()?;
        let tokens = |x: &Tensor| x.f_flatten(2, 3).and_then(|x| x.f_transpose(1, 2));
        let pixels = |x: &Tensor| x.f_transpose(1, 2).and_then(|x| x.f_unflatten(2, [height, width]));
        let normed = self.norm.forward(x)?;
        let mut h = match &self.proj_in {
            Projection::Conv(conv) => tokens(&conv.forward(&normed)?)?,
            Projection::Linear(linear) => linear.forward(&tokens(&normed)?)?,
        };
        for block in &self.blocks {
            h = block.forward(&h, (height, width), pass)?;
        }
        let h = match &self.proj_out {
            Projection::Conv(conv) => conv.forward(&pixels(&h)?.f_contiguous()?)?,
            Projection::Linear(linear) => pixels(&linear.forward(&h)?)?,
        };
        // In the layout of `x`: convolutions behind a sum in that of tokens would copy their weights in each pass.
        Ok(x.f_add(&h)?)
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    self_attention: Attention,
    norm2: LayerNorm,
    cross_attention: Attention,
    norm3: LayerNorm,
    feed_forward: FeedForward,
}

impl Block {
    fn new(at: &Scope<'_>, width: i64, shape: TransformerShape) -> Result<Self> {
        let norm = |name: &str| LayerNorm::new(&at.at(name), width, 1e-5);
        Ok(Self {
            norm1: norm("norm1")?,
            self_attention: Attention::new(&at.at("attn1"), width, width, shape.heads)?,
            norm2: norm("norm2")?,
            cross_attention: Attention::new(&at.at("attn2"), width, shape.text, shape.heads)?,
            norm3: norm("norm3")?,
            feed_forward: FeedForward::new(&at.at("ff.net"), width)?,
        })
    }

    fn forward(&self, x: &Tensor, grid: (i64, i64), pass: &mut Pass<'_>) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let attended = pass.self_attention(grid, self.self_attention.project(&normed, &normed)?)?;
        // Sums have the layout of their first term, and `x` may come with the tokens innermost, which each norm would have to copy.
        let x = self.self_attention.merge(&attended)?.f_add(x)?;
        let text = pass.text;
        let attended = pass.cross_attention(grid, self.cross_attention.project(&self.norm2.forward(&x)?, text)?)?;
        let x = self.cross_attention.merge(&attended)?.f_add(&x)?;
        Ok(self.feed_forward.forward(&self.norm3.forward(&x)?)?.f_add(&x)?)
    }
}

#[derive(Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: i64,
}

impl Attention {
    fn new(at: &Scope<'_>, width: i64, context: i64, heads: i64) -> Result<Self> {
        Ok(Self {
            to_q: Linear::without_bias(&at.at("to_q"), width, width)?,
            to_k: Linear::without_bias(&at.at("to_k"), context, width)?,
            to_v: Linear::without_bias(&at.at("to_v"), context, width)?,
            to_out: Linear::new(&at.at("to_out.0"), width, width)?,
            heads,
        })
    }

    /// A context of batch 1 serves the whole batch: projected once, then shown to every picture.
    fn project(&self, x: &Tensor, context: &Tensor) -> Result<Qkv> {
        let query = split_heads(&self.to_q.forward(x)?, self.heads)?;
        let mut key = split_heads(&self.to_k.forward(context)?, self.heads)?;
        let mut value = split_heads(&self.to_v.forward(context)?, self.heads)?;
        let (batch, ..) = query.size4()?;
        if key.size4()?.0 != batch {
            key = key.f_expand([batch, -1, -1, -1], false)?;
            value = value.f_expand([batch, -1, -1, -1], false)?;
        }
        Ok(Qkv::new(query, key, value))
    }

    fn merge(&self, attended: &Tensor) -> Result<Tensor> {
        self.to_out.forward(&merge_heads(attended)?)
    }
}

/// GEGLU: one half of a wide projection gates the other.
#[derive(Debug)]
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn new(at: &Scope<'_>, width: i64) -> Result<Self> {
        Ok(Self { proj: Linear::new(&at.at("0.proj"), width, 8 * width)?, out: Linear::new(&at.at("2"), 4 * width, width)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Both halves in one operation, whose gradient is one tensor; that of two views would be the sum of two, each half of it zeros.
        let wide = self.proj.forward(x)?;
        let halves = wide.f_chunk(2, 2)?;
        let [hidden, gate] = halves.as_slice() else {
            return Err(Error::shape("feed-forward", "two halves", wide.size()));
        };
        self.out.forward(&hidden.f_mul(&gate.f_gelu("none")?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stable_diffusion::weights::Weights;
    use crate::PlainAttention;
    use std::path::Path;
    use tch::{Device, Kind};

    /// With linear projections, which leave tokens behind.
    #[test]
    fn sums_have_the_layout_that_comes_next() -> Result<()> {
        tch::set_num_threads(1);
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sdxl/unet");
        if !folder.exists() {
            return Ok(()); // the published package has no fixtures
        }
        let weights = Weights::open(&folder, "diffusion_pytorch_model", false, Device::Cpu, Kind::Float)?;
        let shape = TransformerShape { channels: 24, heads: 3, layers: 3, text: 24, groups: 4, use_linear: true };
        let transformer = Transformer::new(&weights.root().at("mid_block.attentions.0"), shape)?;
        let ones = |shape: &[i64]| Tensor::f_ones(shape, (Kind::Float, Device::Cpu));
        let (pixels, text) = (ones(&[1, 24, 3, 4])?, ones(&[1, 2, 24])?);
        assert!(transformer.forward(&pixels, &mut Pass::new(&text, &mut PlainAttention))?.is_contiguous());

        let tokens = pixels.f_flatten(2, 3)?.f_transpose(1, 2)?;
        assert!(!tokens.is_contiguous());
        for block in &transformer.blocks {
            assert!(block.forward(&tokens, (3, 4), &mut Pass::new(&text, &mut PlainAttention))?.is_contiguous());
        }
        Ok(())
    }
}
