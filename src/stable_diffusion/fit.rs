//! Which sizes the networks can take, and whether their memory is there.

use super::block::Layer;
use super::{StableDiffusion, UNet};
use crate::{memory, References, Result, Windows};
use tch::{Device, Kind};

/// A step holds the U-Net's activations for its backward pass: as much as this many of its first layer's. Measured on
/// the bundled model, 3.7 kB per pixel from 128 to 512 px; deeper networks hold more.
const ACTIVATIONS: i64 = 300;

/// With gradient checkpointing: the layers' inputs, and at most, as gradients go through a layer, that one's own activations. Measured on the
/// bundled model at 512 px, 1.2 kB per pixel; between the passes a fifth of what is held without.
const CHECKPOINTED: i64 = 100;

/// An expansion's canvas as latents (the sum of views and the steps before), and the picture while its tiles are joined and
/// written, in f32 numbers per pixel. Measured on the bundled model, 10 from 1024x512 to 4096x512 pixels.
const CANVAS: i64 = 12;

impl StableDiffusion {
    /// The largest size within `(height, width)` pixels that the networks can take.
    ///
    /// # Errors
    /// A size that is empty, absurd, or beyond this machine's memory.
    pub fn fit(&self, size: (i64, i64)) -> Result<(i64, i64)> {
        self.fit_batch(1, size)
    }

    pub(super) fn fit_batch(&self, batch: i64, size: (i64, i64)) -> Result<(i64, i64)> {
        let (height, width) = self.vae.fit(size)?;
        let factor = self.vae.factor();
        if self.device == Device::Cpu {
            let needed = self.activations(batch, (height / factor, width / factor));
            let (what, advice) = match batch {
                ..=1 => (format!("a picture of {width}x{height}"), "choose a smaller size"),
                _ => (format!("{batch} pictures of {width}x{height} at once"), "make fewer at once, or smaller ones"),
            };
            memory::check(needed, what, self.or_checkpointing(advice))?;
        }
        Ok((height, width))
    }

    /// Whether a picture of `(height, width)` pixels can be made by these windows: whether a CPU's memory holds a batch of views,
    /// what regions and weights of styles add to their attention, and the picture. A GPU says so itself.
    ///
    /// # Errors
    /// A size that is empty, absurd, or as [`Windows::check`]; more memory than is free.
    pub fn check_windows(&self, windows: &Windows, size: (i64, i64), references: &References) -> Result<()> {
        let (height, width) = self.vae.fit(size)?;
        let factor = self.vae.factor();
        let canvas = (height / factor, width / factor);
        let views = windows.over(self.seamless, canvas).0.views(canvas)?.take(windows.batch).count();
        if self.device != Device::Cpu {
            return Ok(());
        }
        let views = i64::try_from(views).unwrap_or(i64::MAX);
        let window = (windows.size.min(canvas.0), windows.size.min(canvas.1));
        let picture = height.saturating_mul(width).saturating_mul(4 * CANVAS);
        let needed = [self.activations(views, window), self.bias(views, window, references), picture];
        let what = format!("an expansion to {width}x{height} in batches of {views} windows of {}x{} latents", window.1, window.0);
        memory::check(needed.into_iter().fold(0, i64::saturating_add), what, self.or_checkpointing("choose smaller batches or windows"))
    }

    /// What else would help.
    fn or_checkpointing(&self, advice: &str) -> String {
        let also = if self.checkpointing {
            ""
        } else {
            ", or keep less by gradient checkpointing (`set_gradient_checkpointing`; in the examples --low-memory)"
        };
        format!("{advice}{also}")
    }

    /// Bytes that a descent holds, of so many pictures of `(height, width)` latents.
    fn activations(&self, batch: i64, (height, width): (i64, i64)) -> i64 {
        let activations = if self.checkpointing { CHECKPOINTED } else { ACTIVATIONS };
        self.unet.activation_bytes(height.saturating_mul(width).saturating_mul(batch)).saturating_mul(activations)
    }

    /// Bytes of what is added to the scores of the picture's tokens for the styles', in the finest layer; and once more of them on
    /// the way there.
    fn bias(&self, views: i64, (height, width): (i64, i64), references: &References) -> i64 {
        let plain = references.labels.is_none() && references.styles.iter().all(|style| style.weight == 1.0);
        let Some(scale) = finest_attention(&self.unet).filter(|_| !plain) else { return 0 };
        let tokens = |height: i64, width: i64| ((height + scale - 1) / scale).saturating_mul((width + scale - 1) / scale);
        let styles = references.styles.iter().filter_map(|style| match style.of.size().as_slice() {
            &[_, _, height, width] => Some(tokens(height, width)),
            _ => None,
        });
        let bytes = |kind: Kind| i64::try_from(kind.elt_size_in_bytes()).unwrap_or(4);
        let each = tokens(height, width).saturating_mul(styles.sum()).saturating_mul(2 * bytes(self.kind));
        each.saturating_mul(views)
    }
}

/// How many latents along a side a token of the finest layer with attention has; none without attention.
fn finest_attention(unet: &UNet) -> Option<i64> {
    let mut scale = 1;
    let scales = unet.layers().filter_map(|layer| {
        match layer {
            Layer::Downsample(_) => scale *= 2,
            Layer::Upsample(_) => scale /= 2,
            Layer::Block { .. } => {}
        }
        (layer.self_attentions() > 0).then_some(scale)
    });
    scales.min()
}
