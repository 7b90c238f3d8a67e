//! What a network is told beside latents and text: the timestep, and in SDXL pooled text and time ids.

use super::config::Config;
use super::embedding::{Embedding, Sinusoid};
use super::layers::Activation;
use super::weights::Scope;
use super::Condition;
use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Timestep and additions as one vector per picture, which every residual block takes in.
#[derive(Debug)]
pub(crate) struct TimeEmbedding {
    sinusoid: Sinusoid,
    embedding: Embedding,
    addition: Option<(Sinusoid, Embedding)>,
    activation: Activation,
    kind: Kind,
    device: Device,
}

impl TimeEmbedding {
    /// Sinusoids of `width`, embeddings of `outputs`.
    pub(crate) fn new(config: &Config, at: &Scope<'_>, (width, outputs): (i64, i64), activation: Activation, of: (Device, Kind)) -> Result<Self> {
        let sinusoid = Sinusoid { width, flip_sin_to_cos: config.flag("flip_sin_to_cos", true)?, freq_shift: config.number("freq_shift", 0.0)? };
        check_shift(config, width)?;
        Ok(Self {
            sinusoid,
            embedding: Embedding::new(&at.at("time_embedding"), width, outputs, activation)?,
            addition: addition(config, at, sinusoid, outputs)?,
            activation,
            kind: of.1,
            device: of.0,
        })
    }

    /// Width of the pooled text, where the network wants it.
    pub(crate) fn pooled_width(&self) -> Option<i64> {
        self.addition.as_ref().map(|(sinusoid, embedding)| embedding.inputs() - 6 * sinusoid.width)
    }

    /// `(batch, outputs)`, after the activation that every residual block begins with.
    pub(crate) fn forward(&self, timestep: &Tensor, batch: i64, condition: &Condition) -> Result<Tensor> {
        let numbers = timestep.f_to_device(self.device)?.f_reshape([-1])?;
        if !matches!(numbers.size().as_slice(), &[n] if n == 1 || n == batch) {
            return Err(Error::shape("timestep", format!("one number, or {batch}"), timestep.size()));
        }
        let mut time = self.embedding.forward(&self.sinusoid.forward(&numbers)?.f_to_kind(self.kind)?)?;
        if let Some((sinusoid, embedding)) = &self.addition {
            let (Some(pooled), Some(ids)) = (&condition.pooled, &condition.time_ids) else {
                return Err(Error::argument("condition", "this network wants pooled text and time ids, too"));
            };
            let rows = pooled_rows(pooled, ids, batch, embedding.inputs() - 6 * sinusoid.width)?;
            let ids = sinusoid.forward(&ids.f_to_device(self.device)?.f_flatten(0, 1)?)?.f_reshape([rows, -1])?;
            let both = Tensor::f_cat(&[pooled.f_to_device(self.device)?.f_to_kind(Kind::Float)?, ids], -1)?;
            time = time.f_add(&embedding.forward(&both.f_to_kind(self.kind)?)?)?;
        }
        let time = if time.size2()?.0 == batch { time } else { time.f_expand([batch, -1], false)? };
        self.activation.forward(&time)
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
fn addition(config: &Config, at: &Scope<'_>, time: Sinusoid, outputs: i64) -> Result<Option<(Sinusoid, Embedding)>> {
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
    Ok(Some((Sinusoid { width, ..time }, Embedding::new(&at.at("add_embedding"), inputs, outputs, Activation::Silu)?)))
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
