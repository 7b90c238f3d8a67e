//! What is made once for references, and used for as long as nothing of it changes.

use super::{Rows, Tables};
use crate::{LayerFeatures, References, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Device, Kind};

/// Layers of different grids, styles of different sizes and devices: more than a network has; beyond these the oldest goes.
const MOST_PLACES: usize = 32;

/// Goes from clean latents on to their features at each timestep, and so lives as long as a run. It holds what it was made for:
/// what is asked for other labels or weights is made anew.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memo(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    tables: Option<Arc<Tables>>,
    rows: Vec<(Place, Rows)>,
}

/// All that a layer's bias depends on besides the [`Tables`].
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    ours: Grid,
    batch: i64,
    device: Device,
    kind: Kind,
    /// Of each style, with its number of keys.
    theirs: Vec<(Grid, i64)>,
}

/// Its sides, and how many tokens lie before it.
type Grid = ((i64, i64), i64);

impl Place {
    pub(super) fn of(layer: &LayerFeatures, styles: &[&LayerFeatures]) -> Result<Self> {
        let grid = |layer: &LayerFeatures| (layer.site.grid, layer.site.prefix);
        Ok(Self {
            ours: grid(layer),
            batch: layer.query.size4()?.0,
            device: layer.query.device(),
            kind: layer.query.f_kind()?,
            theirs: styles.iter().map(|style| Ok((grid(style), style.key.size4()?.2))).collect::<Result<_>>()?,
        })
    }
}

impl Memo {
    /// Of these references as they are now.
    ///
    /// # Errors
    /// As [`Tables::new`].
    pub(crate) fn tables<T>(&self, references: &References<T>) -> Result<Arc<Tables>> {
        if let Some(tables) = self.kept().tables.as_ref().filter(|tables| tables.are_of(references)) {
            return Ok(Arc::clone(tables));
        }
        let tables = Arc::new(Tables::new(references)?);
        *self.kept() = Kept { tables: Some(Arc::clone(&tables)), rows: vec![] };
        Ok(tables)
    }

    pub(super) fn rows(&self, tables: &Arc<Tables>, place: &Place) -> Option<Rows> {
        let kept = self.kept();
        let same = kept.tables.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, tables));
        let mut found = kept.rows.iter().filter(|(at, _)| same && at == place);
        found.next().map(|(_, rows)| rows.shallow_clone())
    }

    pub(super) fn keep(&self, tables: &Arc<Tables>, place: Place, rows: Rows) {
        let mut kept = self.kept();
        // Another handle on the references may have gone on to other labels.
        if kept.tables.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, tables)) {
            if kept.rows.len() >= MOST_PLACES {
                kept.rows.remove(0);
            }
            kept.rows.push((place, rows));
        }
    }

    /// What is in it is whole between any two calls: a thread that panicked has broken nothing.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
