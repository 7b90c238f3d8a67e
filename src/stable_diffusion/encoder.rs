//! The half that a U-Net and a ControlNet have in common: the way down, and the middle.

use super::block::{self, BlockShape, Layer};
use super::config::Config;
use super::layers::Conv2d;
use super::resnet::ResnetStyle;
use super::time::TimeEmbedding;
use super::transformer::{Pass, TransformerShape};
use super::weights::Scope;
use super::{layers::Activation, Condition};
use crate::scalar::WithNumber;
use crate::{Error, Result};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// Whether a block has attention, by the names of diffusers.
const DOWN: &[(&str, bool)] = &[("DownBlock2D", false), ("CrossAttnDownBlock2D", true)];
const MID: &[(&str, bool)] = &[("UNetMidBlock2D", false), ("UNetMidBlock2DCrossAttn", true)];

/// What `config.json` says of the network's levels, each with half the sides of the one before.
#[derive(Debug)]
pub(crate) struct Levels {
    channels: Vec<i64>,
    heads: Vec<i64>,
    texts: Vec<i64>,
    layers: Vec<i64>,
    depths: Vec<i64>,
    use_linear: bool,
    time_width: i64,
    pub(crate) resnet: ResnetStyle,
}

impl Levels {
    pub(crate) fn read(config: &Config) -> Result<Self> {
        config.require(&[
            ("class_embed_type", json!(null)),
            ("num_class_embeds", json!(null)),
            ("class_embeddings_concat", json!(false)),
            ("encoder_hid_dim", json!(null)),
            ("encoder_hid_dim_type", json!(null)),
            ("cross_attention_norm", json!(null)),
            ("mid_block_only_cross_attention", json!(false)),
            ("only_cross_attention", json!(false)),
            ("dual_cross_attention", json!(false)),
            ("attention_type", json!("default")),
            ("resnet_time_scale_shift", json!("default")),
            ("resnet_skip_time_act", json!(false)),
            ("resnet_out_scale_factor", json!(1.0)),
            ("time_embedding_type", json!("positional")),
            ("time_embedding_act_fn", json!(null)),
            ("timestep_post_act", json!(null)),
            ("time_cond_proj_dim", json!(null)),
        ])?;
        if config.is_null("mid_block_type") {
            return Err(config.bad("`mid_block_type` is null; networks without a mid block are not supported"));
        }
        let channels = config.counts("block_out_channels")?;
        let blocks = channels.len();
        if blocks > 16 {
            // Each halves the picture.
            return Err(config.bad(format!("`block_out_channels` names {blocks} blocks; at most 16 are possible")));
        }
        let groups = config.groups(&channels)?;
        // The config's name says dim, but for these networks it has always been the number of heads.
        let key = if config.get("num_attention_heads").is_some() { "num_attention_heads" } else { "attention_head_dim" };
        let activation = config.choice("act_fn", "silu", Activation::NAMES)?;
        let epsilon = config.positive("norm_eps", 1e-5)?;
        let time_width = config.count("time_embedding_dim", 4 * channels.first().copied().unwrap_or(1))?;
        Ok(Self {
            heads: config.per_block(key, 8, blocks)?,
            texts: config.per_block("cross_attention_dim", 1280, blocks)?,
            layers: config.per_block("layers_per_block", 2, blocks)?,
            depths: config.per_block("transformer_layers_per_block", 1, blocks)?,
            use_linear: config.flag("use_linear_projection", false)?,
            time_width,
            resnet: ResnetStyle { groups, epsilon, activation, time: Some(time_width), scale: 1.0 },
            channels,
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.channels.len()
    }

    pub(crate) fn channels(&self, level: usize) -> i64 {
        pick(&self.channels, level)
    }

    /// Residual blocks on the way down.
    pub(crate) fn layers(&self, level: usize) -> i64 {
        pick(&self.layers, level)
    }

    pub(crate) fn depths(&self) -> &[i64] {
        &self.depths
    }

    /// The transformers of a level, `depth` layers each.
    pub(crate) fn transformer(&self, level: usize, depth: i64) -> TransformerShape {
        TransformerShape {
            channels: self.channels(level),
            heads: pick(&self.heads, level),
            layers: depth,
            text: pick(&self.texts, level),
            groups: self.resnet.groups,
            use_linear: self.use_linear,
        }
    }

    /// Channels of each skip of the way down, in the order in which they come.
    fn skips(&self) -> Vec<i64> {
        let mut skips = vec![self.channels(0)];
        for level in 0..self.count() {
            let halved = i64::from(level + 1 < self.count());
            skips.extend((0..self.layers(level) + halved).map(|_| self.channels(level)));
        }
        skips
    }
}

fn pick(list: &[i64], level: usize) -> i64 {
    list.get(level).copied().unwrap_or(1)
}

/// The network's first half. Latents `(batch, in_channels, height, width)` of any sides.
#[derive(Debug)]
pub(crate) struct Encoder {
    conv_in: Conv2d,
    time: TimeEmbedding,
    /// The way down, then the middle.
    layers: Vec<Layer>,
    skips: Vec<i64>,
    in_channels: i64,
    text_width: i64,
    center_input: bool,
    pub(crate) kind: Kind,
    pub(crate) device: Device,
}

/// Latents, timestep and text as the first block takes them.
pub(crate) struct Start {
    pub(crate) x: Tensor,
    pub(crate) time: Tensor,
    pub(crate) text: Tensor,
}

impl Encoder {
    pub(crate) fn new(config: &Config, levels: &Levels, at: &Scope<'_>, device: Device, kind: Kind) -> Result<Self> {
        let blocks = levels.count();
        let types = config.choices("down_block_types", DOWN)?;
        if types.len() != blocks {
            return Err(config.bad(format!("names {} blocks in `down_block_types` for {blocks} `block_out_channels`", types.len())));
        }
        let padding = match config.number("downsample_padding", 1.0)? {
            0.0 => 0,
            1.0 => 1,
            other => return Err(config.bad(format!("`downsample_padding` is {other}; it must be 0 or 1"))),
        };
        let (first, resnet) = (levels.channels(0), levels.resnet);
        let time = TimeEmbedding::new(config, at, (first, levels.time_width), resnet.activation, (device, kind))?;
        let mut layers = vec![];
        for (i, attends) in types.iter().enumerate() {
            let inputs = levels.channels(i.saturating_sub(1));
            let transformer = attends.then(|| levels.transformer(i, pick(&levels.depths, i)));
            let shape = BlockShape { inputs, outputs: levels.channels(i), layers: levels.layers(i), resnet, transformer };
            layers.extend(block::down(&at.at("down_blocks").at(i), shape, (i + 1 < blocks).then_some(padding))?);
        }
        let last = blocks.saturating_sub(1);
        let mid_resnet = ResnetStyle { scale: config.positive("mid_block_scale_factor", 1.0)?, ..resnet };
        let attends = config.choice("mid_block_type", "UNetMidBlock2DCrossAttn", MID)?;
        let transformer = attends.then(|| levels.transformer(last, pick(&levels.depths, last)));
        layers.extend(block::mid(&at.at("mid_block"), levels.channels(last), mid_resnet, transformer)?);
        let in_channels = config.count("in_channels", 4)?;
        Ok(Self {
            conv_in: Conv2d::new(&at.at("conv_in"), in_channels, first, odd_kernel(config, "conv_in_kernel")?)?,
            time,
            layers,
            skips: levels.skips(),
            in_channels,
            text_width: pick(&levels.texts, 0),
            center_input: config.flag("center_input_sample", false)?,
            kind,
            device,
        })
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(crate) fn in_channels(&self) -> i64 {
        self.in_channels
    }

    pub(crate) fn text_width(&self) -> i64 {
        self.text_width
    }

    /// Width of the pooled text, where the network wants it.
    pub(crate) fn pooled_width(&self) -> Option<i64> {
        self.time.pooled_width()
    }

    /// Channels of each skip; the middle has as many as the last.
    pub(crate) fn skips(&self) -> &[i64] {
        &self.skips
    }

    /// Checks shapes and embeds. `timestep` is `[]` or `(batch)`.
    pub(crate) fn start(&self, latents: &Tensor, timestep: &Tensor, condition: &Condition) -> Result<Start> {
        let batch = self.check(latents, condition)?;
        let mut x = latents.f_to_kind(self.kind)?;
        if self.center_input {
            x = x.times(2.0)?.plus(-1.0)?;
        }
        let time = self.time.forward(timestep, batch, condition)?;
        let text = condition.text.f_to_device(self.device)?.f_to_kind(self.kind)?;
        Ok(Start { x: self.conv_in.forward(&x)?, time, text })
    }

    /// The middle's output and the skips, the first of which is `x`.
    pub(crate) fn forward(&self, x: Tensor, time: &Tensor, pass: &mut Pass<'_>) -> Result<(Tensor, Vec<Tensor>)> {
        let mut skips = vec![x.shallow_clone()];
        let mut x = x;
        for layer in &self.layers {
            x = layer.forward(x, time, pass, &mut skips)?;
        }
        Ok((x, skips))
    }

    fn check(&self, latents: &Tensor, condition: &Condition) -> Result<i64> {
        let channels = self.in_channels;
        let batch = match latents.size().as_slice() {
            &[batch, c, height, width] if c == channels && batch > 0 && height > 0 && width > 0 => batch,
            other => return Err(Error::shape("latents", format!("(batch, {channels}, height, width)"), other.to_vec())),
        };
        let width = self.text_width;
        match condition.text.size().as_slice() {
            &[b, tokens, w] if (b == 1 || b == batch) && tokens > 0 && w == width => Ok(batch),
            other => Err(Error::shape("condition", format!("text of (1 or {batch}, tokens, {width})"), other.to_vec())),
        }
    }
}

/// Of a convolution that keeps the sides.
pub(crate) fn odd_kernel(config: &Config, key: &str) -> Result<i64> {
    let kernel = config.count(key, 3)?;
    if kernel % 2 == 1 && kernel <= 15 {
        Ok(kernel)
    } else {
        Err(config.bad(format!("`{key}` is {kernel}; it must be odd and at most 15")))
    }
}
