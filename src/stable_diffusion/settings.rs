//! A model folder's own settings, `attention_distillation.json`.

use super::config::Config;
use crate::{Result, Settings};
use std::path::Path;

const KEYS: [&str; 6] = ["layers", "size", "steps", "iterations", "learning_rate", "content_weight"];

/// What a folder says; each may be absent.
#[derive(Debug, Clone, Default)]
pub(crate) struct FolderSettings {
    config: Option<Config>,
}

impl FolderSettings {
    /// Also checks all values, so that `over` cannot fail for them later.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("attention_distillation.json");
        if !path.exists() {
            return Ok(Self::default());
        }
        let config = Config::open(&path)?;
        for key in config.keys().filter(|key| !KEYS.contains(key)) {
            tracing::warn!(file = %path.display(), key, "a setting that this version does not know");
        }
        let settings = Self { config: Some(config) };
        settings.over(Settings::style_transfer())?;
        Ok(settings)
    }

    /// The given settings, with those of the folder in their place.
    pub(crate) fn over(&self, mut settings: Settings) -> Result<Settings> {
        let Some(config) = &self.config else { return Ok(settings) };
        let count = |key: &str, default: usize| -> Result<usize> {
            match config.get(key) {
                Some(_) => Ok(usize::try_from(config.count(key, 1)?).unwrap_or(1)),
                None => Ok(default),
            }
        };
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
        settings.steps = count("steps", settings.steps)?;
        settings.iterations = count("iterations", settings.iterations)?;
        settings.learning_rate = config.number("learning_rate", settings.learning_rate)?;
        settings.content_weight = config.number("content_weight", settings.content_weight)?;
        settings.check().map_err(|error| config.bad(error.to_string()))?;
        Ok(settings)
    }
}
