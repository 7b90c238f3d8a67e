//! An autoencoder back into a folder, as diffusers has them.

use super::AutoencoderKl;
use crate::stable_diffusion::config::Config;
use crate::stable_diffusion::weights::file_names;
use crate::{tensor_file, Error, Result};
use std::path::Path;

const CONFIG: &str = "config.json";
const STEM: &str = "diffusion_pytorch_model";
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

impl AutoencoderKl {
    /// Writes a folder that [`open`](Self::open) and diffusers read: `config.json` as it was opened, and all weights under their
    /// own names, in the kind that they have here. A new folder appears whole or not at all; in one that holds an autoencoder
    /// both files are first written under temporary names, then renamed, one after the other: a new folder is the safer place.
    ///
    /// # Errors
    /// As [`check_writable`](Self::check_writable), [`Error::Io`] where there is no room.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        Self::check_writable(folder)?;
        let config = self.config.to_bytes()?;
        let weights = self.weights.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let weights = tensor_file::to_bytes(weights, &folder.join(WEIGHTS))?;
        let write = |folder: &Path| tensor_file::write_all(&[(folder.join(WEIGHTS), &weights), (folder.join(CONFIG), &config)]);
        if folder.is_dir() {
            return write(folder);
        }
        let part = tensor_file::temporary(folder)?;
        let written = std::fs::create_dir(&part).map_err(Error::io(folder)).and_then(|()| write(&part));
        let renamed = written.and_then(|()| std::fs::rename(&part, folder).map_err(Error::io(folder)));
        if renamed.is_err() {
            // Best effort: the error to report is the first one.
            let _ = std::fs::remove_dir_all(&part);
        }
        renamed
    }

    /// Whether [`save`](Self::save) would write there: a folder that is new, empty of models, or another autoencoder's. To learn
    /// of a mistyped name before a long run and not after it.
    ///
    /// # Errors
    /// [`Error::Config`] for a file, a folder in one that does not exist, or one that holds another network, or weights that
    /// would be read in place of the new ones; [`Error::Io`] where no file can be made.
    pub fn check_writable(folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let bad = |reason: String| Err(Error::Config { path: folder.to_owned(), reason });
        if !folder.is_dir() {
            let parent = match folder.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            return match (folder.exists(), parent.is_dir(), folder.file_name()) {
                (true, ..) => bad("is a file; name a folder".into()),
                (_, _, None) => bad("names no folder".into()),
                (_, false, _) => bad(format!("the folder {} does not exist; make it first", parent.display())),
                _ => tensor_file::check_beside(folder),
            };
        }
        let elsewhere = "name another folder";
        if let Some(other) = file_names(STEM, false).find(|name| name != WEIGHTS && folder.join(name).exists()) {
            return bad(format!("holds other weights, {other}; {elsewhere}"));
        }
        let config = folder.join(CONFIG);
        match (config.exists(), folder.join(WEIGHTS).exists()) {
            (false, false) => {}
            (false, true) => return bad(format!("holds weights that no config.json explains; {elsewhere}")),
            (true, _) => match Config::open(&config)?.text("_class_name", "something else")? {
                "AutoencoderKL" => {}
                other => return bad(format!("holds {other}, not an autoencoder; {elsewhere}")),
            },
        }
        tensor_file::check_beside(&config)
    }
}
