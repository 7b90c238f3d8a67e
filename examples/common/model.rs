//! Opening what `--model` names.

use super::Shared;
use attention_distillation::stable_diffusion::AutoencoderKl;
use attention_distillation::{device, tch::Kind, Error, Result, StableDiffusion};
use std::path::{Path, PathBuf};

pub fn open(shared: &Shared) -> Result<StableDiffusion> {
    let device = shared.device()?;
    let kind = shared.kind(device)?;
    let vae_kind = shared.vae_dtype.as_deref().map(device::parse_kind).transpose()?;
    let open = |folder: &Path| match vae_kind {
        Some(its) => AutoencoderKl::open_in(folder, device, its),
        None => AutoencoderKl::open(folder, device, kind),
    };
    // First, as the model takes longer, and the more so where it has to be fetched.
    let vae = shared.vae.as_deref().map(open).transpose()?;
    let folder = folder(&shared.model, kind)?;
    let mut model = StableDiffusion::open(&folder, device, kind)?;
    model.set_gradient_checkpointing(shared.low_memory);
    match vae {
        Some(vae) => model.set_vae(vae)?,
        None if vae_kind.is_some() => model.set_vae(open(&folder.join("vae"))?)?,
        None => (),
    }
    Ok(model)
}

/// For a task without prompts: it wants the null prompt alone, so that the text encoders' memory is free from here on.
pub fn open_without_text(shared: &Shared) -> Result<StableDiffusion> {
    let mut model = open(shared)?;
    model.drop_text_encoders()?;
    Ok(model)
}

/// A folder as it is; a repo id is fetched.
pub fn folder(model: &str, kind: Kind) -> Result<PathBuf> {
    if Path::new(model).exists() {
        return Ok(model.into());
    }
    fetch(model, kind)
}

#[cfg(feature = "hub")]
fn fetch(model: &str, kind: Kind) -> Result<PathBuf> {
    use attention_distillation::stable_diffusion::hub::{is_repo_id, Hub};
    if !is_repo_id(model) {
        return Err(missing(model, "there is no such folder, and it is no Hugging Face repo id"));
    }
    // On a terminal a bar, else nothing: indicatif sees to it.
    let bar = indicatif::ProgressBar::new(0);
    if let Ok(style) = indicatif::ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {eta} left") {
        bar.set_style(style);
    }
    let folder = Hub::new().with_half(kind == Kind::Half).fetch(model, &mut |download| {
        bar.set_message(download.file.clone());
        bar.set_length(download.total);
        bar.set_position(download.done);
    });
    bar.finish_and_clear();
    folder.map_err(|error| match error {
        // It may have been meant for a folder, which is mistyped or elsewhere.
        Error::Hub { repo, reason } => Error::Hub { repo, reason: format!("{reason} (nor is there a folder of that name here)") },
        error => error,
    })
}

#[cfg(not(feature = "hub"))]
fn fetch(model: &str, _: Kind) -> Result<PathBuf> {
    Err(missing(model, "there is no such folder; to fetch a Hugging Face repo, build with --features hub"))
}

fn missing(model: &str, reason: &str) -> Error {
    Error::Config { path: model.into(), reason: reason.into() }
}
