//! What a picture is compared with: latents before a run, features at one timestep of it.

use crate::{Features, Result};
use tch::Tensor;

/// One style picture.
#[derive(Debug)]
#[non_exhaustive]
pub struct Style<T = Tensor> {
    /// The picture's latents (or features). A batch of 1 serves every picture of the batch; else one for each.
    pub of: T,
}

impl<T> Style<T> {
    /// From latents `(1 or batch, channels, height, width)`, or from their features.
    pub fn new(of: T) -> Self {
        Self { of }
    }
}

/// The styles and the content that a picture is compared with. Batch means pictures being made; several references
/// are several entries of `styles`, each of its own size. Empty by default.
#[derive(Debug)]
#[non_exhaustive]
pub struct References<T = Tensor> {
    /// Every token of the picture attends to the tokens of all of these; sizes may differ.
    pub styles: Vec<Style<T>>,
    /// Whose layout to keep; of the picture's own size.
    pub content: Option<T>,
}

impl<T> Default for References<T> {
    fn default() -> Self {
        Self::styles([])
    }
}

impl<T> References<T> {
    /// One style.
    pub fn style(of: T) -> Self {
        Self::styles([Style::new(of)])
    }

    /// Several styles.
    pub fn styles(styles: impl IntoIterator<Item = Style<T>>) -> Self {
        Self { styles: styles.into_iter().collect(), content: None }
    }

    /// The same with a content.
    #[must_use]
    pub fn with_content(mut self, content: T) -> Self {
        self.content = Some(content);
        self
    }

    /// Each style in order, then the content, through `f`: the order of the authors' random draws.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn try_map<U>(&self, mut f: impl FnMut(&T) -> Result<U>) -> Result<References<U>> {
        let styles = self.styles.iter().map(|style| Ok(Style { of: f(&style.of)? })).collect::<Result<_>>()?;
        let content = self.content.as_ref().map(f).transpose()?;
        Ok(References { styles, content })
    }
}

impl References<Tensor> {
    /// A second handle on the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            styles: self.styles.iter().map(|style| Style { of: style.of.shallow_clone() }).collect(),
            content: self.content.as_ref().map(Tensor::shallow_clone),
        }
    }
}

impl References<Features> {
    /// A second handle on the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            styles: self.styles.iter().map(|style| Style { of: style.of.shallow_clone() }).collect(),
            content: self.content.as_ref().map(Features::shallow_clone),
        }
    }
}
