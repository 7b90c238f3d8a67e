//! Stable Diffusion from a folder in diffusers layout: `unet/ vae/ scheduler/`, and where the model has them
//! `text_encoder/ tokenizer/`, for SDXL also `text_encoder_2/ tokenizer_2/`. Every network is built from its `config.json`; fine-tunes, tiny test models and the
//! bundled model are one code path.

mod block;
#[cfg(feature = "cuda-graphs")]
mod capturable;
mod checkpointing;
mod clip;
mod condition;
mod config;
mod control;
mod controlnet;
mod embedding;
mod encoder;
mod fit;
mod guidance;
#[cfg(feature = "hub")]
pub mod hub;
mod layers;
mod linear;
mod prompts;
mod resnet;
mod schedule;
mod seamless;
mod settings;
mod text;
mod time;
mod tokenizer;
mod transformer;
mod unet;
mod vae;
mod weights;

pub use clip::{ClipOutput, ClipTextModel};
pub use condition::Condition;
pub use control::Control;
pub use controlnet::{ControlNet, Residuals};
pub use schedule::scheduler_config;
pub use seamless::Seamless;
pub use tokenizer::ClipTokenizer;
pub use unet::UNet;
pub use vae::{AutoencoderKl, DecoderTuning, Tiles, Tiling, TuningConfig, TuningProgress};

use crate::denoiser::plain_gradient;
use crate::scalar::WithNumber;
use crate::{
    image, AttentionHook, Ddim, DdimConfig, Denoiser, Error, FeatureExtractor, Features, Guidance, Noise, Result, Scheduler, Settings, Task,
};
use settings::FolderSettings;
use std::{ops::Range, path::Path};
use tch::{Device, Kind, Tensor};
use text::Text;

/// How many of the last self-attention layers the paper uses.
const LAST_LAYERS: usize = 6;

/// U-Net, autoencoder, text encoders and schedule of one model.
///
/// [`open`](Self::open) a folder; take its [`settings`](Self::settings) for a task; [`encode`](Self::encode) pictures to latents; give an
/// [`extractor`](Self::extractor) and the [`timesteps`](Self::timesteps) to a [`Distiller`](crate::Distiller), or the schedule
/// ([`ddim`](Self::ddim)) and prompts ([`guidance`](Self::guidance)) to a [`GuidedSampler`](crate::GuidedSampler); and
/// [`decode`](Self::decode) what these made.
#[derive(Debug)]
pub struct StableDiffusion {
    unet: UNet,
    vae: AutoencoderKl,
    text: Text,
    schedule: DdimConfig,
    settings: FolderSettings,
    device: Device,
    kind: Kind,
    /// By their numbers; one that was taken out leaves its place empty.
    controlnets: Vec<Option<ControlNet>>,
    checkpointing: bool,
    tiling: Tiling,
    seamless: Seamless,
}

