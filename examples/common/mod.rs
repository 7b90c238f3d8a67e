//! What the examples share: flags, opening a model, running with progress, writing pictures.

mod flags;
mod model;
mod progress;

pub use flags::Shared;
pub use model::open;
pub use progress::follow;

use attention_distillation::{image, tch::Tensor, Error, Result};
use std::{path::PathBuf, process::ExitCode};

/// Runs an example: the last line on stdout is the path it returns; an error is one line on stderr and status 1.
pub fn report(outcome: Result<PathBuf>) -> ExitCode {
    match outcome {
        Ok(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            // libtorch's messages may have several lines.
            eprintln!("error: {}", error.to_string().split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
}

/// The library warns through `tracing`; here that goes to stderr.
pub fn show_warnings() {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
}

/// Before a long run: whether its outputs can be written at the end of it.
pub fn check_outputs(shared: &Shared) -> Result<()> {
    image::check_writable(&shared.output)?;
    shared.sheet.as_ref().map_or(Ok(()), image::check_writable)
}

/// Writes the result, and the sheet of inputs and result where one was asked for.
pub fn write(shared: &Shared, inputs: &[&Tensor], result: &Tensor) -> Result<PathBuf> {
    image::save(result, &shared.output)?;
    if let Some(sheet) = &shared.sheet {
        let row: Vec<&Tensor> = inputs.iter().copied().chain([result]).collect();
        image::save(&image::sheet(&row)?, sheet)?;
    }
    Ok(shared.output.clone())
}

/// A flag whose feature is still to come.
pub fn not_yet(flag: &'static str, value: &str, instead: &str) -> Error {
    Error::Argument { argument: flag, reason: format!("`{value}` is not there yet; {instead}") }
}
