//! A model folder's own settings, `attention_distillation.json`.

use super::config::Config;
use crate::{Procedure, Result, Settings};
use std::path::Path;

/// What holds for every task.
const COMMON: [&str; 3] = ["layers", "size", SAMPLING];
/// What holds for tasks by optimisation; for those by sampling it stands in an object of its own.
const OPTIMISATION: [&str; 4] = ["steps", "iterations", "learning_rate", "content_weight"];
/// What only sampling has.
const SAMPLING_ONLY: [&str; 2] = ["guidance", "adain"];
const SAMPLING: &str = "sampling";

/// What a folder says; each may be absent.
#[derive(Debug, Clone, Default)]
pub(crate) struct FolderSettings {
    config: Option<Config>,
    sampling: Option<Config>,
}

impl FolderSettings {
    /// Also checks all values, so that `over` cannot fail for them later.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("attention_distillation.json");
        if !path.exists() {
            return Ok(Self::default());
        }
        let config = Config::open(&path)?;
        let sampling = config.object(SAMPLING)?;
        let warn = |key: &str| tracing::warn!(file = %path.display(), key, "a setting that this version does not know");
        config.keys().filter(|key| !COMMON.contains(key) && !OPTIMISATION.contains(key)).for_each(warn);
        let unknown = |key: &&str| !SAMPLING_ONLY.contains(key) && !OPTIMISATION.contains(key);
        sampling.iter().flat_map(Config::keys).filter(unknown).for_each(|key| warn(&format!("{SAMPLING}.{key}")));
        let settings = Self { config: Some(config), sampling };
        settings.over(Settings::style_transfer())?;
        settings.over(Settings::text_to_image())?;
        Ok(settings)
    }

    /// The given settings, with those of the folder in their place.
    pub(crate) fn over(&self, mut settings: Settings) -> Result<Settings> {
        let Some(config) = &self.config else { return Ok(settings) };
        if let Some(layers) = config.get("layers") {
            let ends =
                layers.as_array().map(|list| list.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect::<Option<Vec<_>>>());
            match ends.flatten().as_deref() {
                Some(&[start, end]) if start < end => settings.layers = Some(start..end),
                _ => return Err(config.bad(format!("`layers` is {layers}; it must be [first, end) as in [10, 16]"))),
            }
        }
        if config.get("size").is_some() {
            match config.counts("size")?.as_slice() {
                &[width, height] => settings.size = Some((height, width)),
                other => return Err(config.bad(format!("`size` is {other:?}; it must be [width, height] in pixels"))),
            }
        }
        let own = match settings.procedure {
            Procedure::Optimisation => Some(config),
            Procedure::Sampling => self.sampling.as_ref(),
        };
        let Some(own) = own else { return Ok(settings) };
        let count = |key: &str, default: usize| -> Result<usize> {
            match own.get(key) {
                Some(value) if value.as_u64() == Some(0) => Ok(0),
                Some(_) => Ok(usize::try_from(own.count(key, 1)?).unwrap_or(1)),
                None => Ok(default),
            }
        };
        settings.steps = count("steps", settings.steps)?;
        settings.iterations = count("iterations", settings.iterations)?;
        settings.learning_rate = own.number("learning_rate", settings.learning_rate)?;
        settings.content_weight = own.number("content_weight", settings.content_weight)?;
        if settings.procedure == Procedure::Sampling {
            settings.guidance = own.number("guidance", settings.guidance)?;
            settings.adain = own.flag("adain", settings.adain)?;
        }
        settings.check().map_err(|error| own.bad(error.to_string()))?;
        Ok(settings)
    }
}
