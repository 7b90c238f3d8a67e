//! Runs by CUDA graphs, where the flag asks for it.

use super::{follow, Run, Shared};
use attention_distillation::tch::Tensor;
use attention_distillation::{Distiller, GuidedSampler, Result, StableDiffusion};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct GraphFlags {
    /// Capture the run's passes once and repeat them, by CUDA graphs, which spare a GPU the queueing of each kernel
    #[cfg(feature = "cuda-graphs")]
    #[arg(long)]
    pub cuda_graphs: bool,
}

impl GraphFlags {
    /// As [`follow`].
    pub fn follow(&self, mut run: impl Graphable, model: &StableDiffusion, shared: &Shared, files: &[PathBuf]) -> Result<(Tensor, bool)> {
        #[cfg(feature = "cuda-graphs")]
        if self.cuda_graphs {
            return follow(&mut run.with_graphs()?, model, shared, files);
        }
        follow(&mut run, model, shared, files)
    }
}

/// A run that can be made by graphs.
pub trait Graphable: Run {
    #[cfg(feature = "cuda-graphs")]
    fn with_graphs(self) -> Result<impl Run>;
}

macro_rules! graphable {
    ($run:ident) => {
        impl Graphable for $run<&StableDiffusion> {
            #[cfg(feature = "cuda-graphs")]
            fn with_graphs(self) -> Result<impl Run> {
                Ok(self.with_graphs(attention_distillation::cuda_graphs::CudaGraphs::new()?))
            }
        }
    };
}
graphable!(Distiller);
graphable!(GuidedSampler);
