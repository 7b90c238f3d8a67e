//! A model folder's own settings, `attention_distillation.json`.

use super::config::Config;
use crate::{Procedure, Result, Settings, Task};
use std::path::Path;

/// What is said once for all tasks.
const COMMON: [&str; 2] = ["layers", "size"];
/// What each task may have in an object of its own; for tasks by optimisation it may also stand outside, for all of them.
const EACH: [&str; 6] = ["steps", "iterations", "learning_rate", "content_weight", "adain", "smoothing"];
/// What only tasks by sampling have.
const SAMPLING: [&str; 1] = ["guidance"];

/// Each task's settings in a model's folder.
#[derive(Debug, Clone)]
pub(crate) struct FolderSettings {
    of_tasks: Vec<Settings>,
    /// Text-to-image's, where the model is an SDXL.
    of_xl: Settings,
}

impl FolderSettings {
    /// The authors' where the folder has no file of its own.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("attention_distillation.json");
        let mut all = Self { of_tasks: Task::ALL.iter().map(|task| task.settings()).collect(), of_xl: Settings::text_to_image_xl() };
        if !path.exists() {
            return Ok(all);
        }
        let config = Config::open(&path)?;
        warn_of_unknown(&config, &path)?;
        for settings in all.of_tasks.iter_mut().chain([&mut all.of_xl]) {
            over(&config, settings)?;
        }
        Ok(all)
    }

    pub(crate) fn of(&self, task: Task, xl: bool) -> Settings {
        if task == Task::TextToImage && xl {
            return self.of_xl.clone();
        }
        self.of_tasks.iter().find(|settings| settings.task == task).cloned().unwrap_or_else(|| task.settings())
    }
}

fn warn_of_unknown(config: &Config, path: &Path) -> Result<()> {
    let warn = |key: &str| tracing::warn!(file = %path.display(), key, "a setting that this version does not know");
    let task = |key: &str| Task::ALL.iter().any(|task| task.name() == key);
    config.keys().filter(|key| !COMMON.contains(key) && !EACH.contains(key) && !task(key)).for_each(warn);
    for task in Task::ALL {
        let Some(own) = config.object(task.name())? else { continue };
        let sampling = task.procedure() == Procedure::Sampling;
        let known = |key: &str| EACH.contains(&key) || sampling && SAMPLING.contains(&key);
        own.keys().filter(|key| !known(key)).for_each(|key| warn(&format!("{}.{key}", task.name())));
    }
    Ok(())
}

/// The folder's values in the place of a task's.
fn over(config: &Config, settings: &mut Settings) -> Result<()> {
    if let Some(layers) = config.get("layers") {
        let ends = layers.as_array().map(|list| list.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect::<Option<Vec<_>>>());
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
    if settings.task.procedure() == Procedure::Optimisation {
        over_by(config, settings)?;
    }
    config.object(settings.task.name())?.map_or(Ok(()), |own| over_by(&own, settings))
}

/// What one object says.
fn over_by(own: &Config, settings: &mut Settings) -> Result<()> {
    let count = |key: &str, default: usize| -> Result<usize> {
        match own.get(key) {
            // Whether the task allows it is checked below.
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            Some(_) => Ok(usize::try_from(own.count(key, 1)?).unwrap_or(1)),
            None => Ok(default),
        }
    };
    settings.steps = count("steps", settings.steps)?;
    settings.iterations = count("iterations", settings.iterations)?;
    settings.learning_rate = own.number("learning_rate", settings.learning_rate)?;
    settings.content_weight = own.number("content_weight", settings.content_weight)?;
    settings.adain = own.flag("adain", settings.adain)?;
    settings.smoothing = own.number("smoothing", settings.smoothing)?;
    if settings.task.procedure() == Procedure::Sampling {
        settings.guidance = own.number("guidance", settings.guidance)?;
    }
    settings.check().map_err(|error| own.bad(error.to_string()))
}
