//! Networks whose pictures' opposite borders meet, by circular padding.

pub use crate::Seamless;
use crate::{Error, Result};
use std::sync::{
    atomic::{AtomicU8, Ordering},
    Arc,
};
use tch::Tensor;

/// The setting of one network, which its convolutions share: none can be forgotten.
#[derive(Debug, Clone, Default)]
pub(crate) struct Borders(Arc<AtomicU8>);

impl Borders {
    pub(crate) fn get(&self) -> Seamless {
        let bits = self.0.load(Ordering::Relaxed);
        Seamless::of(bits & 1 != 0, bits & 2 != 0)
    }

    pub(crate) fn set(&self, seamless: Seamless) {
        self.0.store(u8::from(seamless.x()) | u8::from(seamless.y()) << 1, Ordering::Relaxed);
    }

    /// For parts of a picture: along an axis that is cut, borders no longer meet, until the guard is dropped. Nobody else
    /// can see it, for networks are not `Sync`.
    pub(crate) fn within_parts(&self, cut_x: bool, cut_y: bool) -> Restored<'_> {
        let before = self.get();
        self.set(Seamless::of(before.x() && !cut_x, before.y() && !cut_y));
        Restored { borders: self, before }
    }
}

/// Sets back when it is dropped.
#[must_use]
pub(crate) struct Restored<'b> {
    borders: &'b Borders,
    before: Seamless,
}

impl Drop for Restored<'_> {
    fn drop(&mut self) {
        self.borders.set(self.before);
    }
}

/// With so many places of the far end laid before an axis, and of the near end after it.
pub(crate) fn wrap(x: &Tensor, axis: i64, (before, after): (i64, i64)) -> Result<Tensor> {
    if before == 0 && after == 0 {
        return Ok(x.shallow_clone());
    }
    let shape = x.size();
    let side = usize::try_from(axis).ok().and_then(|axis| shape.get(axis)).copied().unwrap_or(0);
    if before > side || after > side {
        let expected = format!("sides of at least {} where opposite borders meet, for a convolution reaches that far", before.max(after));
        return Err(Error::shape("features", expected, shape));
    }
    let (far, near) = (x.f_narrow(axis, side - before, before)?, x.f_narrow(axis, 0, after)?);
    Ok(Tensor::f_cat(&[&far, x, &near], axis)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_laid_before_and_after() -> Result<()> {
        tch::set_num_threads(1);
        let x = Tensor::from_slice(&[1_i64, 2, 3]).view([1, 1, 1, 3]);
        for ((before, after), wanted) in
            [((0, 0), vec![1, 2, 3]), ((1, 1), vec![3, 1, 2, 3, 1]), ((0, 1), vec![1, 2, 3, 1]), ((3, 2), vec![1, 2, 3, 1, 2, 3, 1, 2])]
        {
            assert_eq!(Vec::<i64>::try_from(wrap(&x, 3, (before, after))?.flatten(0, -1))?, wanted);
        }
        for (before, after) in [(4, 0), (0, 4)] {
            assert!(matches!(wrap(&x, 3, (before, after)), Err(Error::Shape { name: "features", .. })));
            assert!(matches!(wrap(&x, 2, (before, after)), Err(Error::Shape { .. })));
        }
        Ok(())
    }

    #[test]
    fn parts_have_borders_for_a_while() {
        let borders = Borders::default();
        for seamless in [Seamless::None, Seamless::X, Seamless::Y, Seamless::Both] {
            borders.set(seamless);
            for (cut_x, cut_y) in [(false, false), (true, false), (false, true), (true, true)] {
                {
                    let _restored = borders.within_parts(cut_x, cut_y);
                    assert_eq!((borders.get().x(), borders.get().y()), (seamless.x() && !cut_x, seamless.y() && !cut_y));
                }
                assert_eq!(borders.get(), seamless);
            }
        }
    }
}
