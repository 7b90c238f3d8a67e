//! Draws queries of like places together, against patches of a second colour within one ground.

use crate::loss::{same_grid, serves};
use crate::scalar::WithNumber;
use crate::{attention::scaled_dot_product, Error, LayerFeatures, Result};
use tch::Tensor;

/// How much more sharply than the network itself a place of the content looks for its like. With 1, small things in colours of their own
/// are averaged with what is around them. Chosen with the bundled model.
const SHARPNESS: f64 = 3.0;

/// What a layer of the picture asks the styles with: `(1 - a) Q + a Attn(3 Qc, Kc, Q)`. The text tokens of a joint attention are left as
/// they are.
pub(crate) fn smoothed(picture: &LayerFeatures, content: &LayerFeatures, a: f64) -> Result<Tensor> {
    same_grid(picture, content)?;
    let (query, prefix) = (&picture.query, picture.site.prefix);
    let (batch, _, tokens, width) = query.size4()?;
    serves("content", &content.query, batch)?;
    let (_, _, keys, _) = content.key.size4()?;
    if keys != tokens {
        let wanted = format!("for smoothing, a key for each of its {tokens} queries in layer {}", picture.site.index);
        return Err(Error::shape("content", wanted, content.key.size()));
    }
    let of_places = |of: &Tensor| -> Result<Tensor> { Ok(of.f_narrow(2, prefix, tokens - prefix)?.f_expand([batch, -1, -1, -1], false)?) };
    let asked = of_places(query)?;
    let scale = SHARPNESS * content.scale.unwrap_or_else(|| (width as f64).sqrt().recip());
    let mean = scaled_dot_product(&of_places(&content.query)?, &of_places(&content.key)?, &asked, None, Some(scale))?;
    let drawn = asked.f_add(&mean.f_sub(&asked)?.times(a)?)?;
    if prefix == 0 {
        return Ok(drawn);
    }
    Ok(Tensor::f_cat(&[query.f_narrow(2, 0, prefix)?, drawn], 2)?)
}

/// From 0 to 1.
pub(crate) fn check_smoothing(a: f64) -> Result<()> {
    if (0.0..=1.0).contains(&a) {
        Ok(())
    } else {
        Err(Error::argument("smoothing", format!("{a} is not a number from 0 to 1")))
    }
}
