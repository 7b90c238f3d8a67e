//! Queries that are alike where the content is: against patches of a second colour in what is one ground.

use crate::loss::{same_grid, serves};
use crate::scalar::WithNumber;
use crate::{attention::scaled_dot_product, Error, Features, LayerFeatures, References, Result};
use tch::Tensor;

/// How much more sharply than the network itself a place of the content looks for its like. By 1 small things in colours of their own are
/// averaged with what is around them; by 6 patches stay. Chosen with the bundled model.
const SHARPNESS: f64 = 3.0;

/// What the picture's layer `i` asks the styles with: `(1 - a) Q + a Attn(3 Qc, Kc, Q)`, or `Q` itself where there is no content.
pub(crate) fn smoothed(i: usize, layer: &LayerFeatures, references: &References<Features>) -> Result<Tensor> {
    let (a, query) = (references.smoothing, &layer.query);
    check_smoothing(a)?;
    let content = references.content.as_ref().and_then(|content| content.layers().nth(i));
    let (Some(content), true) = (content, a > 0.0) else { return Ok(query.shallow_clone()) };
    same_grid(layer, content)?;
    serves("content", &content.query, query.size4()?.0)?;
    let each = |of: &Tensor| -> Result<Tensor> { Ok(of.f_expand_as(query)?) };
    let mean = scaled_dot_product(&each(&content.query.times(SHARPNESS)?)?, &each(&content.key)?, query, None, content.scale)?;
    Ok(query.f_lerp(&mean, a)?)
}

/// From 0 to 1.
pub(crate) fn check_smoothing(a: f64) -> Result<()> {
    if (0.0..=1.0).contains(&a) {
        Ok(())
    } else {
        Err(Error::argument("smoothing", format!("{a} is not a number from 0 to 1")))
    }
}
