//! The tensors that a graph reads and writes: they stay where they are, and their contents change.

use super::capturable::{at, Capturable, NO_NUMBER};
use crate::bias::Memo;
use crate::optimizer::{copy, CapturableAdam};
use crate::scalar::WithNumber;
use crate::{Adam, Distiller, Error, FeatureExtractor, Features, Loss, References, Result};
use tch::{Kind, Tensor};

/// All that changes from one step of a run to the next. What a graph is made of is [`look`](Self::look) and
/// [`descend`](Self::descend), which are given nothing else that changes.
#[derive(Debug)]
pub(super) struct Statics {
    latents: Tensor,
    /// `(1)`, in f32.
    timestep: Tensor,
    references: References<Features>,
    adam: CapturableAdam,
    /// Before the last step, `[]`.
    loss: Tensor,
}

impl Statics {
    /// For runs of the shape of this one, whose references have features of this shape.
    ///
    /// # Errors
    /// Settings of the optimizer out of range.
    pub(super) fn new<D: Capturable>(run: &Distiller<D, Adam>, references: &References<Features>) -> Result<Self> {
        let latents = copy(&run.latents.f_to_kind(Kind::Float)?)?;
        let number = |size: &[i64]| Tensor::f_zeros(size, (Kind::Float, latents.device()));
        let mut references = references.try_map(|features| features.try_map(copy))?;
        // Of its own: what it keeps is read by the graph, and other handles on the run's references could take it away.
        references.memo = Memo::default();
        let adam = CapturableAdam::new(run.optimizer.config, &latents)?;
        Ok(Self { timestep: number(&[1])?, loss: number(&[])?, latents, references, adam })
    }

    /// Takes over latents and optimizer of a run, and the timestep; nothing is copied from the CPU.
    ///
    /// # Errors
    /// Another shape than that of the run it was made for.
    pub(super) fn load<D: Capturable>(&mut self, run: &Distiller<D, Adam>, timestep: f64) -> Result<()> {
        let _guard = tch::no_grad_guard();
        overwrite(&self.latents, &run.latents)?;
        overwrite(&self.timestep, &self.timestep.f_ones_like()?.times(timestep)?)?;
        self.adam.load(&run.optimizer)
    }

    /// Takes over features of references.
    ///
    /// # Errors
    /// Others than those that it was made for.
    pub(super) fn take(&self, references: &References<Features>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let all = |references: &References<Features>| {
            let features = references.styles.iter().map(|style| &style.of).chain(&references.content);
            features.flat_map(Features::tensors).map(Tensor::shallow_clone).collect::<Vec<_>>()
        };
        let (ours, theirs) = (all(&self.references), all(references));
        if ours.len() != theirs.len() {
            return Err(Error::argument(
                "references",
                format!("have {} tensors of features, the graph was captured with {}", theirs.len(), ours.len()),
            ));
        }
        ours.iter().zip(&theirs).try_for_each(|(to, from)| overwrite(to, from))
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

/// In place; without a graph of autograd.
fn overwrite(to: &Tensor, from: &Tensor) -> Result<()> {
    if to.size() != from.size() {
        return Err(Error::shape("what a graph reads", format!("{:?}, that of its capture", to.size()), from.size()));
    }
    Ok(to.shallow_clone().f_copy_(from)?)
}
