//! The flags of a control picture, and what they come to.

use super::Shared;
use attention_distillation::stable_diffusion::{Control, ControlNet};
use attention_distillation::{image, tch::Tensor, Result, StableDiffusion};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct ControlFlags {
    /// A control picture as the ControlNet wants it: edges, depth, a pose
    #[arg(long = "control", value_name = "FILE", group = "control_picture", requires = "controlnet")]
    picture: Option<PathBuf>,
    /// A plain photo to make the control picture of; say how
    #[arg(long = "control-from", value_name = "FILE", group = "control_picture", requires_all = ["controlnet", "canny"])]
    from: Option<PathBuf>,
    /// By Canny's edges
    #[arg(long, requires = "from", conflicts_with = "picture")]
    canny: bool,
    /// ControlNet folder in diffusers layout
    #[arg(long, value_name = "DIR", requires = "control_picture")]
    controlnet: Option<PathBuf>,
    /// How strongly it acts
    #[arg(long = "control-strength", value_name = "F", default_value_t = 1.0, allow_hyphen_values = true, requires = "controlnet")]
    strength: f64,
    /// Where it begins to act, as a fraction of the steps
    #[arg(long = "control-start", value_name = "F", default_value_t = 0.0, allow_hyphen_values = true, requires = "controlnet")]
    start: f64,
    /// Where it ends
    #[arg(long = "control-end", value_name = "F", default_value_t = 1.0, allow_hyphen_values = true, requires = "controlnet")]
    end: f64,
}

impl ControlFlags {
    /// The picture that is read for it.
    pub fn file(&self) -> Option<&PathBuf> {
        self.picture.as_ref().or(self.from.as_ref())
    }

    /// The control picture or the photo and the ControlNet, where they are named: before the model, which takes longer to open.
    pub fn load(&self, shared: &Shared) -> Result<Option<(Tensor, ControlNet)>> {
        let (Some(picture), Some(folder)) = (self.file(), &self.controlnet) else { return Ok(None) };
        Control::check(self.strength, self.start, self.end)?;
        let picture = image::load(picture)?;
        let device = shared.device()?;
        Ok(Some((picture, ControlNet::open(folder, device, shared.kind(device)?)?)))
    }

    /// What was loaded, as the control picture that it is or becomes, and the control of it. A photo is scaled first, so that
    /// its edges are one pixel wide in the output.
    pub fn of(
        &self,
        model: &mut StableDiffusion,
        (picture, net): (Tensor, ControlNet),
        size: (i64, i64),
        timesteps: &[f64],
    ) -> Result<(Tensor, Control)> {
        let net = model.add_controlnet(net)?;
        let picture = match self.canny {
            true => image::canny(&image::resize(&picture, size)?, image::CANNY_LOW, image::CANNY_HIGH)?,
            false => picture,
        };
        let control = model.control(net, &picture, size)?.with_strength(self.strength)?.between(self.start, self.end, timesteps)?;
        Ok((picture, control))
    }
}
