//! `UNet2DConditionModel`: the noise predictor of Stable Diffusion, its fine-tunes and SDXL, from its `config.json`.

use super::block::{BlockShape, DownBlock, MidBlock, UpBlock};
use super::config::Config;
use super::embedding::{Embedding, Sinusoid};
use super::layers::{Activation, Conv2d, GroupNorm};
use super::resnet::ResnetStyle;
use super::transformer::{Pass, TransformerShape};
use super::weights::{Scope, Weights};
use super::Condition;
use crate::scalar::WithNumber;
use crate::{AttentionHook, Denoiser, Error, Result};
use serde_json::json;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The network. Latents `(batch, in_channels, height, width)` of any sides.
#[derive(Debug)]
pub struct UNet {
    config: UNetConfig,
    conv_in: Conv2d,
    time_embedding: Embedding,
    add_embedding: Option<(Sinusoid, Embedding)>,
    down: Vec<DownBlock>,
    mid: MidBlock,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    kind: Kind,
    device: Device,
}

/// What `config.json` says, as far as it is used after building.
#[derive(Debug)]
struct UNetConfig {
    sample_size: Option<(i64, i64)>,
    in_channels: i64,
    text_width: i64,
    center_input: bool,
    time: Sinusoid,
    activation: Activation,
}

/// Whether a block has attention, by the names of diffusers.
const DOWN: &[(&str, bool)] = &[("DownBlock2D", false), ("CrossAttnDownBlock2D", true)];
const UP: &[(&str, bool)] = &[("UpBlock2D", false), ("CrossAttnUpBlock2D", true)];

