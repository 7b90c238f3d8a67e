//! From coarse to fine: the flag, and what becomes of the draft.

use super::{save, say, Shared};
use attention_distillation::{image, tch::Tensor, Error, Result, StableDiffusion};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct DraftFlags {
    /// First make a draft of half the size, as its previews are, then take the last fraction F of the timesteps at the whole size (above 0,
    /// at most 1; try 0.4): much the same picture in less time. For sizes of twice what the model is made for
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub coarse_to_fine: Option<f64>,
}

impl DraftFlags {
    /// Before a draft is drawn in vain.
    pub fn check(&self, by_optimisation: bool) -> Result<()> {
        let reason = match self.coarse_to_fine {
            Some(_) if !by_optimisation => "works with --method optimise alone; leave out --method sample".to_owned(),
            // From 1e-6 on a strength takes at least one step.
            Some(strength) if !(1e-6..=1.0).contains(&strength) => format!("{strength} of the steps are none, or more than all; use 0.4 or so"),
            _ => return Ok(()),
        };
        Err(Error::Argument { argument: "coarse-to-fine", reason })
    }

    /// The draft's size for a picture of `size`, in about the same proportions, and the fraction, where one was asked for.
    pub fn half_size(&self, model: &StableDiffusion, size: (i64, i64)) -> Result<Option<((i64, i64), f64)>> {
        let half = || model.fit(image::size_of_area(size, (size.0 * size.1 / 4).max(1), model.vae().factor())?);
        self.coarse_to_fine.map(|strength| Ok((half()?, strength))).transpose()
    }
}

/// Writes the enlarged draft where the picture will go: worth keeping, should the rest fail.
pub fn keep_draft(draft: &Tensor, (height, width): (i64, i64), shared: &Shared, files: &[PathBuf]) {
    match save(draft, files) {
        Ok(()) => say(format_args!("the draft is in {}; the last steps at {width}x{height}", shared.output.display())),
        Err(error) => tracing::warn!(%error, "the draft was not kept"),
    }
}
