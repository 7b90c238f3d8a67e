//! Prompts to conditions: one CLIP text encoder, SDXL's two, or none at all.

use super::config::Config;
use super::{ClipTextModel, ClipTokenizer, Condition, UNet};
use crate::{Error, Result};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The text side of a model.
#[derive(Debug)]
pub(crate) struct Text {
    encoders: Encoders,
    /// Whether an absent negative prompt of SDXL means zeros.
    force_zeros: bool,
    /// The null prompt of a model without encoders is zeros of this width.
    width: i64,
    device: Device,
}

#[derive(Debug)]
enum Encoders {
    /// The model never had any.
    None,
    One(Box<Encoder>),
    Two(Box<Encoder>, Box<Encoder>),
    /// They are gone; the null prompt stays.
    Dropped(Encoded),
}

#[derive(Debug)]
struct Encoder {
    tokenizer: ClipTokenizer,
    model: ClipTextModel,
}

/// Text, and SDXL's pooled text.
type Encoded = (Tensor, Option<Tensor>);

impl Text {
    /// From a model's folder, for its U-Net.
    ///
    /// # Errors
    /// Encoders that are missing, damaged, or do not fit the U-Net or their tokenizers.
    pub(crate) fn open(folder: &Path, unet: &UNet, device: Device, kind: Kind) -> Result<Self> {
        let bad = |reason: String| Error::Config { path: folder.to_owned(), reason };
        let index = Index::open(folder)?;
        let part = |encoder: &str, tokenizer: &str| match (folder.join(encoder).is_dir(), index.names(encoder)) {
            (true, _) => Encoder::open(&folder.join(encoder), &folder.join(tokenizer), device, kind).map(Box::new).map(Some),
            (false, true) => Err(bad(format!("its model_index.json names a {encoder}, but there is no such folder; fetch it, too"))),
            (false, false) => Ok(None),
        };
        let encoders = match (part("text_encoder", "tokenizer")?, part("text_encoder_2", "tokenizer_2")?, unet.pooled_width()) {
            (Some(first), Some(second), Some(_)) => Encoders::Two(first, second),
            (Some(one), None, None) => Encoders::One(one),
            (None, None, None) => Encoders::None,
            (Some(_), None, Some(_)) => {
                return Err(bad("its U-Net is SDXL's, but it has no text_encoder_2; fetch text_encoder_2 and tokenizer_2, too".into()))
            }
            (None, Some(_), Some(_)) => {
                return Err(bad("has a text_encoder_2 but no text_encoder: fetch it, too; if this is SDXL's refiner, use the base model".into()))
            }
            (None, None, Some(_)) => {
                return Err(bad("its U-Net is SDXL's, but it has no text encoders; fetch text_encoder and text_encoder_2, too".into()))
            }
            (_, Some(_), None) => return Err(bad("has a text_encoder_2, but its U-Net is not SDXL's".into())),
        };
        let text = Self { encoders, force_zeros: index.force_zeros()?, width: unet.cross_attention_dim(), device };
        text.check(folder, unet)?;
        Ok(text)
    }

    fn check(&self, folder: &Path, unet: &UNet) -> Result<()> {
        let bad = |reason: String| Err(Error::Config { path: folder.to_owned(), reason });
        let (all, names) = match &self.encoders {
            Encoders::One(one) => (vec![one], "text encoder makes"),
            Encoders::Two(first, second) => (vec![first, second], "text encoders make"),
            Encoders::None | Encoders::Dropped(_) => return Ok(()),
        };
        let (width, wanted) = (all.iter().map(|encoder| encoder.model.width()).sum::<i64>(), unet.cross_attention_dim());
        if width != wanted {
            return bad(format!("its {names} embeddings of width {width}, its U-Net takes {wanted}"));
        }
        for encoder in &all {
            let (tokenizer, model) = (&encoder.tokenizer, &encoder.model);
            if tokenizer.length() > model.positions() {
                return bad(format!("its tokenizer makes {} ids, its text encoder takes {}", tokenizer.length(), model.positions()));
            }
        }
        if let Encoders::Two(first, second) = &self.encoders {
            if first.tokenizer.length() != second.tokenizer.length() {
                return bad(format!("its tokenizers make {} and {} ids, which must be as many", first.tokenizer.length(), second.tokenizer.length()));
            }
            if second.model.end().is_some_and(|end| end != second.tokenizer.end()) {
                let (end, own) = (second.model.end().unwrap_or_default(), second.tokenizer.end());
                return bad(format!("its text_encoder_2/config.json has the `eos_token_id` {end}, its tokenizer_2 ends texts with {own}"));
            }
            let (pooled, wanted) = (second.model.pooled_width(), unet.pooled_width());
            if pooled != wanted {
                let pooled =
                    pooled.map_or("no pooled text (its weights have no text_projection)".into(), |width| format!("pooled text of width {width}"));
                return bad(format!("its text_encoder_2 makes {pooled}, its U-Net takes {}", wanted.unwrap_or(0)));
            }
        }
        Ok(())
    }

