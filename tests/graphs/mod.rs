//! What stands in for a GPU and its network in tests of runs by graphs.
#![allow(dead_code, clippy::disallowed_methods, missing_docs, unsafe_code)] // Each test file uses a part of it; a test may panic.

use crate::toy::Toy;
use attention_distillation::cuda_graphs::{Capturable, Recorder};
use attention_distillation::{AdLoss, AttentionHook, Denoiser, Error, Features, Loss, References, Result};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

/// Does the work some times over before, as a GPU's does to warm up, and counts.
#[derive(Debug, Default, Clone)]
pub struct Again {
    pub captures: Rc<Cell<usize>>,
    pub replays: Rc<Cell<usize>>,
    /// Refuses the nth capture, from 1.
    pub refused: Option<usize>,
}

impl Recorder for Again {
    type Graph = usize;

    unsafe fn capture(&mut self, device: Device, work: &mut dyn FnMut() -> Result<()>) -> Result<usize> {
        assert_eq!(device, Device::Cpu);
        self.captures.set(self.captures.get() + 1);
        if self.refused == Some(self.captures.get()) {
            return Err(Error::Torch(tch::TchError::Torch("CUDA error: operation not permitted when stream is capturing".into())));
        }
        for _ in 0..3 {
            work()?;
        }
        Ok(self.captures.get())
    }

    unsafe fn replay(&mut self, _: &mut usize, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.replays.set(self.replays.get() + 1);
        work()
    }
}

/// The toy with its timestep as a tensor. Notes where it finds what it reads.
pub struct Noting {
    pub toy: Toy,
    /// Passes at a number.
    pub by_number: Cell<usize>,
    /// Latents and timesteps.
    pub places: RefCell<Vec<(usize, usize)>>,
    /// Conditions of this number cannot be captured.
    pub not: Cell<Option<f64>>,
    /// Predicts twice the channels of the latents, as networks do that have learnt a variance.
    pub variance: Cell<bool>,
}

impl Noting {
    pub fn new() -> Self {
        Self::of(Kind::Double)
    }

    pub fn of(kind: Kind) -> Self {
        Self { toy: Toy::new(kind), by_number: Cell::new(0), places: RefCell::default(), not: Cell::new(None), variance: Cell::default() }
    }

    fn predicted(&self, noise: Tensor) -> Result<Tensor> {
        Ok(if self.variance.get() { Tensor::cat(&[&noise, &(&noise * 0.5)], 1) } else { noise })
    }
}

impl Denoiser for Noting {
    type Condition = f64;

    fn forward(&self, latents: &Tensor, timestep: f64, condition: &f64, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        self.by_number.set(self.by_number.get() + 1);
        self.predicted(self.toy.forward(latents, timestep, condition, hook)?)
    }
}

// SAFETY: its tensors are its own, and nothing replaces them.
#[allow(unsafe_code)]
unsafe impl Capturable for Noting {
    fn forward_at(&self, latents: &Tensor, timestep: &Tensor, condition: &f64, hook: &mut dyn AttentionHook) -> Result<Tensor> {
        assert_eq!((timestep.size(), timestep.kind()), (vec![1], Kind::Float));
        self.places.borrow_mut().push((latents.data_ptr() as usize, timestep.data_ptr() as usize));
        self.predicted(self.toy.run_at(latents, timestep, *condition, hook).map_err(Error::denoiser)?)
    }

    fn can_capture(&self, condition: &f64) -> bool {
        self.not.get() != Some(*condition)
    }
}

/// Notes where it finds the styles' keys and values, and the content's queries.
pub struct NotingLoss(pub AdLoss, pub Arc<Mutex<Vec<Vec<usize>>>>);

impl Loss for NotingLoss {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        let layers = references.styles.iter().flat_map(|style| style.of.layers());
        let content = references.content.iter().flat_map(Features::layers).map(|layer| layer.query.data_ptr() as usize);
        let places = layers.flat_map(|layer| [&layer.key, &layer.value].map(|tensor| tensor.data_ptr() as usize)).chain(content).collect();
        self.1.lock().unwrap().push(places);
        self.0.evaluate(picture, references)
    }
}