impl StableDiffusion {
    /// Opens a folder; weights are converted to `kind` on `device` (see [`device`](crate::device)).
    ///
    /// # Errors
    /// Files that are missing, damaged, or describe networks that are not supported, each by its name; [`Error::Argument`] for a kind
    /// that networks do not compute in, [`Error::Device`] for a GPU that is not there.
    pub fn open(folder: impl AsRef<Path>, device: Device, kind: Kind) -> Result<Self> {
        let folder = folder.as_ref();
        crate::device::check(device, kind)?;
        if !folder.join("unet").is_dir() {
            let reason = if folder.is_dir() {
                "has no folder `unet`; a model folder in diffusers layout holds unet, vae and scheduler (see weights.md)"
            } else {
                "there is no such folder"
            };
            return Err(Error::Config { path: folder.to_owned(), reason: reason.into() });
        }
        let bad = |reason: String| Error::Config { path: folder.to_owned(), reason };
        let settings = FolderSettings::open(folder)?;
        let mut schedule = scheduler_config(folder.join("scheduler").join("scheduler_config.json"))?;
        // Latents have no range to be clipped to.
        schedule.clip_sample = None;
        let vae = AutoencoderKl::open(folder.join("vae"), device, kind)?;
        let unet = UNet::open(folder.join("unet"), device, kind)?;
        if unet.in_channels() != vae.latent_channels() {
            let reason = format!(
                "its U-Net takes {} channels, its autoencoder makes {}; inpainting and the like are not supported",
                unet.in_channels(),
                vae.latent_channels()
            );
            return Err(Error::Config { path: folder.to_owned(), reason });
        }
        if !unet.wants_pooled_text() {
            // diffusers' StableDiffusionPipeline sets it so, whatever the file says; the one for SDXL does not.
            schedule.steps_offset = 1;
        }
        let text = Text::open(folder, &unet, device, kind)?;
        let layers = settings.of(Task::StyleTransfer, false).layers;
        let count = unet.self_attention_layers();
        if let Some(layers) = layers.filter(|layers| layers.end > count) {
            return Err(bad(format!("its attention_distillation.json names layers {}..{}, its U-Net has {count}", layers.start, layers.end)));
        }
        let (tiling, seamless) = (Tiling::Auto, Seamless::None);
        Ok(Self { unet, vae, text, schedule, settings, device, kind, controlnets: vec![], checkpointing: false, tiling, seamless })
    }

    /// The noise predictor.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }

    /// The autoencoder.
    pub fn vae(&self) -> &AutoencoderKl {
        &self.vae
    }

    /// Takes another autoencoder in, such as one whose decoder was [tuned](DecoderTuning) to a picture.
    ///
    /// # Errors
    /// [`Error::Config`] for one of other channels or another factor, one on another device; the model is then as it was.
    pub fn set_vae(&mut self, mut vae: AutoencoderKl) -> Result<()> {
        vae.check_replaces(&self.vae)?;
        vae.set_seamless(self.seamless);
        self.vae = vae;
        Ok(())
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.device
    }

    /// What its networks compute in (the autoencoder perhaps in f32).
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether optimisation and guided sampling keep only the inputs of the U-Net's layers for the backward pass, and
    /// compute the rest anew (gradient checkpointing): much less memory, for one forward pass more in each iteration. Off
    /// by default. [`fit`](Self::fit), [`noise`](Self::noise) and [`check_windows`](Self::check_windows) ask for a third of the memory then, which
    /// also does for plain sampling, without descents.
    pub fn set_gradient_checkpointing(&mut self, on: bool) {
        self.checkpointing = on;
    }

    /// The settings of a task for this model: the authors' (text-to-image's by whether it [is an SDXL](Self::is_xl)), those that the folder's
    /// `attention_distillation.json` has in their place, and the size and layers that follow from its networks. Change what is to be otherwise:
    ///
    /// ```no_run
    /// # fn f(model: &attention_distillation::StableDiffusion) {
    /// let mut settings = model.settings(attention_distillation::Task::StyleTransfer);
    /// (settings.steps, settings.iterations) = (50, 4);
    /// # }
    /// ```
    pub fn settings(&self, task: Task) -> Settings {
        let mut settings = self.settings.of(task, self.is_xl());
        if settings.layers.is_none() {
            settings.layers = Some(self.last_layers());
        }
        if settings.size.is_none() {
            let (height, width) = self.unet.sample_size().unwrap_or((64, 64));
            let factor = self.vae.factor();
            settings.size = Some((height.saturating_mul(factor), width.saturating_mul(factor)));
        }
        settings
    }

    /// The last six self-attention layers, counted on the network.
    pub fn last_layers(&self) -> Range<usize> {
        let count = self.unet.self_attention_layers();
        count.saturating_sub(LAST_LAYERS)..count
    }

    /// When [`encode`](Self::encode) and [`decode`](Self::decode) cut pictures into tiles.
    pub fn tiling(&self) -> Tiling {
        self.tiling
    }

