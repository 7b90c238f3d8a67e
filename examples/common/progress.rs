//! Running to the end, with a bar on a terminal and plain lines elsewhere, previews, and Ctrl-C.

use super::Shared;
use attention_distillation::{image, Denoiser, Distiller, Optimizer, Result, StableDiffusion};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::IsTerminal,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

static STOP: AtomicBool = AtomicBool::new(false);

/// Ctrl-C ends the run after its current step, a second one at once.
fn stop_on_ctrl_c() {
    let set = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
    if let Err(error) = set {
        tracing::warn!(%error, "Ctrl-C will end the program at once");
    }
}

/// All steps of a run, or as many as there are before Ctrl-C.
pub fn follow<D: Denoiser, O: Optimizer>(run: &mut Distiller<D, O>, model: &StableDiffusion, shared: &Shared) -> Result<()> {
    stop_on_ctrl_c();
    let steps = run.timesteps.len();
    let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(steps as u64));
    if let Some(bar) = &bar {
        // A template that does not parse leaves indicatif's own.
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta} left").unwrap_or_else(|_| ProgressStyle::default_bar()));
    }
    let started = Instant::now();
    while let Some(progress) = run.advance()? {
        let step = progress.step;
        // Asking for the loss makes a GPU wait, so not in every step of a long run.
        let shown = step == steps || step % (steps / 10).max(1) == 0;
        if shown || (bar.is_some() && model.device() == attention_distillation::tch::Device::Cpu) {
            run.check()?;
            let loss = progress.loss()?.map_or(String::new(), |loss| format!("loss {loss:.4}"));
            match &bar {
                Some(bar) => bar.set_message(loss),
                None => eprintln!("step {step}/{steps} {loss}, {:.0} s left", started.elapsed().as_secs_f64() / step as f64 * (steps - step) as f64),
            }
        }
        bar.iter().for_each(|bar| bar.set_position(step as u64));
        if shared.preview.is_some_and(|every| step % every == 0 && step < steps) {
            run.check()?;
            image::save(&model.decode(&run.latents)?, &shared.output)?;
        }
        if STOP.load(Ordering::Relaxed) && step < steps {
            run.check()?;
            eprintln!("stopped after step {step} of {steps}");
            break;
        }
    }
    bar.iter().for_each(ProgressBar::finish_and_clear);
    Ok(())
}
