//! The tensors that a graph reads and writes: they stay where they are, and their contents change.

use super::capturable::{at, Capturable, NO_NUMBER};
use crate::bias::Memo;
use crate::extractor::check_timestep;
use crate::optimizer::{copy, CapturableAdam};
use crate::scalar::WithNumber;
use crate::{Adam, AdamConfig, Error, FeatureExtractor, Features, Guidance, Loss, References, Result};
use tch::{Device, Kind, Tensor};

/// `(1)`, in f32, of no timestep yet.
fn timestep_on(device: Device) -> Result<Tensor> {
    Ok(Tensor::f_zeros([1], (Kind::Float, device))?)
}

/// Nothing is copied from the CPU.
fn set(to: &Tensor, timestep: f64) -> Result<()> {
    check_timestep(timestep)?;
    overwrite(to, &to.f_ones_like()?.times(timestep)?)
}

/// A noise prediction. What a graph is made of is [`predict`](Self::predict).
#[derive(Debug)]
pub(super) struct Prediction {
    latents: Tensor,
    timestep: Tensor,
    /// Made by the first pass, of whatever shape its prediction has.
    predicted: Option<Tensor>,
}

impl Prediction {
    /// For latents of this shape, on their device.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn new(latents: &Tensor) -> Result<Self> {
        Ok(Self { latents: copy(latents)?, timestep: timestep_on(latents.device())?, predicted: None })
    }

    /// Whether it was made for latents of this shape.
    pub(super) fn fits(&self, latents: &Tensor) -> bool {
        self.latents.size() == latents.size()
    }

    /// Takes over latents and timestep.
    ///
    /// # Errors
    /// Another shape than that it was made for.
    pub(super) fn load(&self, latents: &Tensor, timestep: f64) -> Result<()> {
        let _guard = tch::no_grad_guard();
        overwrite(&self.latents, latents)?;
        set(&self.timestep, timestep)
    }

    /// As [`Capturable::forward_guided_at`].
    ///
    /// # Errors
    /// As there.
    pub(super) fn predict<D: Capturable>(&mut self, denoiser: &D, guidance: &Guidance<D::Condition>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let predicted = denoiser.forward_guided_at(&self.latents, &self.timestep, guidance)?;
        match &self.predicted {
            Some(place) => overwrite(place, &predicted),
            None => {
                self.predicted = Some(copy(&predicted)?);
                Ok(())
            }
        }
    }

    /// In storage of its own.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn result(&self) -> Result<Tensor> {
        self.predicted.as_ref().map_or_else(|| Err(Error::argument("recorder", "did not do the work that it was given")), copy)
    }
}

/// A look at references whose latents change. What a graph is made of is [`look`](Self::look).
#[derive(Debug)]
pub(super) struct Look {
    latents: References,
    timestep: Tensor,
    features: References<Features>,
}

impl Look {
    /// For latents and features of these shapes.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn new(latents: &References, features: &References<Features>, device: Device) -> Result<Self> {
        Ok(Self { latents: latents.try_map(copy)?, timestep: timestep_on(device)?, features: features.try_map(|of| of.try_map(copy))? })
    }

    /// Whether it was made for references of these shapes.
    pub(super) fn fits(&self, latents: &References) -> bool {
        let sizes = |references: &References| all_latents(references).map(Tensor::size).collect::<Vec<_>>();
        latents.content.is_some() == self.latents.content.is_some() && sizes(latents) == sizes(&self.latents)
    }

    /// Takes over latents and timestep.
    ///
    /// # Errors
    /// Other shapes than those that it was made for.
    pub(super) fn load(&self, latents: &References, timestep: f64) -> Result<()> {
        overwrite_latents(&self.latents, latents)?;
        let _guard = tch::no_grad_guard();
        set(&self.timestep, timestep)
    }

    /// The features of the latents at the timestep.
    ///
    /// # Errors
    /// As [`FeatureExtractor::references`].
    pub(super) fn look<D: Capturable>(&self, extractor: &FeatureExtractor<D>) -> Result<()> {
        take(&self.features, &at(extractor, &self.timestep).references(&self.latents, NO_NUMBER)?)
    }

    /// Handles on the features, which the next look overwrites.
    pub(super) fn features(&self) -> References<Features> {
        self.features.shallow_clone()
    }
}

/// All that changes from one step of a descent to the next. What a graph is made of is [`look`](Self::look) and
/// [`descend`](Self::descend), which are given nothing else that changes.
#[derive(Debug)]
pub(super) struct Statics {
    latents: Tensor,
    timestep: Tensor,
    references: References<Features>,
    adam: CapturableAdam,
    /// Before the last step, `[]`.
    loss: Tensor,
}

