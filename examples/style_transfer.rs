//! A content picture in the style of one or several others.
//!
//! `cargo run --release --example style_transfer -- --content photo.jpg --style painting.jpg`

mod common;

use attention_distillation::tch::Tensor;
use attention_distillation::{image, Distiller, GuidedSampler, Noise, Result, Settings, StableDiffusion, Task};
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
    colours: common::ColourFlags,
    #[command(flatten)]
    draft: common::DraftFlags,
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
    common::begin();
    common::report(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<Vec<PathBuf>> {
    let shared = &flags.shared;
    let task = match flags.method {
        Method::Optimise => Task::StyleTransfer,
        Method::Sample => Task::StyleTransferBySampling,
    };
    shared.over(task.settings())?;
    flags.draft.check(flags.method == Method::Optimise)?;
    let files = common::files(shared, 1);
    common::check_outputs(shared, &files, flags.content.iter().chain(&flags.style))?;
    let content = flags.content.as_ref().map(image::load).transpose()?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;
    shared.warn_without_content(content.is_some(), "give --content");
    flags.colours.check(content.is_some())?;

    let model = common::open_without_text(shared)?;
    let settings = shared.over(model.settings(task))?;
    let size = common::output_size(&model, shared, &settings, content.as_ref())?;
    let transfer = Transfer { flags, model: &model, settings: &settings, files: &files };
    let inputs = transfer.scaled(content.as_ref(), &styles, size)?;
    let small = match flags.draft.half_size(&model, size)? {
        Some((half, strength)) => Some((transfer.scaled(content.as_ref(), &styles, half)?, strength)),
        None => None,
    };
    drop((content, styles));
    let result = match (flags.method, small) {
        (Method::Sample, _) => transfer.sampled(&inputs)?,
        (Method::Optimise, None) => flags.graphs.follow(transfer.optimisation(&inputs)?, &model, shared, &files)?.0,
        (Method::Optimise, Some((small, strength))) => transfer.coarse_to_fine(&inputs, &small, strength)?,
    };
    let result = flags.colours.of_result(result, inputs.content.as_ref())?;
    common::save(&result, &files)?;
    common::sheet(shared, &inputs.content.iter().chain(&inputs.styles).collect::<Vec<_>>(), &[result])?;
    Ok(files)
}

/// The pictures that were given, as a run of `size` sees them.
struct Inputs {
    content: Option<Tensor>,
    styles: Vec<Tensor>,
    size: (i64, i64),
}

struct Transfer<'m> {
    flags: &'m Flags,
    model: &'m StableDiffusion,
    settings: &'m Settings,
    files: &'m [PathBuf],
}

impl<'m> Transfer<'m> {
    fn scaled(&self, content: Option<&Tensor>, styles: &[Tensor], size: (i64, i64)) -> Result<Inputs> {
        let content = content.map(|picture| image::resize(picture, size)).transpose()?;
        let styles = self.flags.colours.of_styles(common::scaled_to_area(self.model, styles, size)?, content.as_ref())?;
        Ok(Inputs { content, styles, size })
    }

    fn sampled(&self, inputs: &Inputs) -> Result<Tensor> {
        let Self { flags, model, settings, files } = self;
        let references = common::references(model, &inputs.styles, inputs.content.as_ref())?;
        let extractor = common::extractor(model, settings, inputs.size)?;
        let mut noise = Noise::seeded(flags.shared.seed);
        let start = model.noise(1, inputs.size, &mut noise)?;
        let guidance = model.guidance(&[""], None, settings.guidance, inputs.size)?;
        let run = GuidedSampler::new(extractor, model.ddim(settings.steps)?, guidance, references, start, noise);
        Ok(flags.graphs.follow(run.with_settings(settings)?, model, &flags.shared, files)?.0)
    }

    /// From the content's latents, or from noise where there is none.
    fn optimisation(&self, inputs: &Inputs) -> Result<Distiller<&'m StableDiffusion>> {
        let Self { flags, model, settings, .. } = self;
        let references = common::references(model, &inputs.styles, inputs.content.as_ref())?;
        let (extractor, timesteps) = (common::extractor(model, settings, inputs.size)?, model.timesteps(settings.steps)?);
        let run = if references.content.is_some() {
            Distiller::style_transfer(extractor, timesteps, references, settings.content_weight)?
        } else {
            Distiller::new(extractor, timesteps, references, model.noise(1, inputs.size, &mut Noise::seeded(flags.shared.seed))?)
        };
        run.with_settings(settings)
    }

    fn coarse_to_fine(&self, inputs: &Inputs, small: &Inputs, strength: f64) -> Result<Tensor> {
        let Self { flags, model, files, .. } = self;
        let run = self.optimisation(inputs)?;
        common::say(format_args!("a draft of {}x{} pixels first", small.size.1, small.size.0));
        let (draft, go_on) = flags.graphs.follow(self.optimisation(small)?, model, &flags.shared, files)?;
        let draft = image::resize(&draft, inputs.size)?;
        if !go_on {
            common::say("the picture is the draft, enlarged");
            return Ok(draft);
        }
        common::keep_draft(&draft, inputs.size, &flags.shared, files);
        Ok(flags.graphs.follow(run.with_draft(&model.encode(&draft)?, strength)?, model, &flags.shared, files)?.0)
    }
}