    /// Each prompt's condition, in one batch; `size` is that of the pictures, in pixels, which SDXL is told.
    ///
    /// # Errors
    /// No prompt; a prompt other than `""` where no encoder is there (any more).
    pub(crate) fn condition(&self, prompts: &[&str], size: (i64, i64)) -> Result<Condition> {
        if prompts.is_empty() {
            return Err(Error::argument("prompts", "none given; the null prompt is \"\""));
        }
        let batch = i64::try_from(prompts.len()).unwrap_or(1);
        let null = |text: &Tensor, pooled: Option<&Tensor>, why: &str| {
            if let Some(prompt) = prompts.iter().find(|prompt| !prompt.is_empty()) {
                return Err(Error::argument("prompt", format!("`{prompt}`: {why}; only the empty prompt is possible")));
            }
            let pooled = pooled.map(|pooled| pooled.f_expand([batch, -1], false)).transpose()?;
            Ok((text.f_expand([batch, -1, -1], false)?, pooled))
        };
        let (text, pooled) = match &self.encoders {
            Encoders::None => null(&Tensor::f_zeros([1, 1, self.width], (Kind::Float, self.device))?, None, "this model has no text encoder")?,
            Encoders::Dropped((text, pooled)) => null(text, pooled.as_ref(), "this model's text encoders were dropped")?,
            Encoders::One(one) => (one.encode(prompts)?.last, None),
            Encoders::Two(first, second) => {
                let (first, second) = (first.encode(prompts)?, second.encode(prompts)?);
                (Tensor::f_cat(&[first.penultimate, second.penultimate], -1)?, second.pooled)
            }
        };
        let condition = Condition::new(text);
        match pooled {
            None => Ok(condition),
            Some(pooled) => Ok(condition.with_pooled(pooled, time_ids(size, batch, self.device)?)),
        }
    }

    /// What an absent negative prompt means: zeros for most SDXL models, else the empty prompt.
    ///
    /// # Errors
    /// libtorch's.
    pub(crate) fn absent_negative(&self, size: (i64, i64)) -> Result<Condition> {
        let mut condition = self.condition(&[""], size)?;
        if self.zeroes_negative() {
            condition.text = condition.text.f_zeros_like()?;
            condition.pooled = condition.pooled.map(|pooled| pooled.f_zeros_like()).transpose()?;
        }
        Ok(condition)
    }

    /// Whether an absent negative prompt differs from an empty one.
    pub(crate) fn zeroes_negative(&self) -> bool {
        let xl = matches!(&self.encoders, Encoders::Two(..) | Encoders::Dropped((_, Some(_))));
        xl && self.force_zeros
    }

    /// Frees the encoders; what the null prompt became stays.
    ///
    /// # Errors
    /// libtorch's; the encoders are then still there.
    pub(crate) fn drop_encoders(&mut self) -> Result<()> {
        if matches!(self.encoders, Encoders::One(_) | Encoders::Two(..)) {
            let null = self.condition(&[""], (1, 1))?;
            self.encoders = Encoders::Dropped((null.text, null.pooled));
        }
        Ok(())
    }
}

impl Encoder {
    fn open(model: &Path, tokenizer: &Path, device: Device, kind: Kind) -> Result<Self> {
        Ok(Self { tokenizer: ClipTokenizer::open(tokenizer)?, model: ClipTextModel::open(model, device, kind)? })
    }

    fn encode(&self, prompts: &[&str]) -> Result<super::ClipOutput> {
        let rows = prompts.iter().map(|prompt| Ok(Tensor::f_from_slice(&self.tokenizer.encode(prompt)?)?)).collect::<Result<Vec<_>>>()?;
        tch::no_grad(|| self.model.forward(&Tensor::f_stack(&rows, 0)?))
    }
}

/// Original size, crop, target size, as SDXL was trained to be told them: here one whole picture of the output's size.
fn time_ids((height, width): (i64, i64), batch: i64, device: Device) -> Result<Tensor> {
    let ids = [height, width, 0, 0, height, width].map(|side| side as f32);
    Ok(Tensor::f_from_slice(&ids)?.f_unsqueeze(0)?.f_expand([batch, -1], false)?.f_to_device(device)?)
}

/// A folder's `model_index.json`, where it has one.
struct Index(Option<Config>);

impl Index {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("model_index.json");
        Ok(Self(if path.is_file() { Some(Config::open(&path)?) } else { None }))
    }

    /// Whether the folder is meant to have a part: without a text encoder its null prompt would be another.
    fn names(&self, part: &str) -> bool {
        // A class and its library; [null, null] for a part that was left out.
        let class = self.0.as_ref().and_then(|config| config.get(part)).and_then(|part| part.get(1));
        class.is_some_and(|class| !class.is_null())
    }

    fn force_zeros(&self) -> Result<bool> {
        self.0.as_ref().map_or(Ok(true), |config| config.flag("force_zeros_for_empty_prompt", true))
    }
}
