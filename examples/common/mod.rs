//! What the examples share: flags, opening a model, running with progress, writing pictures.
#![allow(dead_code, unused_imports)] // Each example uses a part of it.

mod colours;
mod control;
mod draft;
mod flags;
mod graphs;
mod model;
mod outputs;
mod progress;
mod prompts;
mod regions;
mod run;
mod tile;

pub use colours::ColourFlags;
pub use control::ControlFlags;
pub use draft::{keep_draft, DraftFlags};
pub use flags::{size, Shared, Size};
pub use graphs::GraphFlags;
pub use model::{folder, open, open_without_text};
pub use outputs::{check_inputs_stay, check_outputs, files, save, sheet};
pub use progress::{follow, stop_on_ctrl_c, stopped};
pub use prompts::PromptFlags;
pub use regions::RegionFlags;
pub use run::Run;
pub use tile::Tile;

use attention_distillation::{image, keep_freed_memory, tch::Tensor, Error, FeatureExtractor, References, Result, Settings, StableDiffusion, Style};
use std::{fmt::Display, io::IsTerminal, io::Write, path::PathBuf, process::ExitCode};

/// A line to stderr. `eprintln!` would panic where the reader has gone, and what was made so far would be lost.
pub fn say(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

const NO_MEMORY: &str =
    "; there is not enough memory: use a smaller --size, or those of --low-memory, --batch, --count and --view-batch that --help names";

/// Ends an example: the last lines on stdout are the paths that it wrote; an error is one line on stderr and status 1.
pub fn report(outcome: Result<Vec<PathBuf>>) -> ExitCode {
    match outcome {
        Ok(paths) => {
            // `println!` would panic where the reader has gone, as `head` does.
            match paths.iter().try_for_each(|path| writeln!(std::io::stdout(), "{}", path.display())) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            // libtorch's messages may have several lines, and know no flags.
            let advice = match &error {
                Error::Memory { .. } => "",
                error if error.is_out_of_memory() => NO_MEMORY,
                _ => "",
            };
            say(format_args!("error: {}{advice}", error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")));
            ExitCode::FAILURE
        }
    }
}

/// What each example begins with. The library warns through `tracing`; here that goes to stderr.
pub fn begin() {
    keep_freed_memory();
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .init();
}

/// The size of the output: what a flag says, else the content's own, else the model's; cut to what the network can take.
pub fn output_size(model: &StableDiffusion, shared: &Shared, settings: &Settings, content: Option<&Tensor>) -> Result<(i64, i64)> {
    match (content, &shared.size) {
        (Some(content), None) => model.fit(image::size(content)?),
        _ => model.fit(settings.size.unwrap_or((512, 512))),
    }
}

/// Style pictures keep their aspect ratio; their area becomes the output's.
pub fn scaled_to_area(model: &StableDiffusion, pictures: &[Tensor], (height, width): (i64, i64)) -> Result<Vec<Tensor>> {
    let factor = model.vae().factor();
    pictures.iter().map(|picture| image::resize(picture, image::size_of_area(image::size(picture)?, height * width, factor)?)).collect()
}

/// What looks at the features, in the layers of the settings. A network that has not so many is found out here, before the run.
pub fn extractor<'m>(model: &'m StableDiffusion, settings: &Settings, size: (i64, i64)) -> Result<FeatureExtractor<&'m StableDiffusion>> {
    let mut extractor = model.extractor(size)?;
    extractor.layers = settings.layers.clone().unwrap_or(extractor.layers);
    let network = model.unet().self_attention_layers();
    if extractor.layers.end > network {
        return Err(Error::MissingLayers { layers: extractor.layers, network });
    }
    Ok(extractor)
}

/// The latents of styles and content.
pub fn references(model: &StableDiffusion, styles: &[Tensor], content: Option<&Tensor>) -> Result<References> {
    let styles = styles.iter().map(|picture| Ok(Style::new(model.encode(picture)?))).collect::<Result<Vec<_>>>()?;
    let mut references = References::styles(styles);
    references.content = content.map(|picture| model.encode(picture)).transpose()?;
    Ok(references)
}
