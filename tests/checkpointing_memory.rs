//! What gradient checkpointing is for: a step holds a fraction of the memory. The figures are the whole process's, so this file has one
//! test and a process of its own.
#![cfg(feature = "stable-diffusion")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)] // A test may panic.

mod memory;

use attention_distillation::{AdLoss, Features, Loss, References, Result, StableDiffusion};
use memory::{allocated, most_resident, say, Memory};
use std::cell::Cell;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Looks at what is held between the two passes, in KiB.
#[derive(Default)]
struct Looking(Cell<Option<i64>>);

impl Loss for Looking {
    fn evaluate(&self, picture: &Features, references: &References<Features>) -> Result<Tensor> {
        let value = AdLoss::default().evaluate(picture, references)?;
        self.0.set(allocated());
        Ok(value)
    }
}

#[test]
fn a_step_holds_a_fraction() {
    tch::set_num_threads(1);
    let mut model = StableDiffusion::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/mini"), Device::Cpu, Kind::Float).unwrap();
    let latents = |side: i64| Tensor::linspace(-1, 1, 8 * side * side, (Kind::Float, Device::Cpu)).sin().view([1, 8, side, side]);
    // In KiB: what is held at the loss, and the most that is resident meanwhile; of a picture of so many latents a side.
    let mut step = |side: i64, checkpointing: bool, base: Option<i64>| {
        model.set_gradient_checkpointing(checkpointing);
        let size = (4 * side, 4 * side);
        let extractor = model.extractor(size).unwrap();
        let references = extractor.references(&References::style(latents(16)), 501.0).unwrap();
        let (latents, looking) = (latents(side), Looking::default());
        let held = allocated();
        let _ = extractor.gradient(&latents, 501.0, &references, &looking).unwrap();
        let at_loss = looking.0.get().zip(held).map(|(at_loss, before)| at_loss - before);
        (at_loss, most_resident().zip(base).map(|(most, before)| most - before))
    };
    // Kernels are made at first use.
    let _ = (step(16, true, None), step(16, false, None));
    let base = Memory::now().map(|memory| memory.resident);
    // In this order, as the most that ever was is asked for.
    let (checkpointed, plain) = (step(64, true, base), step(64, false, base));
    say(&format!("KiB at the loss, and at most: checkpointed {checkpointed:?}, plain {plain:?}"));
    // Measured 4.8 times as much at the loss, where the plain pass has its whole graph, and 2.5 times at most; the same without checkpointing.
    // An allocator in glibc's place hands out all of it unseen.
    match (plain.0, checkpointed.0) {
        (Some(plain), Some(checkpointed)) if plain > 32 << 10 => assert!(plain > 3 * checkpointed, "{checkpointed} of {plain} KiB at the loss"),
        _ => say("partly skipped: the allocator does not tell how much it has handed out"),
    }
    match (plain.1, checkpointed.1) {
        (Some(plain), Some(checkpointed)) => assert!(2 * plain > 3 * checkpointed, "at most {checkpointed} of {plain} KiB"),
        _ => say("partly skipped: there is no /proc/self/status to tell what is resident"),
    }
}
