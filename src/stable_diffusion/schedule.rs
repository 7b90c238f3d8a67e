//! A schedule from any diffusers `scheduler_config.json`.

use super::config::Config;
use crate::{BetaSchedule, Ddim, DdimConfig, Prediction, Result, Spacing};
use serde_json::json;
use std::path::Path;

/// The schedule that a `scheduler_config.json` describes, whichever class it names: SD 1.5 ships PNDM's, SDXL Euler's.
/// Keys that are absent have the defaults of diffusers' DDIM, as its `from_config` gives them.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for values that are unknown or out of range, and for schedules without betas (EDM's, flow matching's).
pub fn scheduler_config(path: impl AsRef<Path>) -> Result<DdimConfig> {
    let config = Config::open(path.as_ref())?;
    config.require(&[("thresholding", json!(false))])?;
    // Schedules of another kind of model, which have no betas; DDIM on default ones would draw wrong pictures without a word.
    let class = config.text("_class_name", "")?;
    if class.starts_with("EDM") || class.starts_with("FlowMatch") {
        return Err(config.bad(format!(
            "`_class_name` is `{class}`: the model was not trained on steps of noise as Stable Diffusion's are, and is not supported"
        )));
    }
    let count = |key: &str, default: i64| config.count(key, default).map(|n| usize::try_from(n).unwrap_or(1));
    let beta_schedule = if config.get("trained_betas").is_some() {
        BetaSchedule::Trained(config.numbers("trained_betas")?)
    } else {
        match config.text("beta_schedule", "linear")? {
            "linear" => BetaSchedule::Linear,
            "scaled_linear" => BetaSchedule::ScaledLinear,
            "squaredcos_cap_v2" => BetaSchedule::SquaredCosine,
            other => {
                return Err(
                    config.bad(format!("`beta_schedule` is `{other}`, which is not supported; supported: linear, scaled_linear, squaredcos_cap_v2"))
                )
            }
        }
    };
    let predictions = [("epsilon", Prediction::Epsilon), ("v_prediction", Prediction::Velocity), ("sample", Prediction::Sample)];
    let spacings = [("leading", Spacing::Leading), ("trailing", Spacing::Trailing), ("linspace", Spacing::Linspace)];
    let offset = config.number("steps_offset", 0.0)?;
    if !(0.0..=1e6).contains(&offset) || offset.fract() != 0.0 {
        return Err(config.bad(format!("`steps_offset` is {offset}; it must be a whole number of at least 0")));
    }
    let clip = config.flag("clip_sample", true)?;
    let schedule = DdimConfig {
        train_timesteps: count("num_train_timesteps", 1000)?,
        beta_start: config.number("beta_start", 0.0001)?,
        beta_end: config.number("beta_end", 0.02)?,
        beta_schedule,
        prediction: config.choice("prediction_type", "epsilon", &predictions)?,
        spacing: config.choice("timestep_spacing", "leading", &spacings)?,
        steps_offset: offset as usize,
        set_alpha_to_one: config.flag("set_alpha_to_one", true)?,
        clip_sample: clip.then(|| config.positive("clip_sample_range", 1.0)).transpose()?,
        rescale_zero_snr: config.flag("rescale_betas_zero_snr", false)?,
    };
    // What does not make one step makes none: better said here, where the file is known.
    Ddim::new(&schedule, 1).map_err(|error| config.bad(error.to_string()))?;
    Ok(schedule)
}
