//! The flags that say what to draw, and how often.

use attention_distillation::{Error, Result};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct PromptFlags {
    /// What to draw; may be given several times, one picture each. A model without text encoder takes the empty prompt only
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// A file of prompts, one per line; empty lines and lines that begin with # are passed over
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What to avoid; default: the empty prompt, or zeros where the model's folder says so (SDXL)
    #[arg(long, value_name = "TEXT")]
    pub negative: Option<String>,
    /// Pictures of each prompt
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    count: u16,
}

impl PromptFlags {
    /// All prompts, each as often as --count says; without any the empty one.
    pub fn all(&self) -> Result<Vec<String>> {
        let mut prompts = self.prompt.clone();
        if let Some(path) = &self.prompts {
            let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.clone(), source })?;
            // Some editors begin a file with a mark of its encoding.
            let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
            prompts.extend(lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned));
            if prompts.is_empty() {
                return Err(Error::Config { path: path.clone(), reason: "holds no prompt; write one per line".into() });
            }
        }
        if prompts.is_empty() {
            prompts.push(String::new());
        }
        Ok(prompts.into_iter().flat_map(|prompt| vec![prompt; self.count.into()]).collect())
    }
}
