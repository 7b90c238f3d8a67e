//! What the two procedures have in common for who watches them.

use attention_distillation::tch::Tensor;
use attention_distillation::{Denoiser, Distiller, GuidedSampler, Optimizer, Progress, Result};

/// Either procedure, as far as watching it goes.
pub trait Run {
    fn advance(&mut self) -> Result<Option<Progress>>;
    fn check(&mut self) -> Result<()>;
    fn latents(&self) -> &Tensor;
    fn steps(&self) -> usize;
    /// Steps done.
    fn step(&self) -> usize;
}

macro_rules! run {
    ($run:ident, $steps:expr) => {
        impl<D: Denoiser, O: Optimizer> Run for $run<D, O> {
            fn advance(&mut self) -> Result<Option<Progress>> {
                self.advance()
            }
            fn check(&mut self) -> Result<()> {
                self.check()
            }
            fn latents(&self) -> &Tensor {
                &self.latents
            }
            fn steps(&self) -> usize {
                $steps(self)
            }
            fn step(&self) -> usize {
                self.step
            }
        }
    };
}
run!(Distiller, |run: &Distiller<D, O>| run.timesteps.len());
run!(GuidedSampler, |run: &GuidedSampler<D, O>| run.scheduler.timesteps().len());

#[cfg(feature = "cuda-graphs")]
mod graphed {
    use super::{Progress, Result, Run, Tensor};
    use attention_distillation::cuda_graphs::{Capturable, GraphedDistiller, GraphedSampler};

    macro_rules! run {
        ($run:ident) => {
            impl<D: Capturable> Run for $run<D> {
                fn advance(&mut self) -> Result<Option<Progress>> {
                    self.advance()
                }
                fn check(&mut self) -> Result<()> {
                    self.check()
                }
                fn latents(&self) -> &Tensor {
                    self.run().latents()
                }
                fn steps(&self) -> usize {
                    self.run().steps()
                }
                fn step(&self) -> usize {
                    self.run().step()
                }
            }
        };
    }
    run!(GraphedDistiller);
    run!(GraphedSampler);
}
