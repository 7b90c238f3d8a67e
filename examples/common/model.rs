//! Opening what `--model` names.

use super::Shared;
use attention_distillation::{Error, Result, StableDiffusion};
use std::path::{Path, PathBuf};

pub fn open(shared: &Shared) -> Result<StableDiffusion> {
    let device = shared.device()?;
    StableDiffusion::open(folder(&shared.model)?, device, shared.kind(device)?)
}

/// A folder as it is; a repo id is fetched.
fn folder(model: &str) -> Result<PathBuf> {
    if Path::new(model).exists() {
        return Ok(model.into());
    }
    fetch(model)
}

#[cfg(feature = "hub")]
fn fetch(model: &str) -> Result<PathBuf> {
    use attention_distillation::stable_diffusion::hub::{is_repo_id, Hub};
    if !is_repo_id(model) {
        return Err(missing(model, "there is no such folder, and it is no Hugging Face repo id"));
    }
    let mut last = String::new();
    let folder = Hub::new().fetch(model, &mut |download| {
        if download.file != last {
            last.clone_from(&download.file);
            eprintln!("fetching {} ({:.1} MB)", download.file, download.total as f64 / 1e6);
        }
    })?;
    Ok(folder)
}

#[cfg(not(feature = "hub"))]
fn fetch(model: &str) -> Result<PathBuf> {
    Err(missing(model, "there is no such folder; to fetch a Hugging Face repo, build with --features hub"))
}

fn missing(model: &str, reason: &str) -> Error {
    Error::Config { path: model.into(), reason: reason.into() }
}