impl UNet {
    /// From a folder with `config.json` and `diffusion_pytorch_model.safetensors` (one file or sharded, f16, bf16 or
    /// f32), its weights converted to `kind` on `device`.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Weights`], [`Error::MissingTensor`], [`Error::TensorShape`], each naming file and
    /// key or tensor.
    pub fn open(folder: impl AsRef<Path>, device: Device, kind: Kind) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let folder = folder.as_ref();
        let config = Config::open(&folder.join("config.json"))?;
        let weights = Weights::open(folder, "diffusion_pytorch_model", kind == Kind::Half, device, kind)?;
        let unet = Self::build(&config, &weights.root(), device, kind)?;
        weights.report();
        Ok(unet)
    }

    fn build(config: &Config, at: &Scope<'_>, device: Device, kind: Kind) -> Result<Self> {
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
            ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ])?;
        if config.is_null("mid_block_type") {
            return Err(config.bad("`mid_block_type` is null; networks without a mid block are not supported"));
        }
        let channels = config.counts("block_out_channels")?;
        let blocks = channels.len();
        let down_types = config.choices("down_block_types", DOWN)?;
        let up_types = config.choices("up_block_types", UP)?;
        if down_types.len() != blocks || up_types.len() != blocks {
            return Err(config.bad(format!("names {} down and {} up blocks for {blocks} `block_out_channels`", down_types.len(), up_types.len())));
        }
        let (first, last) = match channels.as_slice() {
            [first, .., last] => (*first, *last),
            [only] => (*only, *only),
            [] => return Err(config.bad("`block_out_channels` is empty")),
        };
        let groups = config.groups(&channels)?;
        // The config's name says dim, but for these networks it has always been the number of heads.
        let key = if config.get("num_attention_heads").is_some() { "num_attention_heads" } else { "attention_head_dim" };
        let heads = config.per_block(key, 8, blocks)?;
        let texts = config.per_block("cross_attention_dim", 1280, blocks)?;
        let layers = config.per_block("layers_per_block", 2, blocks)?;
        let depths = config.per_block("transformer_layers_per_block", 1, blocks)?;
        let depths_up = match config.get("reverse_transformer_layers_per_block") {
            Some(_) => config.per_block("reverse_transformer_layers_per_block", 1, blocks)?,
            None => depths.iter().rev().copied().collect(),
        };
        let activation = config.choice("act_fn", "silu", Activation::NAMES)?;
        let epsilon = config.positive("norm_eps", 1e-5)?;
        let use_linear = config.flag("use_linear_projection", false)?;
        let time_width = config.count("time_embedding_dim", 4 * first)?;
        let time = Sinusoid { width: first, flip_sin_to_cos: config.flag("flip_sin_to_cos", true)?, freq_shift: config.number("freq_shift", 0.0)? };
        check_shift(config, first)?;
        let add_embedding = add_embedding(config, at, time, time_width)?;
        let resnet = ResnetStyle { groups, epsilon, activation, time: Some(time_width), scale: 1.0 };
        let pick = |list: &[i64], i: usize| list.get(i).copied().unwrap_or(1);
        let transformer = |i: usize, depth: i64| TransformerShape {
            channels: pick(&channels, i),
            heads: pick(&heads, i),
            layers: depth,
            text: pick(&texts, i),
            groups,
            use_linear,
        };

        let padding = match config.number("downsample_padding", 1.0)? {
            0.0 => 0,
            1.0 => 1,
            other => return Err(config.bad(format!("`downsample_padding` is {other}; it must be 0 or 1"))),
        };
        let mut down = vec![];
        for (i, attends) in down_types.iter().enumerate() {
            let outputs = pick(&channels, i);
            let inputs = if i == 0 { first } else { pick(&channels, i - 1) };
            let transformer = attends.then(|| transformer(i, pick(&depths, i)));
            let shape = BlockShape { inputs, outputs, layers: pick(&layers, i), resnet, transformer };
            down.push(DownBlock::new(&at.at("down_blocks").at(i), shape, (i + 1 < blocks).then_some(padding))?);
        }

        let mid_resnet = ResnetStyle { scale: config.positive("mid_block_scale_factor", 1.0)?, ..resnet };
        let mid = MidBlock::new(&at.at("mid_block"), mid_resnet, transformer(blocks - 1, pick(&depths, blocks - 1)))?;

        let mut up = vec![];
        for (i, attends) in up_types.iter().enumerate() {
            let level = blocks - 1 - i;
            let inputs = if i == 0 { last } else { pick(&channels, level + 1) };
            let transformer = attends.then(|| transformer(level, pick(&depths_up, i)));
            let shape = BlockShape { inputs, outputs: pick(&channels, level), layers: pick(&layers, level) + 1, resnet, transformer };
            up.push(UpBlock::new(&at.at("up_blocks").at(i), shape, pick(&channels, level.saturating_sub(1)), i + 1 < blocks)?);
        }

        let in_channels = config.count("in_channels", 4)?;
        Ok(Self {
            conv_in: Conv2d::new(&at.at("conv_in"), in_channels, first, odd_kernel(config, "conv_in_kernel")?)?,
            time_embedding: Embedding::new(&at.at("time_embedding"), first, time_width, activation)?,
            add_embedding,
            down,
            mid,
            up,
            norm_out: GroupNorm::new(&at.at("conv_norm_out"), groups, first, epsilon)?,
            conv_out: Conv2d::new(&at.at("conv_out"), first, config.count("out_channels", 4)?, odd_kernel(config, "conv_out_kernel")?)?,
            config: UNetConfig {
                sample_size: sample_size(config)?,
                in_channels,
                text_width: pick(&texts, 0),
                center_input: config.flag("center_input_sample", false)?,
                time,
                activation,
            },
            kind,
            device,
        })
    }

    /// How many self-attention layers it has: 16 in Stable Diffusion 1.5, 70 in SDXL.
    pub fn self_attention_layers(&self) -> usize {
        let down: usize = self.down.iter().map(DownBlock::self_attentions).sum();
        let up: usize = self.up.iter().map(UpBlock::self_attentions).sum();
        down + self.mid.self_attentions() + up
    }

    /// Channels of the latents.
    pub fn in_channels(&self) -> i64 {
        self.config.in_channels
    }

    /// Width of the text embeddings.
    pub fn cross_attention_dim(&self) -> i64 {
        self.config.text_width
    }

    /// Height and width, in latents, of the pictures that it was trained on, where its configuration says so.
    pub fn sample_size(&self) -> Option<(i64, i64)> {
        self.config.sample_size
    }

    /// Whether it wants pooled text and time ids beside the text, as SDXL does.
    pub fn wants_pooled_text(&self) -> bool {
        self.add_embedding.is_some()
    }

    /// Width of the pooled text that it wants, where it wants any.
    pub(crate) fn pooled_width(&self) -> Option<i64> {
        self.add_embedding.as_ref().map(|(sinusoid, embedding)| embedding.inputs() - 6 * sinusoid.width)
    }

    /// Bytes of its first layer's output, for so many latents (height times width).
    pub(crate) fn activation_bytes(&self, latents: i64) -> i64 {
        let width = i64::try_from(self.kind.elt_size_in_bytes()).unwrap_or(4);
        latents.saturating_mul(self.config.time.width).saturating_mul(width)
    }

    /// As [`Denoiser::forward`], with the timestep as a tensor, `[]` or `(batch)`, on the network's device.
    ///
    /// # Errors
    /// [`Error::Shape`] for latents or conditions that do not fit; the hook's; libtorch's.
    pub fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        let batch = self.check(latents, condition)?;
        let mut x = latents.f_to_kind(self.kind)?;
        if self.config.center_input {
            x = x.times(2.0)?.plus(-1.0)?;
        }
        let time = self.time(timestep, batch, condition)?;
        let text = condition.text.f_to_device(self.device)?.f_to_kind(self.kind)?;
        let mut pass = Pass::new(&text, hook);
        x = self.conv_in.forward(&x)?;
        let mut skips = vec![x.shallow_clone()];
        for block in &self.down {
            x = block.forward(x, &time, &mut pass, &mut skips)?;
        }
        x = self.mid.forward(&x, &time, &mut pass)?;
        for block in &self.up {
            x = block.forward(x, &time, &mut pass, &mut skips)?;
        }
        let x = self.conv_out.forward(&self.config.activation.forward(&self.norm_out.forward(&x)?)?)?;
        Ok(x.f_to_kind(latents.f_kind()?)?)
    }

    fn check(&self, latents: &Tensor, condition: &Condition) -> Result<i64> {
        let channels = self.config.in_channels;
        let batch = match latents.size().as_slice() {
            &[batch, c, height, width] if c == channels && batch > 0 && height > 0 && width > 0 => batch,
            other => return Err(Error::shape("latents", format!("(batch, {channels}, height, width)"), other.to_vec())),
        };
        let width = self.config.text_width;
        match condition.text.size().as_slice() {
            &[b, tokens, w] if (b == 1 || b == batch) && tokens > 0 && w == width => Ok(batch),
            other => Err(Error::shape("condition", format!("text of (1 or {batch}, tokens, {width})"), other.to_vec())),
        }
    }

    /// The embedding of timestep (and pooled text), after the activation that every residual block begins with.
    fn time(&self, timestep: &Tensor, batch: i64, condition: &Condition) -> Result<Tensor> {
        let numbers = timestep.f_to_device(self.device)?.f_reshape([-1])?;
        if !matches!(numbers.size().as_slice(), &[n] if n == 1 || n == batch) {
            return Err(Error::shape("timestep", format!("one number, or {batch}"), timestep.size()));
        }
        let mut time = self.time_embedding.forward(&self.config.time.forward(&numbers)?.f_to_kind(self.kind)?)?;
        if let Some((sinusoid, embedding)) = &self.add_embedding {
            let (Some(pooled), Some(ids)) = (&condition.pooled, &condition.time_ids) else {
                return Err(Error::argument("condition", "this network wants pooled text and time ids, too"));
            };
            let rows = pooled_rows(pooled, ids, batch, embedding.inputs() - 6 * sinusoid.width)?;
            let ids = sinusoid.forward(&ids.f_to_device(self.device)?.f_flatten(0, 1)?)?.f_reshape([rows, -1])?;
            let both = Tensor::f_cat(&[pooled.f_to_device(self.device)?.f_to_kind(Kind::Float)?, ids], -1)?;
            time = time.f_add(&embedding.forward(&both.f_to_kind(self.kind)?)?)?;
        }
        let time = if time.size2()?.0 == batch { time } else { time.f_expand([batch, -1], false)? };
        self.config.activation.forward(&time)
    }
}