    /// Chooses when pictures are cut into tiles: by default beyond 1536 x 1536 pixels, and where memory does not suffice for the whole.
    ///
    /// # Errors
    /// Tiles of a size below 1 or an overlap that is not from 0 to below the size; the setting is then as it was.
    pub fn set_tiling(&mut self, tiling: Tiling) -> Result<()> {
        tiling.check()?;
        self.tiling = tiling;
        Ok(())
    }

    /// Which borders of its pictures meet.
    pub fn seamless(&self) -> Seamless {
        self.seamless
    }

    /// Chooses which borders of its pictures meet, by default none: in the U-Net, the autoencoder, tiled or not, and
    /// the ControlNets. References are encoded the same way. A [`Control`] is to be made afterwards, as its picture is
    /// embedded then. An expansion by [`Windows`](crate::Windows) goes around: each window then has borders, and the canvas none.
    pub fn set_seamless(&mut self, seamless: Seamless) {
        self.seamless = seamless;
        self.unet.set_seamless(seamless);
        self.vae.set_seamless(seamless);
        self.controlnets.iter_mut().flatten().for_each(|net| net.set_seamless(seamless));
    }

    /// [`set_seamless`](Self::set_seamless), in one go with [`open`](Self::open).
    #[must_use]
    pub fn with_seamless(mut self, seamless: Seamless) -> Self {
        self.set_seamless(seamless);
        self
    }

    /// Latents `(batch, channels, height / factor, width / factor)` in f32, from a picture `(batch, 3, height, width)`
    /// with values 0 to 1. One picture of the batch after the other; large ones in [tiles](Self::set_tiling).
    ///
    /// # Errors
    /// Sides that are not multiples of the factor (8 in Stable Diffusion; see [`fit`](Self::fit)); NaN, and values below -1 or above
    /// 2, such as bytes. A picture with values from -1 to 1 is not told from one that overshoots.
    pub fn encode(&self, picture: &Tensor) -> Result<Tensor> {
        self.vae.check_picture(picture)?;
        tch::no_grad(|| image::check_values(picture))?;
        let size = image::size(picture)?;
        let encode = |picture: &Tensor| {
            let pixels = picture.f_to_device(self.device)?.f_to_kind(Kind::Float)?.times(2.0)?.plus(-1.0)?;
            self.tiling.through(size, |tiles| match tiles {
                Some(tiles) => self.vae.encode_tiled(&pixels, tiles),
                None => self.vae.encode(&pixels),
            })
        };
        self.give_back();
        tch::no_grad(|| one_by_one(picture, encode))
    }

