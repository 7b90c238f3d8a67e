//! Work of a GPU, captured and repeated.

use super::shim::Shim;
use super::Recorder;
use crate::{Error, Result};
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Weak};
use tch::Device;

/// Work is done so often before it is captured: what libraries set up when they are first used cannot be captured.
const WARM_UPS: usize = 3;

/// CUDA's graphs, on any GPU: the recorder for [`Distiller::with_graphs`](crate::Distiller::with_graphs) and
/// [`GuidedSampler::with_graphs`](crate::GuidedSampler::with_graphs).
///
/// A capture waits for the work that is under way, and has libtorch give back the memory that it keeps for later. The graphs of one recorder
/// share their memory, which stays theirs until the last of them is dropped; they are repeated one after the other, on whatever streams.
///
/// Threads may each have a recorder on one GPU. While one of them captures, libtorch refuses to draw random numbers on that GPU for the others
/// (`Tensor::randn` there, dropout), by an error; [`Noise`](crate::Noise) draws on the CPU. A network or loss that draws on the GPU itself is to be
/// captured by one thread at a time.
#[derive(Debug)]
pub struct CudaGraphs {
    shim: &'static Shim,
    /// Of the graphs that are there.
    pool: Weak<Pool>,
}

impl CudaGraphs {
    /// Opens CUDA.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no GPU, or where this crate's part in C++ could not be built: it says what is missing.
    pub fn new() -> Result<Self> {
        Ok(Self { shim: Shim::open()?, pool: Weak::new() })
    }

    /// The pool of the graphs that are alive, or a new one: what is left of a pool whose last graph is gone cannot be captured into.
    fn pool(&mut self, device: c_int) -> Result<Arc<Pool>> {
        if let Some(pool) = self.pool.upgrade().filter(|pool| pool.device == device) {
            return Ok(pool);
        }
        let pool = Arc::new(Pool::new(self.shim, device)?);
        self.pool = Arc::downgrade(&pool);
        Ok(pool)
    }
}

#[allow(unsafe_code)]
impl Recorder for CudaGraphs {
    type Graph = CudaGraph;

    unsafe fn capture(&mut self, device: Device, work: &mut dyn FnMut() -> Result<()>) -> Result<CudaGraph> {
        let index = match device {
            Device::Cuda(index) => c_int::try_from(index).ok(),
            _ => None,
        };
        let Some(index) = index else {
            return Err(Error::Device { device: format!("{device:?}"), reason: "CUDA graphs are of a GPU's work, and the latents are here".into() });
        };
        let pool = self.pool(index)?;
        let side = Side::enter(self.shim, &pool)?;
        for _ in 0..WARM_UPS {
            work()?;
        }
        side.ready()?;
        let mut graph = CudaGraph::begin(self.shim, pool)?;
        let outcome = work();
        let ended = graph.end();
        // The work's own error says more than that the capture then failed.
        outcome.and(ended)?;
        Ok(graph)
    }

    unsafe fn replay(&mut self, graph: &mut CudaGraph, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        graph.replay()
    }
}

/// Memory and a stream, which graphs share.
#[derive(Debug)]
struct Pool {
    shim: &'static Shim,
    device: c_int,
    pool: *mut c_void,
}

// SAFETY: what it points to is not bound to a thread, and changes under a lock of its own alone.
#[allow(unsafe_code)]
unsafe impl Send for Pool {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Pool {}

#[allow(unsafe_code)]
impl Pool {
    fn new(shim: &'static Shim, device: c_int) -> Result<Self> {
        let mut pool = null_mut();
        // SAFETY: a place for the result, which is looked at only where there is one.
        shim.outcome(unsafe { (shim.pool_make)(device, &mut pool) })?;
        Ok(Self { shim, device, pool })
    }
}

impl Drop for Pool {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made, and freed once, after its graphs, each of which holds it.
        unsafe { (self.shim.pool_free)(self.pool) }
    }
}

/// A stream beside the current one, for this thread's work until it is dropped.
struct Side {
    shim: &'static Shim,
    side: *mut c_void,
}

#[allow(unsafe_code)]
impl Side {
    fn enter(shim: &'static Shim, pool: &Pool) -> Result<Self> {
        let mut side = null_mut();
        // SAFETY: a pool, and a place for the result, which is looked at only where there is one.
        shim.outcome(unsafe { (shim.side_enter)(pool.pool, &mut side) })?;
        Ok(Self { shim, side })
    }

    /// Waits for the work so far, and gives back the memory that it no longer uses.
    fn ready(&self) -> Result<()> {
        // SAFETY: entered, and not yet left.
        self.shim.outcome(unsafe { (self.shim.side_ready)(self.side) })
    }
}

impl Drop for Side {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: entered on this thread, as it is not Send, and left once.
        if let Err(error) = self.shim.outcome(unsafe { (self.shim.side_leave)(self.side) }) {
            tracing::warn!(%error, "a stream of CUDA failed");
        }
    }
}

/// Captured work of a GPU.
#[derive(Debug)]
pub struct CudaGraph {
    shim: &'static Shim,
    graph: *mut c_void,
    capturing: bool,
    /// Freed after it, where it was the last.
    _pool: Arc<Pool>,
}

// SAFETY: libtorch's graphs belong to a device, not to a thread; no two threads use one at once, as it is not Sync. While it
// captures it does not leave its function. What libtorch keeps of all graphs of a device the C++ part locks.
#[allow(unsafe_code)]
unsafe impl Send for CudaGraph {}

#[allow(unsafe_code)]
impl CudaGraph {
    /// From here on the current stream's work is captured instead of done.
    fn begin(shim: &'static Shim, pool: Arc<Pool>) -> Result<Self> {
        let mut graph = null_mut();
        // SAFETY: a pool, and a place for the result, which is looked at only where there is one.
        shim.outcome(unsafe { (shim.begin)(pool.pool, &mut graph) })?;
        Ok(Self { shim, graph, capturing: true, _pool: pool })
    }

    fn end(&mut self) -> Result<()> {
        self.capturing = false;
        // SAFETY: begun, and ended once.
        self.shim.outcome(unsafe { (self.shim.end)(self.graph) })
    }

    fn replay(&self) -> Result<()> {
        // SAFETY: begun, and not yet freed; libtorch refuses what did not end well.
        self.shim.outcome(unsafe { (self.shim.replay)(self.graph) })
    }
}

impl Drop for CudaGraph {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.capturing {
            // The work panicked.
            let _ = self.end();
        }
        // SAFETY: begun, and freed once.
        if let Err(error) = self.shim.outcome(unsafe { (self.shim.free)(self.graph) }) {
            tracing::warn!(%error, "a graph of CUDA failed");
        }
    }
}