impl Statics {
    /// For latents of this shape, in f32, on their device, an Adam of these settings, and features of this shape.
    ///
    /// # Errors
    /// Settings of the optimizer out of range.
    pub(super) fn new(latents: &Tensor, config: AdamConfig, references: &References<Features>) -> Result<Self> {
        let latents = copy(&latents.f_to_kind(Kind::Float)?)?;
        let device = latents.device();
        let mut references = references.try_map(|features| features.try_map(copy))?;
        // Of its own: what it keeps is read by the graph, and other handles on the run's references could take it away.
        references.memo = Memo::default();
        let adam = CapturableAdam::new(config, &latents)?;
        let loss = Tensor::f_zeros([0_i64; 0], (Kind::Float, device))?;
        Ok(Self { timestep: timestep_on(device)?, loss, latents, references, adam })
    }

    /// Whether it was made for latents of this shape.
    pub(super) fn fits(&self, latents: &Tensor) -> bool {
        self.latents.size() == latents.size()
    }

    /// Takes over latents, optimizer, and timestep; nothing is copied from the CPU.
    ///
    /// # Errors
    /// Another shape than that it was made for.
    pub(super) fn load(&mut self, latents: &Tensor, adam: &Adam, timestep: f64) -> Result<()> {
        let _guard = tch::no_grad_guard();
        overwrite(&self.latents, latents)?;
        set(&self.timestep, timestep)?;
        self.adam.load(adam)
    }

    /// Takes over features of references.
    ///
    /// # Errors
    /// Others than those that it was made for.
    pub(super) fn take(&self, references: &References<Features>) -> Result<()> {
        take(&self.references, references)
    }

    /// The features of references at the timestep.
    ///
    /// # Errors
    /// As [`FeatureExtractor::references`].
    pub(super) fn look<D: Capturable>(&self, extractor: &FeatureExtractor<D>, references: &References) -> Result<()> {
        self.take(&at(extractor, &self.timestep).references(references, NO_NUMBER)?)
    }

    /// One step of the optimizer.
    ///
    /// # Errors
    /// As [`FeatureExtractor::descend`].
    pub(super) fn descend<D: Capturable>(&mut self, extractor: &FeatureExtractor<D>, loss: &dyn Loss) -> Result<()> {
        // A handle of its own each time: an output that a loss asks a reference for is kept there, and would stay that of the
        // features that were there then.
        let references = self.references.shallow_clone();
        let (value, gradient) = at(extractor, &self.timestep).gradient(&self.latents, NO_NUMBER, &references, loss)?;
        self.adam.step(&mut self.latents, &gradient)?;
        let _guard = tch::no_grad_guard();
        overwrite(&self.loss, &value)
    }

    /// Latents and loss, in storage of their own.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn result(&self) -> Result<(Tensor, Tensor)> {
        Ok((copy(&self.latents)?, copy(&self.loss)?))
    }

    /// The optimizer after so many steps since [`load`](Self::load).
    ///
    /// # Errors
    /// As [`CapturableAdam::store`].
    pub(super) fn store(&self, adam: &mut Adam, steps: usize) -> Result<()> {
        self.adam.store(adam, steps)
    }
}

pub(super) fn all_latents(references: &References) -> impl Iterator<Item = &Tensor> {
    references.styles.iter().map(|style| &style.of).chain(&references.content)
}

/// All latents of as many references, in place.
///
/// # Errors
/// Of other shapes.
pub(super) fn overwrite_latents(to: &References, from: &References) -> Result<()> {
    let _guard = tch::no_grad_guard();
    all_latents(to).zip(all_latents(from)).try_for_each(|(to, from)| overwrite(to, from))
}

/// All features of references, in place.
fn take(to: &References<Features>, from: &References<Features>) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let all = |references: &References<Features>| {
        let features = references.styles.iter().map(|style| &style.of).chain(&references.content);
        features.flat_map(Features::tensors).map(Tensor::shallow_clone).collect::<Vec<_>>()
    };
    let (ours, theirs) = (all(to), all(from));
    if ours.len() != theirs.len() {
        return Err(Error::argument("references", format!("have {} tensors of features, the graph was captured with {}", theirs.len(), ours.len())));
    }
    ours.iter().zip(&theirs).try_for_each(|(to, from)| overwrite(to, from))
}

/// In place; without a graph of autograd.
fn overwrite(to: &Tensor, from: &Tensor) -> Result<()> {
    if to.size() != from.size() {
        return Err(Error::shape("what a graph reads", format!("{:?}, that of its capture", to.size()), from.size()));
    }
    Ok(to.shallow_clone().f_copy_(from)?)
}