    /// A picture `(batch, 3, height, width)` with values 0 to 1, from latents. One picture of the batch after the other: that
    /// takes the memory of one, and on a CPU less time (the bundled model, four of 256 x 256 pixels). Large ones are decoded in
    /// [tiles](Self::set_tiling). On a CPU the process's freed memory goes back to the system first, where the C library is glibc.
    ///
    /// # Errors
    /// Latents of another number of channels.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let size = match latents.size().as_slice() {
            &[_, _, height, width] => (height.saturating_mul(self.vae.factor()), width.saturating_mul(self.vae.factor())),
            // The autoencoder says what is wrong.
            _ => (1, 1),
        };
        let decode = |latents: &Tensor| {
            let latents = latents.f_to_device(self.device)?;
            let pixels = self.tiling.through(size, |tiles| match tiles {
                Some(tiles) => self.vae.decode_tiled(&latents, tiles),
                None => self.vae.decode(&latents),
            })?;
            pixels.over(2.0)?.plus(0.5)?.within(0.0, 1.0)
        };
        self.give_back();
        tch::no_grad(|| one_by_one(latents, decode))
    }

    fn give_back(&self) {
        if self.device == Device::Cpu {
            crate::memory::give_back();
        }
    }

    /// The schedule in so many steps.
    ///
    /// # Errors
    /// 0 steps, or more than the timesteps that the model was trained with (with an offset of 1, as Stable Diffusion has, already as
    /// many as these).
    pub fn ddim(&self, steps: usize) -> Result<Ddim> {
        Ddim::new(&self.schedule, steps)
    }

    /// The timesteps of [`ddim`](Self::ddim), for a [`Distiller`](crate::Distiller).
    ///
    /// # Errors
    /// As [`ddim`](Self::ddim).
    pub fn timesteps(&self, steps: usize) -> Result<Vec<f64>> {
        Ok(self.ddim(steps)?.timesteps().to_vec())
    }

    /// This network under the null prompt for pictures of `(height, width)` pixels, through the layers of [`settings`](Self::settings): its last six
    /// self-attention layers, unless its folder says otherwise.
    ///
    /// # Errors
    /// As [`prompts`](Self::prompts).
    pub fn extractor(&self, size: (i64, i64)) -> Result<FeatureExtractor<&Self>> {
        let layers = self.settings(Task::StyleTransfer).layers.unwrap_or_else(|| self.last_layers());
        Ok(FeatureExtractor::new(self, self.prompts(&[""], size)?, layers))
    }

    /// Standard normal latents for `batch` pictures of `(height, width)` pixels, drawn at once from a [`Noise`]. Seeded, that
    /// gives what Python's `torch.manual_seed(seed); torch.randn(..)` gives on the CPU, on every device.
    ///
    /// # Errors
    /// A batch below 1; as [`fit`](Self::fit).
    pub fn noise(&self, batch: i64, size: (i64, i64), noise: &mut Noise) -> Result<Tensor> {
        if batch < 1 {
            return Err(Error::argument("batch", format!("{batch} is not at least 1")));
        }
        let (height, width) = self.fit_batch(batch, size)?;
        let factor = self.vae.factor();
        let shape = [batch, self.unet.in_channels(), height / factor, width / factor];
        noise.draw(&Tensor::f_zeros(shape, (Kind::Float, self.device))?)
    }
}

/// A network's output for each picture of a batch: its memory is that of one picture.
fn one_by_one(batch: &Tensor, network: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    match batch.size().first() {
        // What has other axes is for the network to refuse, whole.
        Some(&count) if count > 1 && batch.dim() == 4 => {
            let pictures = (0..count).map(|i| network(&batch.f_narrow(0, i, 1)?));
            Ok(Tensor::f_cat(&pictures.collect::<Result<Vec<_>>>()?, 0)?)
        }
        _ => network(batch),
    }
}

impl Denoiser for StableDiffusion {
    type Condition = Condition;

    fn forward(&self, latents: &Tensor, timestep: f64, condition: &Condition, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        let time = self.unet.timestep(timestep)?;
        let residuals = self.residuals(latents, (timestep, &time), condition)?;
        self.unet.forward_with(latents, &time, condition, residuals.as_ref(), hook)
    }

    /// Prompt and negative in one batch.
    fn forward_guided(&self, latents: &Tensor, timestep: f64, guidance: &Guidance<Condition>) -> Result<Tensor> {
        guidance::forward(self, latents, timestep, guidance)
    }

    fn gradient(
        &self,
        latents: &Tensor,
        timestep: f64,
        condition: &Condition,
        layers: Range<usize>,
        value: &mut dyn FnMut(&Features) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        // Controls steer noise predictions, and features are without any; somebody else's idea is served the plain way.
        if self.checkpointing && condition.controls.is_empty() {
            return checkpointing::gradient(&self.unet, latents, &self.unet.timestep(timestep)?, condition, layers, value);
        }
        plain_gradient(self, latents, timestep, condition, layers, value)
    }

    fn seamless(&self) -> Seamless {
        self.seamless
    }

    /// The autoencoder, which sees whole pictures, keeps its own.
    fn with_borders(&self, meet: Seamless, passes: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let _restored = (self.unet.within_parts(meet), self.controlnets.iter().flatten().map(|net| net.within_parts(meet)).collect::<Vec<_>>());
        passes()
    }

    /// One where memory is low.
    fn references_at_once(&self) -> usize {
        if self.checkpointing {
            1
        } else {
            self.unet.references_at_once()
        }
    }

    fn condition_batch(&self, condition: &Condition) -> i64 {
        condition.batch()
    }
}
