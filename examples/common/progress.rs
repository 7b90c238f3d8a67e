//! Running to the end, with a bar on a terminal and plain lines elsewhere, previews, and Ctrl-C.

use super::{save, say, Run, Shared};
use attention_distillation::tch::{Device, Kind, Tensor};
use attention_distillation::{Result, StableDiffusion};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::IsTerminal,
    path::PathBuf,
    sync::{
        atomic::{AtomicBool, Ordering},
        Once,
    },
    time::Instant,
};

static STOP: AtomicBool = AtomicBool::new(false);

/// Ctrl-C ends the run after its current step, a second one at once. A handler can be set once only, runs may be several.
pub fn stop_on_ctrl_c() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let set = ctrlc::set_handler(|| {
            if STOP.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
        if let Err(error) = set {
            tracing::warn!(%error, "Ctrl-C will end the program at once");
        }
    });
}

/// Whether Ctrl-C was pressed.
pub fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// All steps of a run, or as many as there are before Ctrl-C; previews go to the files. Returns the pictures, and whether to
/// go on with another run.
pub fn follow(run: &mut dyn Run, model: &StableDiffusion, shared: &Shared, files: &[PathBuf]) -> Result<(Tensor, bool)> {
    stop_on_ctrl_c();
    // An edit begins later than with the first step.
    let (first, steps) = (run.step(), run.steps());
    let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(steps as u64));
    if let Some(bar) = &bar {
        // A template that does not parse leaves indicatif's own.
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta} left").unwrap_or_else(|_| ProgressStyle::default_bar()));
    }
    bar.iter().for_each(|bar| {
        bar.set_position(first as u64);
        bar.reset_eta();
    });
    if bar.is_none() {
        wait_for(run.latents())?;
        say(format_args!("step {first}/{steps}"));
    }
    let started = Instant::now();
    while let Some(progress) = run.advance()? {
        let step = progress.step;
        // Asking for the loss makes a GPU wait, so not in every step of a long run.
        let shown = step == steps || step % (steps / 10).max(1) == 0;
        if shown || (bar.is_some() && model.device() == Device::Cpu) {
            run.check()?;
            let loss = progress.loss()?.map_or(String::new(), |loss| format!(" loss {}", six_digits(loss)));
            let left = started.elapsed().as_secs_f64() / (step - first) as f64 * (steps - step) as f64;
            match &bar {
                Some(bar) => bar.set_message(loss.trim_start().to_owned()),
                None => say(format_args!("step {step}/{steps}{loss}, {left:.0} s left")),
            }
        }
        bar.iter().for_each(|bar| bar.set_position(step as u64));
        if shared.preview.is_some_and(|every| step % every == 0 && step < steps) {
            run.check()?;
            // The run is worth more than a look at it.
            if let Err(error) = model.decode(run.latents()).and_then(|pictures| save(&pictures, files)) {
                tracing::warn!(%error, "no preview of step {step}");
            }
        }
        if stopped() && step < steps {
            run.check()?;
            say(format_args!("stopped after step {step} of {steps}"));
            break;
        }
    }
    bar.iter().for_each(ProgressBar::finish_and_clear);
    Ok((model.decode(run.latents())?, !stopped()))
}

/// All work given to the latents' device so far: what made ready is not to count as a step.
fn wait_for(latents: &Tensor) -> Result<()> {
    if latents.device() != Device::Cpu {
        latents.f_sum(Kind::Float)?.f_double_value(&[])?;
    }
    Ok(())
}

/// A loss with six significant digits, enough to compare it with another program's.
fn six_digits(loss: f64) -> String {
    let whole_digits = if loss == 0.0 { 1 } else { (loss.abs().log10().floor() as i64).saturating_add(1) };
    let decimals = usize::try_from(6 - whole_digits).unwrap_or(0);
    format!("{loss:.decimals$}")
}
