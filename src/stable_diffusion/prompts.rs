//! What a model is to draw: prompts, negative prompts, and freeing what encodes them.

use super::{Condition, StableDiffusion};
use crate::{image, Guidance, Result};

impl StableDiffusion {
    /// Whether this is SDXL, or a network that is conditioned as it is.
    pub fn is_xl(&self) -> bool {
        self.unet.wants_pooled_text()
    }

    /// The condition of each prompt, in one batch: text, and for SDXL pooled text and the picture's size. `size`, `(height,
    /// width)` in pixels, is that of the pictures to be made, cut as by [`fit`](Self::fit). Of a prompt that is longer than the model can take (77 tokens)
    /// the end is left out, with a warning through `tracing`.
    ///
    /// # Errors
    /// No prompt; a prompt other than `""` for a model that has no text encoder.
    pub fn prompts<P: AsRef<str>>(&self, prompts: &[P], size: (i64, i64)) -> Result<Condition> {
        image::check_size(size)?;
        let factor = self.vae.factor();
        let size = ((size.0 / factor * factor).max(factor), (size.1 / factor * factor).max(factor));
        self.text.condition(&prompts.iter().map(AsRef::as_ref).collect::<Vec<_>>(), size)
    }

    /// What to draw, one picture per prompt, and what to avoid in all of them, for a [`GuidedSampler`](crate::GuidedSampler).
    ///
    /// As in diffusers, no negative prompt means the empty one, but zeros with an SDXL folder whose `model_index.json` does
    /// not say `force_zeros_for_empty_prompt: false`; `Some("")` is always encoded. Where the negative says what all prompts
    /// say, and both have the same controls, there is nothing to be guided by, and a step costs one pass of the network.
    ///
    /// # Errors
    /// As [`prompts`](Self::prompts); a scale that is negative, infinite or NaN.
    pub fn guidance<P: AsRef<str>>(&self, prompts: &[P], negative: Option<&str>, scale: f64, size: (i64, i64)) -> Result<Guidance<Condition>> {
        let prompt = self.prompts(prompts, size)?;
        let zeros = negative.is_none() && self.text.zeroes_negative();
        let same = !zeros && prompts.iter().all(|prompt| prompt.as_ref() == negative.unwrap_or(""));
        let negative = match negative {
            _ if same => prompt.shallow_clone(),
            Some(negative) => self.prompts(&[negative], size)?,
            None => self.text.absent_negative(size)?,
        };
        Guidance::new(prompt, negative, scale)
    }

    /// Frees the text encoders once all prompts are encoded: SDXL's are 1.6 GB in half precision. The null prompt, which
    /// [`extractor`](Self::extractor) asks for, stays possible.
    ///
    /// # Errors
    /// libtorch's; the encoders are then still there.
    pub fn drop_text_encoders(&mut self) -> Result<()> {
        self.text.drop_encoders()
    }
}
