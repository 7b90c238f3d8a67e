//! Pictures of prompts, in the style of other pictures.
//!
//! `cargo run --release --example text_to_image -- --model DIR --prompt "a fox in the snow" --style painting.jpg`

mod common;

use attention_distillation::stable_diffusion::{Control, ControlNet};
use attention_distillation::{image, tch::Tensor, Error, GuidedSampler, Noise, Result, Scheduler, Settings, StableDiffusion};
use clap::Parser;
use std::{path::PathBuf, process::ExitCode};

/// Draws prompts in the style of one or several pictures; without --style this is plain text-to-image.
#[derive(Debug, Parser)]
struct Flags {
    /// What to draw; may be given several times, one picture each. A model without text encoder takes the empty prompt only
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// A file of prompts, one per line; empty lines and lines that begin with # are passed over
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What to avoid; default: the empty prompt, or zeros where the model's folder says so (SDXL)
    #[arg(long, value_name = "TEXT")]
    negative: Option<String>,
    /// How much more of the prompt than of the negative: 1 is none; default: 7.5, or 7 with SDXL
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    guidance: Option<f64>,
    /// A picture whose style to take; may be given several times
    #[arg(long, value_name = "FILE")]
    style: Vec<PathBuf>,
    /// A picture whose layout to keep, as strongly as --content-weight says
    #[arg(long, value_name = "FILE", requires = "style")]
    content: Option<PathBuf>,
    /// Leave the latents' statistics as they are instead of giving them the styles'
    #[arg(long)]
    no_adain: bool,
    /// Pictures of each prompt
    #[arg(long, value_name = "N", default_value = "1")]
    count: std::num::NonZeroUsize,
    /// Pictures made at once; each such batch begins with the seed of its first picture, --seed plus its number
    #[arg(long, value_name = "N", default_value = "4")]
    batch: std::num::NonZeroUsize,
    #[command(flatten)]
    control: ControlFlags,
    #[command(flatten)]
    shared: common::Shared,
}

#[derive(Debug, clap::Args)]
struct ControlFlags {
    /// A control picture as the ControlNet wants it: edges, depth, a pose
    #[arg(long = "control", value_name = "FILE", group = "control_picture", requires = "controlnet")]
    picture: Option<PathBuf>,
    /// A plain photo to make the control picture of; say how
    #[arg(long = "control-from", value_name = "FILE", group = "control_picture", requires_all = ["controlnet", "canny"])]
    from: Option<PathBuf>,
    /// By Canny's edges
    #[arg(long, requires = "from")]
    canny: bool,
    /// ControlNet folder in diffusers layout
    #[arg(long, value_name = "DIR", requires = "control_picture")]
    controlnet: Option<PathBuf>,
    /// How strongly it acts
    #[arg(long = "control-strength", value_name = "F", default_value_t = 1.0, allow_hyphen_values = true)]
    strength: f64,
    /// Where it begins to act, as a fraction of the steps
    #[arg(long = "control-start", value_name = "F", default_value_t = 0.0, allow_hyphen_values = true)]
    start: f64,
    /// Where it ends
    #[arg(long = "control-end", value_name = "F", default_value_t = 1.0, allow_hyphen_values = true)]
    end: f64,
}

