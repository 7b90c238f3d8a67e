//! A content picture in the style of one or several others.
//!
//! `cargo run --release --example style_transfer -- --content photo.jpg --style painting.jpg`

mod common;

use attention_distillation::{image, Distiller, References, Result, Settings, Style};
use clap::{Parser, ValueEnum};
use std::{path::PathBuf, process::ExitCode};

/// Moves the style of one or several pictures onto a content picture.
#[derive(Debug, Parser)]
struct Flags {
    /// The picture whose layout to keep; without one the run starts from noise
    #[arg(long, value_name = "FILE")]
    content: Option<PathBuf>,
    /// A picture whose style to take; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    style: Vec<PathBuf>,
    /// Optimise the content's latents, or sample towards the style
    #[arg(long, value_enum, default_value_t = Method::Optimise)]
    method: Method,
    #[command(flatten)]
    shared: common::Shared,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Method {
    Optimise,
    Sample,
}

fn main() -> ExitCode {
    common::show_warnings();
    common::report(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<PathBuf> {
    let shared = &flags.shared;
    if flags.method == Method::Sample {
        return Err(common::not_yet("--method", "sample", "use --method optimise"));
    }
    shared.over(Settings::style_transfer())?;
    common::check_outputs(shared)?;
    let content = flags.content.as_ref().map(image::load).transpose()?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;

    let model = common::open(shared)?;
    let settings = shared.over(model.settings(Settings::style_transfer())?)?;
    // The content's own size, unless a flag says otherwise.
    let natural = match (&content, shared.size) {
        (Some(content), None) => Some(image::size(content)?),
        _ => settings.size,
    };
    let (height, width) = model.fit(natural.unwrap_or((512, 512)))?;

    let content = content.map(|picture| image::resize(&picture, (height, width))).transpose()?;
    let factor = model.vae().factor();
    let styles = styles.iter().map(|picture| image::resize(picture, image::size_of_area(image::size(picture)?, height * width, factor)?));
    let styles = styles.collect::<Result<Vec<_>>>()?;

    let mut references = References::styles(styles.iter().map(|picture| Ok(Style::new(model.encode(picture)?))).collect::<Result<Vec<_>>>()?);
    references.content = content.as_ref().map(|picture| model.encode(picture)).transpose()?;

    let mut extractor = model.extractor((height, width))?;
    extractor.layers = settings.layers.clone().unwrap_or(extractor.layers);
    let timesteps = model.timesteps(settings.steps)?;
    let run = if references.content.is_some() {
        Distiller::style_transfer(extractor, timesteps, references, settings.content_weight)?
    } else {
        let noise = model.noise(1, (height, width), shared.seed)?;
        Distiller::new(extractor, timesteps, references, noise)
    };
    let mut run = run.with_settings(&settings)?;
    common::follow(&mut run, &model, shared)?;

    let result = model.decode(&run.latents)?;
    let inputs: Vec<_> = content.iter().chain(&styles).collect();
    common::write(shared, &inputs, &result)
}
