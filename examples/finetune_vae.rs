//! An autoencoder whose decoder has learnt one picture's texture.
//!
//! `cargo run --release --example finetune_vae -- --image texture.png --output tuned`, then `--vae tuned` with the other examples.

mod common;

use attention_distillation::stable_diffusion::{AutoencoderKl, DecoderTuning, TuningConfig};
use attention_distillation::{device, image, tch::Kind, Error, Result};
use clap::Parser;
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

/// Tunes a model's decoder to a picture, so that results in its style keep its fine texture.
#[derive(Debug, Parser)]
struct Flags {
    /// The picture to learn
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// The folder to write, for --vae of the other examples
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Steps of Adam
    #[arg(long, value_name = "N", default_value_t = TuningConfig::default().epochs)]
    epochs: usize,
    /// Adam's learning rate
    #[arg(long, value_name = "F", default_value_t = TuningConfig::default().learning_rate, allow_hyphen_values = true)]
    lr: f64,
    /// Model folder in diffusers layout, or a Hugging Face repo id (with the `hub` feature); default: the bundled model
    #[arg(long, value_name = "DIR|HUB-ID", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/mini"), hide_default_value = true)]
    model: String,
    /// Autoencoder folder to begin with instead of the model's own
    #[arg(long, value_name = "DIR")]
    vae: Option<PathBuf>,
    /// Size in pixels to scale the picture to; default: its own, rounded down to what the network can take
    #[arg(long, value_name = "WxH", value_parser = common::size)]
    size: Option<common::Size>,
    /// cpu, cuda or cuda:N; default: CUDA where there is a working one, else the CPU
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Also write the picture, and what the decoder makes of it before and after, side by side
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
}

fn main() -> ExitCode {
    common::begin();
    common::report(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<Vec<PathBuf>> {
    let mut config = TuningConfig::default();
    (config.epochs, config.learning_rate) = (flags.epochs, flags.lr);
    config.check()?;
    AutoencoderKl::check_writable(&flags.output)?;
    flags.check_model_stays()?;
    flags.sheet.as_ref().map_or(Ok(()), image::check_writable)?;
    common::check_inputs_stay(flags.sheet.iter(), [&flags.image])?;
    flags.size.map_or(Ok(()), |common::Size(height, width)| image::check_size((height, width)))?;
    let device = flags.device.as_deref().map_or_else(|| Ok(device::best()), device::parse)?;
    let picture = image::load(&flags.image)?;

    let folder = match &flags.vae {
        Some(folder) => folder.clone(),
        None => common::folder(&flags.model, Kind::Float)?.join("vae"),
    };
    let vae = AutoencoderKl::open(folder, device, Kind::Float)?;
    let (height, width) = flags.size.map_or_else(|| image::size(&picture), |common::Size(height, width)| Ok((height, width)))?;
    let picture = image::resize(&picture, vae.fit((height, width))?)?;
    let mut tuning = DecoderTuning::new(vae, &picture, config)?;

    common::stop_on_ctrl_c();
    let before = tuning.psnr()?;
    let decoded = flags.sheet.as_ref().map(|_| tuning.decoded()).transpose()?;
    let outcome = tune(&mut tuning);
    let outcome = outcome.and(tuning.check());
    // What was learnt is kept before anything is said, and whatever else went wrong.
    if tuning.epoch() > 0 {
        let kept = tuning.vae().save(&flags.output);
        if let (Err(_), Ok(())) = (&outcome, &kept) {
            common::say(format_args!("epoch {} of {} is kept in {}", tuning.epoch(), flags.epochs, flags.output.display()));
        }
        outcome.and(kept)?;
    } else {
        outcome?;
    }
    // `println!` would panic where the reader has gone; that the folder was written is what counts.
    let _ = writeln!(std::io::stdout(), "PSNR {before:.2} dB before, {:.2} dB after", tuning.psnr()?);
    if let (Some(file), Some(before)) = (&flags.sheet, &decoded) {
        image::save(&image::sheet(&[&picture, before, &tuning.decoded()?])?, file)?;
    }
    Ok(vec![flags.output.clone()])
}

impl Flags {
    /// Whether a model would keep the autoencoder that it has, which one that knows a single picture is no substitute for.
    fn check_model_stays(&self) -> Result<()> {
        // The folder of a model, be it the one that is read or another.
        let of_model = |folder: &Path| folder.parent().is_some_and(|model| model.join("model_index.json").exists() || model.join("unet").is_dir());
        if self.output.canonicalize().is_ok_and(|output| output.join("config.json").exists() && of_model(&output)) {
            let reason = "is a model's own autoencoder, which would be lost; name another folder, and give that to --vae".into();
            return Err(Error::Config { path: self.output.clone(), reason });
        }
        Ok(())
    }
}

/// All epochs, or as many as there are before Ctrl-C.
fn tune(tuning: &mut DecoderTuning<AutoencoderKl>) -> Result<()> {
    let started = Instant::now();
    while let Some(progress) = tuning.advance()? {
        let (epoch, epochs) = (progress.epoch, progress.epochs);
        if epoch == epochs || epoch % (epochs / 10).max(1) == 0 {
            let left = started.elapsed().as_secs_f64() / epoch as f64 * (epochs - epoch) as f64;
            common::say(format_args!("epoch {epoch}/{epochs} loss {:.4} PSNR {:.2} dB, {left:.0} s left", progress.loss, progress.psnr));
        }
        if common::stopped() && epoch < epochs {
            common::say(format_args!("stopped after epoch {epoch} of {epochs}"));
            break;
        }
    }
    Ok(())
}
