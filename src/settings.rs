//! Settings of a task, as the authors ship them, and as a model's folder may overrule them.

use crate::smoothing::check_smoothing;
use crate::{Error, Result};
use std::ops::Range;

/// Which of the paper's two procedures a task follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Procedure {
    /// Latents optimised along the timesteps: [`Distiller`](crate::Distiller).
    Optimisation,
    /// Diffusion sampling with descents after each step: [`GuidedSampler`](crate::GuidedSampler).
    Sampling,
}

/// What is to be made. A model folder may have settings of its own for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Task {
    /// [`Settings::style_transfer`].
    StyleTransfer,
    /// [`Settings::style_transfer_by_sampling`].
    StyleTransferBySampling,
    /// [`Settings::texture_synthesis`].
    TextureSynthesis,
    /// [`Settings::texture_by_sampling`].
    TextureBySampling,
    /// [`Settings::texture_expansion`].
    TextureExpansion,
    /// [`Settings::text_to_image`] and [`Settings::text_to_image_xl`].
    TextToImage,
}

impl Task {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::StyleTransfer,
        Self::StyleTransferBySampling,
        Self::TextureSynthesis,
        Self::TextureBySampling,
        Self::TextureExpansion,
        Self::TextToImage,
    ];

    /// By optimisation or by sampling.
    pub fn procedure(self) -> Procedure {
        match self {
            Self::StyleTransfer | Self::TextureSynthesis => Procedure::Optimisation,
            Self::StyleTransferBySampling | Self::TextureBySampling | Self::TextureExpansion | Self::TextToImage => Procedure::Sampling,
        }
    }

    /// The authors' settings; those of text-to-image for Stable Diffusion 1 and 2.
    pub fn settings(self) -> Settings {
        match self {
            Self::StyleTransfer => Settings::style_transfer(),
            Self::StyleTransferBySampling => Settings::style_transfer_by_sampling(),
            Self::TextureSynthesis => Settings::texture_synthesis(),
            Self::TextureBySampling => Settings::texture_by_sampling(),
            Self::TextureExpansion => Settings::texture_expansion(),
            Self::TextToImage => Settings::text_to_image(),
        }
    }

    /// Its name in a model folder's `attention_distillation.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::StyleTransfer => "style_transfer",
            Self::StyleTransferBySampling => "style_transfer_by_sampling",
            Self::TextureSynthesis => "texture_synthesis",
            Self::TextureBySampling => "texture_by_sampling",
            Self::TextureExpansion => "texture_expansion",
            Self::TextToImage => "text_to_image",
        }
    }
}

/// How a task is run. `Settings::style_transfer()` and its like are the authors' for Stable Diffusion; a model folder's
/// `attention_distillation.json` may overrule them.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Settings {
    /// Which one.
    pub task: Task,
    /// Self-attention layers in execution order from 0; none means the network's last six.
    pub layers: Option<Range<usize>>,
    /// `(height, width)` in pixels, where no picture says otherwise; none means the model's training size.
    pub size: Option<(i64, i64)>,
    /// Timesteps.
    pub steps: usize,
    /// Adam steps per timestep; 0, plain sampling, is possible with [`Procedure::Sampling`] only.
    pub iterations: usize,
    /// Adam's.
    pub learning_rate: f64,
    /// Of the content loss: 0 lets the layout go, 1 hardly changes the picture.
    pub content_weight: f64,
    /// Classifier-free guidance of [`Procedure::Sampling`]; 1 is none.
    pub guidance: f64,
    /// Whether the latents get the styles' mean and deviation ([`References::adain`](crate::References::adain)): by
    /// [`Procedure::Sampling`] before the descents of each timestep, by [`Procedure::Optimisation`] the
    /// start, once, and the content that the loss looks at, within bounds ([`Distiller::adain`](crate::Distiller)).
    pub adain: bool,
    /// How far places that are alike in the content take from the same parts of the styles, from 0 to 1
    /// ([`References::smoothing`](crate::References::smoothing)); 0 is the authors'.
    pub smoothing: f64,
}

