//! A content picture in the style of one or several others.
//!
//! `cargo run --release --example style_transfer -- --content photo.jpg --style painting.jpg`

mod common;

use attention_distillation::{image, Distiller, GuidedSampler, Noise, Result, Settings};
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
    /// Optimise the content's latents, or sample from noise towards style and content
    #[arg(long, value_enum, default_value_t = Method::Optimise)]
    method: Method,
    #[command(flatten)]
    graphs: common::GraphFlags,
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

fn run(flags: &Flags) -> Result<Vec<PathBuf>> {
    let shared = &flags.shared;
    let task = match flags.method {
        Method::Optimise => Settings::style_transfer(),
        Method::Sample => Settings::style_transfer_by_sampling(),
    };
    shared.over(task.clone())?;
    let files = common::files(shared, 1);
    common::check_outputs(shared, &files)?;
    let content = flags.content.as_ref().map(image::load).transpose()?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;
    shared.warn_of_content_weight(content.is_some(), "give --content, whose layout it would keep");

    let model = common::open_without_text(shared)?;
    let settings = shared.over(model.settings(task)?)?;
    let size = common::output_size(&model, shared, &settings, content.as_ref())?;
    let content = content.map(|picture| image::resize(&picture, size)).transpose()?;
    let styles = common::scaled_to_area(&model, &styles, size)?;
    let references = common::references(&model, &styles, content.as_ref())?;

    let extractor = common::extractor(&model, &settings, size)?;
    let mut noise = Noise::seeded(shared.seed);
    let (result, _) = if flags.method == Method::Sample {
        let start = model.noise(1, size, &mut noise)?;
        let guidance = model.guidance(&[""], None, settings.guidance, size)?;
        let run = GuidedSampler::new(extractor, model.ddim(settings.steps)?, guidance, references, start, noise);
        flags.graphs.follow(run.with_settings(&settings)?, &model, shared, &files)?
    } else {
        let timesteps = model.timesteps(settings.steps)?;
        let run = if references.content.is_some() {
            Distiller::style_transfer(extractor, timesteps, references, settings.content_weight)?
        } else {
            Distiller::new(extractor, timesteps, references, model.noise(1, size, &mut noise)?)
        };
        flags.graphs.follow(run.with_settings(&settings)?, &model, shared, &files)?
    };
    common::save(&result, &files)?;
    common::sheet(shared, &content.iter().chain(&styles).collect::<Vec<_>>(), &[result])?;
    Ok(files)
}