impl Denoiser for UNet {
    type Condition = Condition;

    fn forward(&self, latents: &Tensor, timestep: f64, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        // Made on the device: copying a number there would wait for all that is under way.
        let timestep = Tensor::f_ones([1], (Kind::Float, self.device))?.times(timestep)?;
        self.forward_at(latents, &timestep, condition, hook)
    }
}

/// How many rows pooled text and time ids have, which must be the same for both: one, or one per picture.
fn pooled_rows(pooled: &Tensor, ids: &Tensor, batch: i64, width: i64) -> Result<i64> {
    let fits = |rows: i64| rows == 1 || rows == batch;
    let rows = match pooled.size().as_slice() {
        &[rows, w] if fits(rows) && w == width => rows,
        other => return Err(Error::shape("pooled", format!("(1 or {batch}, {width})"), other.to_vec())),
    };
    match ids.size().as_slice() {
        &[r, 6] if r == rows => Ok(rows),
        other => Err(Error::shape("time ids", format!("({rows}, 6)"), other.to_vec())),
    }
}

/// SDXL's: pooled text and the sinusoids of the time ids.
fn add_embedding(config: &Config, at: &Scope<'_>, time: Sinusoid, time_width: i64) -> Result<Option<(Sinusoid, Embedding)>> {
    let Some(_) = config.get("addition_embed_type") else { return Ok(None) };
    config.choice("addition_embed_type", "text_time", &[("text_time", ())])?;
    let width = config.count("addition_time_embed_dim", 256)?;
    let inputs = config.count("projection_class_embeddings_input_dim", 2816)?;
    if inputs <= 6 * width {
        return Err(config.bad(format!(
            "`projection_class_embeddings_input_dim` is {inputs}, which leaves no room for text beside six times `addition_time_embed_dim` {width}"
        )));
    }
    check_shift(config, width)?;
    // SiLU whatever the blocks' activation is.
    Ok(Some((Sinusoid { width, ..time }, Embedding::new(&at.at("add_embedding"), inputs, time_width, Activation::Silu)?)))
}

/// Half the width is divided by after the shift.
fn check_shift(config: &Config, width: i64) -> Result<()> {
    let shift = config.number("freq_shift", 0.0)?;
    if shift < (width / 2) as f64 {
        Ok(())
    } else {
        Err(config.bad(format!("`freq_shift` is {shift}; it must be below {}, half the width of the time embedding", width / 2)))
    }
}

/// One number for both sides, or a pair.
fn sample_size(config: &Config) -> Result<Option<(i64, i64)>> {
    match config.get("sample_size") {
        None => Ok(None),
        Some(serde_json::Value::Array(_)) => match config.counts("sample_size")?.as_slice() {
            &[height, width] => Ok(Some((height, width))),
            other => Err(config.bad(format!("`sample_size` is {other:?}; it must be one number, or two"))),
        },
        Some(_) => config.count("sample_size", 64).map(|side| Some((side, side))),
    }
}

fn odd_kernel(config: &Config, key: &str) -> Result<i64> {
    let kernel = config.count(key, 3)?;
    if kernel % 2 == 1 && kernel <= 15 {
        Ok(kernel)
    } else {
        Err(config.bad(format!("`{key}` is {kernel}; it must be odd and at most 15")))
    }
}