impl Settings {
    /// Style and appearance transfer by optimisation.
    pub fn style_transfer() -> Self {
        Self {
            task: Task::StyleTransfer,
            layers: None,
            size: None,
            steps: 200,
            iterations: 1,
            learning_rate: 0.05,
            content_weight: 0.25,
            guidance: 1.0,
            adain: false,
            smoothing: 0.0,
        }
    }

    /// Style transfer in as many Adam steps as [`style_transfer`](Self::style_transfer), but four at each of a quarter of the timesteps: a
    /// quarter of the references' passes, and features of 50 timesteps, which a [`FeatureCache`](crate::FeatureCache) can hold.
    /// Nearly the authors' picture; how far from it: PERFORMANCE.md.
    pub fn style_transfer_few_timesteps() -> Self {
        Self { steps: 50, iterations: 4, ..Self::style_transfer() }
    }

    /// Style transfer in 60 Adam steps at 20 timesteps: a quarter of the work of [`style_transfer`](Self::style_transfer). The picture
    /// stays nearer to the content; how much: PERFORMANCE.md. With [`adain`](Self::adain) it starts in the styles' colours, which so few steps
    /// may not reach, and sees the content in them.
    pub fn style_transfer_fast() -> Self {
        Self { steps: 20, iterations: 3, ..Self::style_transfer() }
    }

    /// Style transfer by sampling: from noise, held to the content by the content loss alone.
    pub fn style_transfer_by_sampling() -> Self {
        Self { task: Task::StyleTransferBySampling, steps: 50, iterations: 3, ..Self::style_transfer() }
    }

    /// Texture synthesis by optimisation, from noise.
    pub fn texture_synthesis() -> Self {
        Self { task: Task::TextureSynthesis, steps: 300, content_weight: 0.0, ..Self::style_transfer() }
    }

    /// Texture synthesis by sampling, from noise.
    pub fn texture_by_sampling() -> Self {
        Self { task: Task::TextureBySampling, content_weight: 0.0, ..Self::style_transfer_by_sampling() }
    }

    /// A texture expanded to any size, with [`Windows`](crate::Windows).
    pub fn texture_expansion() -> Self {
        Self { task: Task::TextureExpansion, iterations: 2, ..Self::texture_by_sampling() }
    }

    /// Text-to-image in a style, with Stable Diffusion 1 and 2.
    pub fn text_to_image() -> Self {
        Self { task: Task::TextToImage, learning_rate: 0.015, guidance: 7.5, adain: true, ..Self::style_transfer_by_sampling() }
    }

    /// Text-to-image in a style, with SDXL.
    pub fn text_to_image_xl() -> Self {
        Self { iterations: 2, guidance: 7.0, ..Self::text_to_image() }
    }

    /// Before a long run: what would otherwise be found out in the middle of it.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the setting that is out of range.
    pub fn check(&self) -> Result<()> {
        if let Some(layers) = &self.layers {
            if layers.is_empty() {
                return Err(Error::argument("layers", format!("{}..{} is empty; the first must be below the second", layers.start, layers.end)));
            }
        }
        if let Some(size) = self.size {
            crate::image::check_size(size)?;
        }
        let least = usize::from(self.task.procedure() == Procedure::Optimisation);
        for (name, count, least) in [("steps", self.steps, 1), ("iterations", self.iterations, least)] {
            if count < least {
                return Err(Error::argument(name, "0 would leave the picture as it is; use at least 1"));
            }
        }
        for (name, number) in [("learning rate", self.learning_rate), ("content weight", self.content_weight), ("guidance", self.guidance)] {
            if !(number.is_finite() && number >= 0.0) {
                return Err(Error::argument(name, format!("{number} is not a number of at least 0")));
            }
        }
        check_smoothing(self.smoothing)
    }
}
