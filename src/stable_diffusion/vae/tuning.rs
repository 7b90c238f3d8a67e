//! Teaching a decoder one picture.

use super::AutoencoderKl;
use crate::optimizer::{copy, copy_state};
use crate::scalar::WithNumber;
use crate::{image, memory, Adam, AdamConfig, Error, Optimizer, OptimizerState, Result};
use std::borrow::BorrowMut;
use tch::{Device, Kind, Tensor};

/// An epoch holds the decoder's activations for its backward pass: as much as this many of its last level's. Measured on the
/// bundled model, 3.4 kB per pixel from 256 to 512 px; deeper decoders hold more.
const ACTIVATIONS: i64 = 50;

/// How a decoder is tuned; the defaults are the paper's.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct TuningConfig {
    /// Steps of Adam, each on the whole picture: 75.
    pub epochs: usize,
    /// Adam's: 1e-4.
    pub learning_rate: f64,
}

impl Default for TuningConfig {
    fn default() -> Self {
        Self { epochs: 75, learning_rate: 1e-4 }
    }
}

impl TuningConfig {
    /// Before pictures and models are opened: what [`DecoderTuning::new`] would refuse.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the setting that is out of range.
    pub fn check(&self) -> Result<()> {
        if self.epochs == 0 {
            return Err(Error::argument("epochs", "0 would leave the decoder as it is; use at least 1"));
        }
        AdamConfig::with_learning_rate(self.learning_rate).check()
    }
}

/// Where a tuning is after an epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct TuningProgress {
    /// Epochs done, from 1.
    pub epoch: usize,
    /// Epochs in all.
    pub epochs: usize,
    /// The mean absolute difference from the picture, in -1 to 1, before this epoch's update.
    pub loss: f64,
    /// The peak signal-to-noise ratio before this epoch's update, as [`DecoderTuning::psnr`].
    pub psnr: f64,
}

/// The paper's improved decoding: an autoencoder loses fine texture, and a decoder that has learnt to give back the reference
/// picture from its latents gives such texture to the results, too.
///
/// Adam on the parameters of the decoder alone, the L1 distance between the decoded latents of a picture and the picture.
/// The autoencoder must be in f32; `V` is one, or `&mut` one:
/// ```no_run
/// # use attention_distillation::{image, Result, StableDiffusion, tch};
/// # use attention_distillation::stable_diffusion::{AutoencoderKl, DecoderTuning, TuningConfig};
/// # fn main() -> Result<()> {
/// let (folder, device) = ("models/stable-diffusion-v1-5", tch::Device::Cpu);
/// let vae = AutoencoderKl::open(format!("{folder}/vae"), device, tch::Kind::Float)?;
/// let mut tuning = DecoderTuning::new(vae, &image::load_to_area("texture.png", 512 * 512)?, TuningConfig::default())?;
/// tuning.finish()?;
/// let vae = tuning.into_inner();
/// vae.save("tuned")?; // for later
/// let mut model = StableDiffusion::open(folder, device, tch::Kind::Float)?;
/// model.set_vae(vae)?;
/// # Ok(())
/// # }
/// ```
///
/// Like a [`Distiller`](crate::Distiller) it is pulled, one epoch per [`advance`](Self::advance); stop calling, and the decoder
/// keeps what it has learnt. **After an error it stands exactly at its last finished epoch**, and the same call may be made
/// again; an epoch that turns out to have led to an infinite or NaN loss is taken back. Between calls nothing of the autoencoder
/// requires a gradient.
#[derive(Debug)]
pub struct DecoderTuning<V> {
    vae: V,
    config: TuningConfig,
    /// 0 to 1.
    picture: Tensor,
    /// -1 to 1.
    pixels: Tensor,
    latents: Tensor,
    /// One for each of the decoder's parameters, in their order.
    optimizers: Vec<Adam>,
    epoch: usize,
    /// What all of them were before the last epoch, until its loss is known.
    before: Vec<(Tensor, OptimizerState)>,
}

/// Of what is taught; quantisation's convolution before it is not among these.
fn parameters(vae: &AutoencoderKl) -> impl Iterator<Item = &Tensor> {
    vae.weights.iter().filter(|(name, _)| name.starts_with("decoder.")).map(|(_, tensor)| tensor)
}

