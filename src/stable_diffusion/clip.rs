//! `CLIPTextModel` and `CLIPTextModelWithProjection`: token ids to text embeddings, from their `config.json`.

use super::config::Config;
use super::layers::{merge_heads, split_heads, Activation, LayerNorm};
use super::linear::Linear;
use super::weights::{Scope, Weights};
use crate::scalar::integer;
use crate::{attention::scaled_dot_product, Error, Result};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The text encoder.
#[derive(Debug)]
pub struct ClipTextModel {
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    projection: Option<Linear>,
    /// The id at which a text ends.
    end: i64,
    heads: i64,
    width: i64,
    positions: usize,
    device: Device,
}

/// What the encoder makes of a batch of texts.
#[derive(Debug)]
#[non_exhaustive]
pub struct ClipOutput {
    /// The last hidden state after the final norm, `(batch, tokens, hidden_size)`: what Stable Diffusion 1 and 2 want.
    pub last: Tensor,
    /// The hidden state before the last layer, without a norm, `(batch, tokens, hidden_size)`: what SDXL wants.
    pub penultimate: Tensor,
    /// The last hidden state at each text's end, projected, `(batch, projection_dim)`; none without a projection.
    pub pooled: Option<Tensor>,
}

/// Configurations that say this were written when texts were taken to end at their highest id, and transformers still
/// does so with them.
const LEGACY_END: i64 = 2;

const ACTIVATIONS: &[(&str, Activation)] = &[("quick_gelu", Activation::QuickGelu), ("gelu", Activation::Gelu)];

impl ClipTextModel {
    /// From a folder with `config.json` and `model.safetensors`, whose names may begin with `text_model.` or not.
    ///
    /// # Errors
    /// As [`UNet::open`](super::UNet::open).
    pub fn open(folder: impl AsRef<Path>, device: Device, kind: Kind) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let folder = folder.as_ref();
        let config = Config::open(&folder.join("config.json"))?;
        let weights = Weights::open(folder, "model", kind == Kind::Half, device, kind)?;
        let root = weights.root();
        let inner = root.at("text_model");
        let mut model = Self::build(&config, if inner.has("final_layer_norm.weight") { &inner } else { &root }, device)?;
        if root.at("text_projection").has("weight") {
            model.projection = Some(Linear::without_bias(&root.at("text_projection"), model.width, config.count("projection_dim", 512)?)?);
        }
        weights.report();
        Ok(model)
    }

    fn build(config: &Config, at: &Scope<'_>, device: Device) -> Result<Self> {
        // transformers leaves out what is its default.
        let width = config.count("hidden_size", 512)?;
        let heads = config.count("num_attention_heads", 8)?;
        if width % heads != 0 {
            return Err(config.bad(format!("`num_attention_heads` is {heads}, which does not divide the `hidden_size` {width}")));
        }
        let shape = LayerShape {
            width,
            inner: config.count("intermediate_size", 2048)?,
            epsilon: config.positive("layer_norm_eps", 1e-5)?,
            activation: config.choice("hidden_act", "quick_gelu", ACTIVATIONS)?,
        };
        let embeddings = at.at("embeddings");
        let positions = config.count("max_position_embeddings", 77)?;
        Ok(Self {
            token_embedding: embeddings.at("token_embedding").tensor("weight", &[config.count("vocab_size", 49408)?, width])?,
            position_embedding: embeddings.at("position_embedding").tensor("weight", &[positions, width])?,
            layers: (0..config.count("num_hidden_layers", 12)?).map(|i| Layer::new(&at.at("encoder.layers").at(i), shape)).collect::<Result<_>>()?,
            final_norm: LayerNorm::new(&at.at("final_layer_norm"), width, shape.epsilon)?,
            projection: None,
            end: end(config)?,
            heads,
            width,
            positions: usize::try_from(positions).unwrap_or(usize::MAX),
            device,
        })
    }

    /// Width of the embeddings.
    pub fn width(&self) -> i64 {
        self.width
    }

    /// Width of the pooled text, where the encoder has a projection.
    pub fn pooled_width(&self) -> Option<i64> {
        self.projection.as_ref().map(Linear::outputs)
    }

    /// The id at which a text ends, for the pooled text; none where it is the highest.
    pub(crate) fn end(&self) -> Option<i64> {
        Some(self.end).filter(|end| *end != LEGACY_END)
    }

    /// The most tokens of a text.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// For ids `(batch, tokens)`.
    ///
    /// # Errors
    /// More tokens than positions, or an id outside of the vocabulary.
    pub fn forward(&self, ids: &Tensor) -> Result<ClipOutput> {
        let positions = self.position_embedding.size2()?.0;
        let tokens = match ids.size().as_slice() {
            &[batch, tokens] if batch > 0 && (1..=positions).contains(&tokens) => tokens,
            other => return Err(Error::shape("token ids", format!("(batch, 1..={positions})"), other.to_vec())),
        };
        let vocabulary = self.token_embedding.size2()?.0;
        let ids = ids.f_to_device(self.device)?.f_to_kind(Kind::Int64)?;
        // Out of range is undefined on a GPU.
        if ids.f_lt_tensor(&integer(0)?)?.f_logical_or(&ids.f_ge_tensor(&integer(vocabulary)?)?)?.f_any()?.f_int64_value(&[])? != 0 {
            return Err(Error::argument(
                "token ids",
                format!("outside of the model's vocabulary of {vocabulary}; is the tokenizer another model's?"),
            ));
        }
        let mut x = Tensor::f_embedding(&self.token_embedding, &ids, -1, false, false)?.f_add(&self.position_embedding.f_narrow(0, 0, tokens)?)?;
        let mut penultimate = x.shallow_clone();
        for layer in &self.layers {
            penultimate = x.shallow_clone();
            x = layer.forward(&x, self.heads)?;
        }
        let last = self.final_norm.forward(&x)?;
        let pooled = self.projection.as_ref().map(|projection| projection.forward(&self.at_end(&last, &ids)?)).transpose()?;
        Ok(ClipOutput { last, penultimate, pooled })
    }

    /// The hidden states where the texts end, `(batch, hidden_size)`.
    fn at_end(&self, last: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let ends = if self.end == LEGACY_END {
            ids.f_argmax(-1, true)?
        } else {
            let ends = ids.f_eq_tensor(&integer(self.end)?)?;
            if ends.f_any_dim(-1, false)?.f_all()?.f_int64_value(&[])? == 0 {
                return Err(Error::argument("token ids", format!("hold no {}, at which texts end for this encoder", self.end)));
            }
            // The first of them: texts may be padded with ends.
            ends.f_to_kind(Kind::Int)?.f_argmax(-1, true)?
        };
        let rows = ends.f_unsqueeze(-1)?.f_expand([-1, -1, self.width], false)?;
        Ok(last.f_gather(1, &rows, false)?.f_squeeze_dim(1)?)
    }
}

