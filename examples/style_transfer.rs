//! A content picture in the style of one or several others.
//!
//! `cargo run --release --example style_transfer -- --content photo.jpg --style painting.jpg`

mod common;

use attention_distillation::tch::Tensor;
use attention_distillation::{image, Distiller, Error, GuidedSampler, Noise, Result, Settings, StableDiffusion};
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
    /// First make a draft of half the size, as its previews are, then take the last fraction F of the timesteps at the whole size (above 0,
    /// at most 1; try 0.4): much the same picture in less time. For sizes of twice what the model is made for
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    coarse_to_fine: Option<f64>,
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
    flags.check_strength()?;
    let files = common::files(shared, 1);
    common::check_outputs(shared, &files)?;
    let content = flags.content.as_ref().map(image::load).transpose()?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;
    shared.warn_of_content_weight(content.is_some(), "give --content, whose layout it would keep");

    let model = common::open_without_text(shared)?;
    let settings = shared.over(model.settings(task)?)?;
    let size = common::output_size(&model, shared, &settings, content.as_ref())?;
    let inputs = Inputs { content, styles };
    let scaled = inputs.scaled(&model, size)?;
    let draft = flags.coarse_to_fine.map(|_| half(&model, size).and_then(|size| Ok((inputs.scaled(&model, size)?, size)))).transpose()?;
    drop(inputs);
    let result = if flags.method == Method::Sample {
        let references = common::references(&model, &scaled.styles, scaled.content.as_ref())?;
        let extractor = common::extractor(&model, &settings, size)?;
        let mut noise = Noise::seeded(shared.seed);
        let start = model.noise(1, size, &mut noise)?;
        let guidance = model.guidance(&[""], None, settings.guidance, size)?;
        let run = GuidedSampler::new(extractor, model.ddim(settings.steps)?, guidance, references, start, noise);
        flags.graphs.follow(run.with_settings(&settings)?, &model, shared, &files)?.0
    } else {
        let run = optimisation(&model, &settings, &scaled, size, shared.seed)?;
        match (flags.coarse_to_fine, draft) {
            (Some(strength), Some((inputs, (height, width)))) => {
                common::say(format_args!("a draft of {width}x{height} pixels first"));
                let first = optimisation(&model, &settings, &inputs, (height, width), shared.seed)?;
                let (draft, go_on) = flags.graphs.follow(first, &model, shared, &files)?;
                let draft = image::resize(&draft, size)?;
                if go_on {
                    // Worth keeping, should the rest fail.
                    match common::save(&draft, &files) {
                        Ok(()) => common::say(format_args!("the draft is in {}; the last steps at {}x{}", shared.output.display(), size.1, size.0)),
                        Err(error) => tracing::warn!(%error, "the draft was not kept"),
                    }
                    flags.graphs.follow(run.with_draft(&model.encode(&draft)?, strength)?, &model, shared, &files)?.0
                } else {
                    common::say("the picture is the draft, enlarged");
                    draft
                }
            }
            _ => flags.graphs.follow(run, &model, shared, &files)?.0,
        }
    };
    common::save(&result, &files)?;
    common::sheet(shared, &scaled.content.iter().chain(&scaled.styles).collect::<Vec<_>>(), &[result])?;
    Ok(files)
}

/// The pictures that were given.
struct Inputs {
    content: Option<Tensor>,
    styles: Vec<Tensor>,
}

impl Inputs {
    /// As a run of that size sees them.
    fn scaled(&self, model: &StableDiffusion, size: (i64, i64)) -> Result<Self> {
        let content = self.content.as_ref().map(|picture| image::resize(picture, size)).transpose()?;
        Ok(Self { content, styles: common::scaled_to_area(model, &self.styles, size)? })
    }
}

/// A quarter of the area, in about the same proportions.
fn half(model: &StableDiffusion, (height, width): (i64, i64)) -> Result<(i64, i64)> {
    model.fit(image::size_of_area((height, width), (height * width / 4).max(1), model.vae().factor())?)
}

/// From the content's latents, or from noise where there is none.
fn optimisation<'m>(
    model: &'m StableDiffusion,
    settings: &Settings,
    inputs: &Inputs,
    size: (i64, i64),
    seed: u64,
) -> Result<Distiller<&'m StableDiffusion>> {
    let references = common::references(model, &inputs.styles, inputs.content.as_ref())?;
    let (extractor, timesteps) = (common::extractor(model, settings, size)?, model.timesteps(settings.steps)?);
    let run = if references.content.is_some() {
        Distiller::style_transfer(extractor, timesteps, references, settings.content_weight)?
    } else {
        Distiller::new(extractor, timesteps, references, model.noise(1, size, &mut Noise::seeded(seed))?)
    };
    run.with_settings(settings)
}

impl Flags {
    /// Before the draft is drawn in vain.
    fn check_strength(&self) -> Result<()> {
        let reason = match self.coarse_to_fine {
            Some(_) if self.method == Method::Sample => "works with --method optimise alone; leave out --method sample".to_owned(),
            // From 1e-6 on a strength takes at least one step.
            Some(strength) if !(1e-6..=1.0).contains(&strength) => format!("{strength} of the steps are none, or more than all; use 0.4 or so"),
            _ => return Ok(()),
        };
        Err(Error::Argument { argument: "coarse-to-fine", reason })
    }
}
