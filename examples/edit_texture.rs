//! A texture in an edited layout: SDEdit, held to the layout and to the texture.
//!
//! `cargo run --release --example edit_texture -- --layout edited.png --style texture.jpg --strength 0.6`

mod common;

use attention_distillation::{image, Error, GuidedSampler, Noise, Result, Task};
use clap::Parser;
use std::{path::PathBuf, process::ExitCode};

/// Turns a picture that was cut, pasted and smeared together from a texture into one that looks grown.
#[derive(Debug, Parser)]
struct Flags {
    /// The edited picture
    #[arg(long, value_name = "FILE")]
    layout: PathBuf,
    /// The texture that it is to be made of; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    style: Vec<PathBuf>,
    /// How much of the sampling is done anew: near 0 the layout stays as it is, at 1 it is under as much noise as a run begins with
    #[arg(long, value_name = "F", default_value_t = 0.6, allow_hyphen_values = true)]
    strength: f64,
    #[command(flatten)]
    graphs: common::GraphFlags,
    #[command(flatten)]
    shared: common::Shared,
}

fn main() -> ExitCode {
    common::begin();
    common::report(run(&Flags::parse()))
}

/// By sampling, with as much content loss as style transfer has.
const TASK: Task = Task::StyleTransferBySampling;

fn run(flags: &Flags) -> Result<Vec<PathBuf>> {
    let shared = &flags.shared;
    shared.over(TASK.settings())?;
    if !(flags.strength > 0.0 && flags.strength <= 1.0) {
        let reason = format!("{} of the steps are none, or more than all; use 0.6 or so", flags.strength);
        return Err(Error::Argument { argument: "strength", reason });
    }
    let files = common::files(shared, 1);
    common::check_outputs(shared, &files, flags.style.iter().chain([&flags.layout]))?;
    let layout = image::load(&flags.layout)?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;

    let model = common::open_without_text(shared)?;
    let mut own = model.settings(TASK);
    // Smoothing keeps the borders of what was pasted, which an edit is to melt.
    own.smoothing = 0.0;
    let settings = shared.over(own)?;
    let size = common::output_size(&model, shared, &settings, Some(&layout))?;
    let layout = image::resize(&layout, size)?;
    let styles = common::scaled_to_area(&model, &styles, size)?;
    let references = common::references(&model, &styles, Some(&layout))?;
    let latents = references.content.as_ref().map_or_else(|| model.encode(&layout), |latents| Ok(latents.shallow_clone()))?;

    let extractor = common::extractor(&model, &settings, size)?;
    let mut noise = Noise::seeded(shared.seed);
    let start = model.noise(1, size, &mut noise)?;
    let guidance = model.guidance(&[""], None, settings.guidance, size)?;
    let run = GuidedSampler::new(extractor, model.ddim(settings.steps)?, guidance, references, start, noise);
    let run = run.with_settings(&settings)?.edited(&latents, flags.strength)?;
    let (picture, _) = flags.graphs.follow(run, &model, shared, &files)?;
    common::save(&picture, &files)?;
    let inputs: Vec<_> = std::iter::once(&layout).chain(&styles).collect();
    common::sheet(shared, &inputs, &[picture])?;
    Ok(files)
}