impl<V: BorrowMut<AutoencoderKl>> DecoderTuning<V> {
    /// Before its first epoch. The picture is `(batch, 3, height, width)` with values 0 to 1, its sides multiples of the
    /// [factor](AutoencoderKl::factor); its latents are encoded here.
    ///
    /// # Errors
    /// [`Error::Shape`] for a picture that does not fit; [`Error::Argument`] for settings out of range, and for an autoencoder
    /// that is not in f32, in which steps of 1e-4 would be lost; [`Error::Memory`] for more than a CPU's memory can hold.
    pub fn new(vae: V, picture: &Tensor, config: TuningConfig) -> Result<Self> {
        config.check()?;
        let autoencoder: &AutoencoderKl = vae.borrow();
        if autoencoder.kind != Kind::Float {
            return Err(Error::argument("vae", format!("computes in {:?}; a decoder is tuned in f32: open it with Kind::Float", autoencoder.kind)));
        }
        let (height, width) = image::size(picture)?;
        if autoencoder.device == Device::Cpu {
            let channels = autoencoder.config.counts("block_out_channels")?.first().copied().unwrap_or(1);
            let batch = picture.size().first().copied().unwrap_or(1);
            let places = height.saturating_mul(width).saturating_mul(batch).saturating_mul(channels);
            // In f32.
            memory::check(places.saturating_mul(4 * ACTIVATIONS), format!("tuning by {width}x{height}"), "choose a smaller picture")?;
        }
        let (picture, pixels, latents) = tch::no_grad(|| {
            // A copy: the caller may paint over the picture.
            let picture = copy(&picture.f_to_device(autoencoder.device)?.f_to_kind(Kind::Float)?)?;
            let pixels = picture.times(2.0)?.plus(-1.0)?;
            let latents = autoencoder.encode(&pixels)?;
            Ok::<_, Error>((picture, pixels, latents))
        })?;
        let adam = AdamConfig::with_learning_rate(config.learning_rate);
        let optimizers = parameters(autoencoder).map(|_| Adam::new(adam)).collect();
        Ok(Self { vae, config, picture, pixels, latents, optimizers, epoch: 0, before: vec![] })
    }

    /// The autoencoder as it is now.
    pub fn vae(&self) -> &AutoencoderKl {
        self.vae.borrow()
    }

    /// The autoencoder with what its decoder has learnt.
    pub fn into_inner(self) -> V {
        self.vae
    }

    /// Epochs done.
    pub fn epoch(&self) -> usize {
        self.epoch
    }

    /// The next epoch; none after the last. Costs a forward and a backward pass of the decoder, and waits for a GPU.
    ///
    /// # Errors
    /// libtorch's, as out of memory, and [`Error::NotFinite`] for parameters: the decoder is then as it was after the last finished
    /// epoch. [`Error::NotFinite`] for the loss: that is the fault of the epoch before, which is taken back, too.
    pub fn advance(&mut self) -> Result<Option<TuningProgress>> {
        if self.epoch >= self.config.epochs {
            return Ok(None);
        }
        let step = self.epoch + 1;
        let (loss, psnr, gradients) = self.gradients()?;
        if !loss.is_finite() {
            return Err(self.take_back(step));
        }
        // Room for the next copies.
        self.before.clear();
        let mut undo = vec![];
        let outcome = self.update(&gradients, &mut undo).and_then(|sound| if sound { Ok(()) } else { Err(not_finite("decoder", step)) });
        if let Err(error) = outcome {
            self.restore(undo);
            return Err(error);
        }
        (self.epoch, self.before) = (step, undo);
        Ok(Some(TuningProgress { epoch: self.epoch, epochs: self.config.epochs, loss, psnr }))
    }

    /// Whether the loss is finite after the last epoch, of which [`advance`](Self::advance) would learn in the next one only: to be
    /// asked before the autoencoder is used or saved. Costs a forward pass of the decoder.
    ///
    /// # Errors
    /// [`Error::NotFinite`], that epoch having been taken back; libtorch's.
    pub fn check(&mut self) -> Result<()> {
        let loss = tch::no_grad(|| Ok::<_, Error>(self.loss(&self.vae().decode(&self.latents)?)?.f_double_value(&[])?))?;
        if loss.is_finite() {
            Ok(())
        } else {
            Err(self.take_back(self.epoch))
        }
    }

    /// The last epoch has led to a loss that is not finite.
    fn take_back(&mut self, step: usize) -> Error {
        let before = std::mem::take(&mut self.before);
        if !before.is_empty() {
            self.restore(before);
            self.epoch = self.epoch.saturating_sub(1);
        }
        not_finite("loss", step)
    }

