//! Pictures of prompts, in the style of other pictures.
//!
//! `cargo run --release --example text_to_image -- --model DIR --prompt "a fox in the snow" --style painting.jpg`

mod common;

use attention_distillation::{image, tch::Device, tch::Tensor, GuidedSampler, Noise, Result, Scheduler, Settings, Task};
use clap::Parser;
use std::{path::PathBuf, process::ExitCode};

/// Draws prompts in the style of one or several pictures; without --style this is plain text-to-image.
#[derive(Debug, Parser)]
struct Flags {
    #[command(flatten)]
    prompts: common::PromptFlags,
    /// How much more of the prompt than of the negative: 1 is none; default: the model's own, else 7.5 (SDXL: 7)
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    guidance: Option<f64>,
    /// A picture whose style to take; may be given several times
    #[arg(long, value_name = "FILE")]
    style: Vec<PathBuf>,
    /// A picture whose layout to keep, as strongly as --content-weight says
    #[arg(long, value_name = "FILE", requires = "style")]
    content: Option<PathBuf>,
    /// Pictures made at once, default 4, or 1 with SDXL; each such batch begins with the seed of its first picture, --seed plus
    /// its number
    #[arg(long, value_name = "N")]
    batch: Option<std::num::NonZeroUsize>,
    #[command(flatten)]
    control: common::ControlFlags,
    #[command(flatten)]
    graphs: common::GraphFlags,
    #[command(flatten)]
    shared: common::Shared,
}

fn main() -> ExitCode {
    common::begin();
    common::report(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<Vec<PathBuf>> {
    let shared = &flags.shared;
    flags.over(Settings::text_to_image())?;
    let prompts = flags.prompts.all()?;
    let files = common::files(shared, prompts.len());
    common::check_outputs(shared, &files, flags.style.iter().chain(&flags.content).chain(flags.control.file()))?;
    let content = flags.content.as_ref().map(image::load).transpose()?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;
    shared.warn_without_content(content.is_some(), "give --content");
    if shared.adain && styles.is_empty() {
        tracing::warn!("--adain is without effect here; give --style, whose statistics the latents would get");
    }
    let of_descents = [("--iterations", shared.iterations.is_some()), ("--lr", shared.lr.is_some()), ("--layers", shared.layers.is_some())];
    for (flag, _) in of_descents.iter().filter(|(_, given)| *given && styles.is_empty()) {
        tracing::warn!("{flag} is without effect here; give --style, towards which each step would descend");
    }
    let control = flags.control.load(shared)?;

    let mut model = common::open(shared)?;
    let settings = flags.over(model.settings(Task::TextToImage))?;
    if settings.iterations == 0 {
        // There are no descents, so nothing is kept for them, and the memory for that need not be there.
        model.set_gradient_checkpointing(true);
    }
    let size = common::output_size(&model, shared, &settings, content.as_ref())?;
    let ddim = model.ddim(settings.steps)?;
    let control = control.map(|loaded| flags.control.of(&mut model, loaded, size, ddim.timesteps())).transpose()?;

    // All prompts first: then the text encoders can go.
    let at_once = flags.batch.map_or(if model.is_xl() { 1 } else { 4 }, std::num::NonZeroUsize::get);
    let batches = prompts.chunks(at_once).map(|batch| {
        let guidance = model.guidance(batch, flags.prompts.negative.as_deref(), settings.guidance, size)?;
        Ok((batch.len(), control.iter().fold(guidance, |guidance, (_, control)| guidance.with_control(control))))
    });
    let batches = batches.collect::<Result<Vec<_>>>()?;
    model.drop_text_encoders()?;

    let content = content.map(|picture| image::resize(&picture, size)).transpose()?;
    let styles = common::scaled_to_area(&model, &styles, size)?;
    let references = common::references(&model, &styles, content.as_ref())?;
    // Kept for the sheet only, and not on the GPU.
    let mut results: Vec<Tensor> = vec![];
    let mut done = 0;
    for (count, guidance) in batches {
        let mut noise = Noise::seeded(shared.seed.wrapping_add(done as u64));
        let start = model.noise(count as i64, size, &mut noise)?;
        let extractor = common::extractor(&model, &settings, size)?;
        let references = references.shallow_clone();
        let run = GuidedSampler::new(extractor, ddim.clone(), guidance, references, start, noise);
        let own: Vec<_> = files.iter().skip(done).take(count).cloned().collect();
        let (pictures, go_on) = flags.graphs.follow(run.with_settings(&settings)?, &model, shared, &own)?;
        common::save(&pictures, &own)?;
        done += count;
        if shared.sheet.is_some() {
            results.push(pictures.f_to_device(Device::Cpu)?);
        }
        if !go_on {
            break;
        }
    }
    let inputs = content.iter().chain(control.iter().map(|(picture, _)| picture)).chain(&styles);
    common::sheet(shared, &inputs.collect::<Vec<_>>(), &results)?;
    Ok(files.into_iter().take(done).collect())
}

impl Flags {
    /// The task's settings with the flags in their place.
    fn over(&self, settings: Settings) -> Result<Settings> {
        let mut settings = self.shared.over(settings)?;
        settings.guidance = self.guidance.unwrap_or(settings.guidance);
        if self.style.is_empty() {
            settings.iterations = 0;
        }
        settings.check()?;
        Ok(settings)
    }
}