/// `eos_token_id`.
fn end(config: &Config) -> Result<i64> {
    let end = config.number("eos_token_id", 49407.0)?;
    if end >= 0.0 && end.fract() == 0.0 && end <= f64::from(i32::MAX) {
        Ok(end as i64)
    } else {
        Err(config.bad(format!("`eos_token_id` is {end}; it must be the id of the token at which texts end")))
    }
}

#[derive(Debug, Clone, Copy)]
struct LayerShape {
    width: i64,
    inner: i64,
    epsilon: f64,
    activation: Activation,
}

#[derive(Debug)]
struct Layer {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
}

impl Layer {
    fn new(at: &Scope<'_>, shape: LayerShape) -> Result<Self> {
        let LayerShape { width, inner, epsilon, activation } = shape;
        let (attention, mlp) = (at.at("self_attn"), at.at("mlp"));
        let projection = |name: &str| Linear::new(&attention.at(name), width, width);
        Ok(Self {
            norm1: LayerNorm::new(&at.at("layer_norm1"), width, epsilon)?,
            q: projection("q_proj")?,
            k: projection("k_proj")?,
            v: projection("v_proj")?,
            out: projection("out_proj")?,
            norm2: LayerNorm::new(&at.at("layer_norm2"), width, epsilon)?,
            fc1: Linear::new(&mlp.at("fc1"), width, inner)?,
            fc2: Linear::new(&mlp.at("fc2"), inner, width)?,
            activation,
        })
    }

    fn forward(&self, x: &Tensor, heads: i64) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let project = |layer: &Linear| split_heads(&layer.forward(&normed)?, heads);
        let (q, k, v) = (project(&self.q)?, project(&self.k)?, project(&self.v)?);
        // Each token sees those before it.
        let tokens = normed.size3()?.1;
        let mask = Tensor::f_ones([tokens, tokens], (Kind::Bool, q.device()))?.f_tril(0)?;
        let x = x.f_add(&self.out.forward(&merge_heads(&scaled_dot_product(&q, &k, &v, Some(&mask), None)?)?)?)?;
        let inner = self.activation.forward(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        Ok(x.f_add(&self.fc2.forward(&inner)?)?)
    }
}