fn main() -> ExitCode {
    common::show_warnings();
    common::report(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<Vec<PathBuf>> {
    let shared = &flags.shared;
    flags.over(Settings::text_to_image())?;
    common::check_outputs(shared)?;
    let prompts = flags.prompts()?;
    let content = flags.content.as_ref().map(image::load).transpose()?;
    let styles = flags.style.iter().map(image::load).collect::<Result<Vec<_>>>()?;
    let control = flags.control.picture()?;

    let mut model = common::open(shared)?;
    let task = if model.is_xl() { Settings::text_to_image_xl() } else { Settings::text_to_image() };
    let settings = flags.over(model.settings(task)?)?;
    let size = model.fit(settings.size.unwrap_or((512, 512)))?;
    let ddim = model.ddim(settings.steps)?;
    let control = control.map(|picture| flags.control.open(&mut model, &picture, size, ddim.timesteps())).transpose()?;
    let content = content.map(|picture| image::resize(&picture, size)).transpose()?;
    let styles = common::scaled_to_area(&model, &styles, size)?;
    let references = common::references(&model, &styles, content.as_ref())?;

    let batches = prompts.chunks(flags.batch.get()).map(|batch| {
        let mut guidance = model.guidance(batch, flags.negative.as_deref(), settings.guidance, size)?;
        if let Some(control) = &control {
            guidance.prompt = guidance.prompt.with_control(control.shallow_clone());
            guidance.negative = guidance.negative.map(|negative| negative.with_control(control.shallow_clone()));
        }
        Ok((batch.len(), guidance))
    });
    let batches = batches.collect::<Result<Vec<_>>>()?;
    model.drop_text_encoders()?;

    let files = common::files(shared, prompts.len());
    let mut results: Vec<Tensor> = vec![];
    for (count, guidance) in batches {
        let mut noise = Noise::seeded(shared.seed.wrapping_add(results.len() as u64));
        let start = model.noise(count as i64, size, &mut noise)?;
        let mut extractor = model.extractor(size)?;
        extractor.layers = settings.layers.clone().unwrap_or(extractor.layers);
        let references = references.try_map(|latents| Ok(latents.shallow_clone()))?;
        let run = GuidedSampler::new(extractor, ddim.clone(), guidance, references, start);
        let own: Vec<_> = files.iter().skip(results.len()).take(count).cloned().collect();
        let (pictures, whole) = common::follow(&mut run.with_settings(&settings)?.with_noise(noise), &model, shared, &own)?;
        common::save(&pictures, &own)?;
        results.extend((0..count as i64).map(|i| pictures.f_narrow(0, i, 1)).collect::<std::result::Result<Vec<_>, _>>()?);
        if !whole {
            break;
        }
    }
    common::sheet(shared, &content.iter().chain(&styles).collect::<Vec<_>>(), &results)?;
    Ok(files.into_iter().take(results.len()).collect())
}

impl Flags {
    /// The task's settings with the flags in their place.
    fn over(&self, settings: Settings) -> Result<Settings> {
        let mut settings = self.shared.over(settings)?;
        settings.guidance = self.guidance.unwrap_or(settings.guidance);
        settings.adain &= !self.no_adain;
        if self.style.is_empty() {
            settings.iterations = 0;
        }
        settings.check()?;
        Ok(settings)
    }

    /// All prompts, each as often as --count says.
    fn prompts(&self) -> Result<Vec<String>> {
        let mut prompts = self.prompt.clone();
        if let Some(path) = &self.prompts {
            let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.clone(), source })?;
            prompts.extend(text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned));
            if prompts.is_empty() {
                return Err(Error::Config { path: path.clone(), reason: "holds no prompt".into() });
            }
        }
        if prompts.is_empty() {
            prompts.push(String::new());
        }
        Ok(prompts.into_iter().flat_map(|prompt| vec![prompt; self.count.get()]).collect())
    }
}

impl ControlFlags {
    /// The control picture, made or as it is.
    fn picture(&self) -> Result<Option<Tensor>> {
        match (&self.picture, &self.from) {
            (Some(path), _) => image::load(path).map(Some),
            (None, Some(path)) => image::canny(&image::load(path)?, image::CANNY_LOW, image::CANNY_HIGH).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn open(&self, model: &mut StableDiffusion, picture: &Tensor, size: (i64, i64), timesteps: &[f64]) -> Result<Control> {
        let folder = self.controlnet.clone().unwrap_or_default();
        let net = model.add_controlnet(ControlNet::open(folder, model.device(), model.kind())?)?;
        model.control(net, picture, size)?.with_strength(self.strength)?.between(self.start, self.end, timesteps)
    }
}
