//! What the picture's labels see of the styles' tokens, all side by side.

use super::{seen, Tables};
use crate::scalar::{integer, number, WithNumber};
use crate::{Features, LayerFeatures, References, Result};
use tch::{Device, Kind, Tensor};

/// Stands for `ln 0`: its exponential is exactly 0. Kernels that go through the keys in blocks may meet a block of nothing but
/// `ln 0`, and would subtract infinity from infinity.
const NEVER: f64 = -3e4;

/// In f32; a column for each of the styles' tokens.
pub(super) struct Columns {
    /// `sum_m W(l, m) S(m, j)`, `(1 or batch, labels of the picture, columns)`; 0 for tokens before a style's grid.
    seen: Tensor,
    /// 1 for tokens before a style's grid, which have no label and are seen by all, else 0: `(1, 1, columns)`.
    text: Tensor,
    any_text: bool,
    /// `ln w`, `(1, 1, columns)`; none where all are 0.
    pub(super) weights: Option<Tensor>,
}

impl Columns {
    /// Of one layer.
    ///
    /// # Errors
    /// As [`seen`].
    pub(super) fn new(references: &References<Features>, tables: &Tables, layers: &[&LayerFeatures], device: Device) -> Result<Self> {
        let row = |length: i64, value: f64| -> Result<Tensor> {
            Ok(number(value)?.f_to_kind(Kind::Float)?.f_to_device(device)?.f_expand([1, 1, length], false)?)
        };
        let (mut parts, mut text, mut weights, mut batch, mut any_text) = (vec![], vec![], vec![], 1, false);
        for ((style, table), there) in references.counted().zip(&tables.styles).zip(layers) {
            let (_, _, keys, _) = there.key.size4()?;
            let part = seen(style.labels.as_ref(), &table.dense(Kind::Float, device)?, &there.site, keys)?;
            let (maps, _, tokens) = part.size3()?;
            let before = keys - tokens;
            text.extend([row(before, 1.0)?, row(tokens, 0.0)?]);
            weights.push(row(keys, style.weight.ln())?);
            parts.push(if before > 0 {
                Tensor::f_cat(&[part.f_narrow(2, 0, 1)?.f_zeros_like()?.f_expand([-1, -1, before], false)?, part], 2)?
            } else {
                part
            });
            (batch, any_text) = (maps.max(batch), any_text || before > 0);
        }
        let parts = parts.iter().map(|part| Ok(part.f_expand([batch, -1, -1], false)?)).collect::<Result<Vec<_>>>()?;
        let weighted = tables.styles.iter().any(|table| table.weight != 1.0);
        Ok(Self {
            seen: Tensor::f_cat(&parts, 2)?,
            text: Tensor::f_cat(&text, 2)?,
            any_text,
            weights: if weighted { Some(Tensor::f_cat(&weights, 2)?) } else { None },
        })
    }

    /// `ln(c + eps) + ln w` for each label of the picture, `(1 or batch, labels, columns)`; with a `prefix` one row more, for tokens
    /// that are no part of the grid and see everything, as labels do that would see nothing.
    pub(super) fn scores(&self, prefix: bool, eps: f64) -> Result<Tensor> {
        let everything = self.text.f_ones_like()?;
        let mut rows = everything.f_where_self(&empty(&self.seen)?, &self.seen.f_maximum(&self.text)?)?;
        if prefix {
            let (batch, ..) = rows.size3()?;
            rows = Tensor::f_cat(&[rows, everything.f_expand([batch, -1, -1], false)?], 1)?;
        }
        let mut scores = rows.plus(eps)?.f_log_()?;
        if let Some(weights) = &self.weights {
            scores = scores.f_add_(weights)?;
        }
        // With a leak there is no `ln 0`.
        if eps > 0.0 {
            Ok(scores)
        } else {
            scores.within(NEVER, -NEVER)
        }
    }

    /// `c + eps` as a product of two matrices: of `shares`, `(1 or batch, labels, tokens of the grid)`, with a column for the leak
    /// and one for tokens that see everything; and of the rows that belong to these.
    pub(super) fn shared(&self, shares: &Tensor, prefix: i64, eps: f64) -> Result<(Tensor, Tensor)> {
        let ours = shares.f_transpose(1, 2)?;
        // Through a leak a token that sees nothing sees everything as it is, unless there are tokens that all see.
        let nothing = if self.any_text { empty(&ours.f_matmul(&self.seen)?)? } else { ours.f_narrow(2, 0, 1)?.f_zeros_like()? };
        let nothing = nothing.f_to_kind(Kind::Float)?;
        let (batch, ..) = nothing.size3()?;
        let ours = ours.f_expand([batch, -1, -1], false)?;
        let mut ours = Tensor::f_cat(&[&ours, &nothing.f_ones_like()?, &nothing], 2)?;
        if prefix > 0 {
            let (_, _, width) = ours.size3()?;
            let blind = ours.f_narrow(1, 0, 1)?.f_narrow(2, 0, width - 2)?.f_zeros_like()?;
            let both = nothing.f_narrow(1, 0, 1)?.f_ones_like()?.f_expand([-1, -1, 2], false)?;
            ours = Tensor::f_cat(&[Tensor::f_cat(&[blind, both], 2)?.f_expand([-1, prefix, -1], false)?, ours], 1)?;
        }
        let (batch, ..) = self.seen.size3()?;
        let (leak, everything) = (self.text.plus(eps)?, self.text.f_ones_like()?.f_sub(&self.text)?);
        let extra = Tensor::f_cat(&[leak, everything], 1)?.f_expand([batch, -1, -1], false)?;
        Ok((ours, Tensor::f_cat(&[&self.seen, &extra], 1)?))
    }
}

/// Whether a row is all 0, `(.., 1)`.
fn empty(rows: &Tensor) -> Result<Tensor> {
    Ok(rows.f_amax([-1_i64], true)?.f_eq_tensor(&integer(0)?)?)
}