    /// Parameters and optimizers as they were; where an epoch has failed midway, the first of them.
    fn restore(&mut self, before: Vec<(Tensor, OptimizerState)>) {
        let _guard = tch::no_grad_guard();
        for ((parameter, optimizer), (value, state)) in parameters(self.vae.borrow()).zip(&mut self.optimizers).zip(before) {
            // Nothing is allocated here, and what remains to be told is the first error.
            let _ = parameter.shallow_clone().f_copy_(&value);
            let _ = optimizer.load_state(state);
        }
    }

    fn loss(&self, decoded: &Tensor) -> Result<Tensor> {
        Ok(decoded.f_sub(&self.pixels)?.f_abs()?.f_mean(Kind::Float)?)
    }

    /// The loss and its gradient by each of the decoder's parameters, and how near the decoded picture is.
    fn gradients(&self) -> Result<(f64, f64, Vec<Tensor>)> {
        let vae = self.vae();
        let learning = Learning::begin(vae)?;
        tch::with_grad(|| {
            let decoded = vae.decode(&self.latents)?;
            let loss = self.loss(&decoded)?;
            let gradients = Tensor::f_run_backward(&[&loss], &learning.0, false, false)?;
            Ok((loss.f_double_value(&[])?, self.psnr_of(&decoded.f_detach()?)?, gradients))
        })
    }

    /// Whether all parameters are finite after a step of each. What they and their optimizers were is laid into `undo` first.
    fn update(&mut self, gradients: &[Tensor], undo: &mut Vec<(Tensor, OptimizerState)>) -> Result<bool> {
        let _guard = tch::no_grad_guard();
        let mut sound = vec![];
        for ((parameter, optimizer), gradient) in parameters(self.vae.borrow()).zip(&mut self.optimizers).zip(gradients) {
            undo.push((copy(parameter)?, copy_state(&optimizer.state()?)?));
            optimizer.step(&mut parameter.shallow_clone(), gradient)?;
            sound.push(parameter.f_isfinite()?.f_all()?);
        }
        Ok(Tensor::f_stack(&sound, 0)?.f_all()?.f_int64_value(&[])? == 1)
    }

    /// All epochs that are left, and a [`check`](Self::check) of the last one.
    ///
    /// # Errors
    /// As [`advance`](Self::advance), after which it can go on, too.
    pub fn finish(&mut self) -> Result<()> {
        while self.advance()?.is_some() {}
        self.check()
    }

    /// The picture as the decoder gives it back now, `(batch, 3, height, width)` with values 0 to 1.
    ///
    /// # Errors
    /// libtorch's.
    pub fn decoded(&self) -> Result<Tensor> {
        tch::no_grad(|| shown(&self.vae().decode(&self.latents)?))
    }

    /// How near the decoded picture, clamped to 0 to 1, is to the picture now: the peak signal-to-noise ratio in decibels, infinite
    /// if both are the same. Costs a forward pass of the decoder.
    ///
    /// # Errors
    /// libtorch's.
    pub fn psnr(&self) -> Result<f64> {
        tch::no_grad(|| self.psnr_of(&self.vae().decode(&self.latents)?))
    }

    fn psnr_of(&self, decoded: &Tensor) -> Result<f64> {
        let error = shown(decoded)?.f_sub(&self.picture)?.f_square()?.f_mean(Kind::Float)?.f_double_value(&[])?;
        Ok(-10.0 * error.log10())
    }
}

fn not_finite(what: &'static str, step: usize) -> Error {
    Error::NotFinite { what, step, timestep: f64::NAN }
}

fn shown(pixels: &Tensor) -> Result<Tensor> {
    pixels.over(2.0)?.plus(0.5)?.within(0.0, 1.0)
}

/// While it lives the decoder's parameters, which it holds, require gradients.
struct Learning(Vec<Tensor>);

impl Learning {
    fn begin(vae: &AutoencoderKl) -> Result<Self> {
        let mut learning = Self(vec![]);
        for parameter in parameters(vae) {
            // The same tensor as the layer's, not another one.
            learning.0.push(parameter.f_set_requires_grad(true)?);
        }
        Ok(learning)
    }
}

impl Drop for Learning {
    fn drop(&mut self) {
        for parameter in &self.0 {
            let _ = parameter.f_set_requires_grad(false);
        }
    }
}
