//! The C++ part, opened at run time: nothing is linked, so that programs start without CUDA.

use crate::{device, Error, Result};
use std::ffi::{c_char, c_int, c_void, CStr};
use std::sync::OnceLock;
use tch::TchError;

/// Empty where build/cuda_graphs.rs could not make it, and then why.
#[cfg(target_os = "linux")]
const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cuda_graphs.so"));
const WHY_NOT: &str = include_str!(concat!(env!("OUT_DIR"), "/cuda_graphs.txt"));

/// Null, or a message.
type Outcome = *mut c_char;

/// The functions of `shim.cpp`.
#[derive(Debug)]
pub(super) struct Shim {
    pub(super) pool_make: unsafe extern "C" fn(c_int, *mut *mut c_void) -> Outcome,
    pub(super) pool_free: unsafe extern "C" fn(*mut c_void),
    pub(super) side_enter: unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> Outcome,
    pub(super) side_ready: unsafe extern "C" fn(*mut c_void) -> Outcome,
    pub(super) side_leave: unsafe extern "C" fn(*mut c_void) -> Outcome,
    pub(super) begin: unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> Outcome,
    pub(super) end: unsafe extern "C" fn(*mut c_void) -> Outcome,
    pub(super) replay: unsafe extern "C" fn(*mut c_void) -> Outcome,
    pub(super) free: unsafe extern "C" fn(*mut c_void) -> Outcome,
    free_error: unsafe extern "C" fn(*mut c_char),
}

impl Shim {
    /// Opens libtorch's CUDA, then itself; once per process.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no GPU, or where the library was not built or cannot be opened.
    pub(super) fn open() -> Result<&'static Self> {
        static SHIM: OnceLock<std::result::Result<Shim, String>> = OnceLock::new();
        device::parse("cuda")?;
        let shim = SHIM.get_or_init(load).as_ref();
        shim.map_err(|reason| Error::Device { device: "cuda".into(), reason: format!("CUDA graphs cannot be used: {reason}") })
    }

    /// What a function said.
    ///
    /// # Errors
    /// [`Error::Torch`] with its message.
    #[allow(unsafe_code)]
    pub(super) fn outcome(&self, error: Outcome) -> Result<()> {
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: what is not null is a message that ends with a 0 and is ours to free.
        let text = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
        // SAFETY: as above, and it is not looked at again.
        unsafe { (self.free_error)(error) };
        Err(Error::Torch(TchError::Torch(text)))
    }
}

/// After libtorch_cuda, without which it lacks symbols.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn load() -> std::result::Result<Shim, String> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    if LIBRARY.is_empty() {
        return Err(format!("their part in C++ was not built: {WHY_NOT}"));
    }
    let file = file().map_err(|error| format!("a file in memory (memfd_create) could not be made: {error}"))?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&file));
    // SAFETY: it is the library that build/cuda_graphs.rs made, whose initialisers are the compiler's.
    let opened = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
    let library = opened.map_err(|error| device::with_causes(&error))?;
    // SAFETY: the types are those of shim.cpp.
    let shim = unsafe {
        Shim {
            pool_make: function(&library, c"graphs_pool_make")?,
            pool_free: function(&library, c"graphs_pool_free")?,
            side_enter: function(&library, c"graphs_side_enter")?,
            side_ready: function(&library, c"graphs_side_ready")?,
            side_leave: function(&library, c"graphs_side_leave")?,
            begin: function(&library, c"graphs_begin")?,
            end: function(&library, c"graphs_end")?,
            replay: function(&library, c"graphs_replay")?,
            free: function(&library, c"graphs_free")?,
            free_error: function(&library, c"graphs_free_error")?,
        }
    };
    // Its functions live as long as the process, and so does the file: the loader takes a library of a path that it knows for the one it has, so no
    // other file may come to have this path.
    std::mem::forget((library, file));
    Ok(shim)
}

#[cfg(not(target_os = "linux"))]
fn load() -> std::result::Result<Shim, String> {
    Err(format!("their part in C++ was not built: {WHY_NOT}"))
}

/// # Safety
/// `F` is to be the type of the function of this name.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
unsafe fn function<F: Copy>(library: &libloading::os::unix::Library, name: &CStr) -> std::result::Result<F, String> {
    // SAFETY: the caller's.
    let symbol = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
    symbol.map(|symbol| *symbol).map_err(|error| device::with_causes(&error))
}

/// The library as a file, which is what can be opened: in memory, where no folder has to allow it and none is left with it.
#[cfg(target_os = "linux")]
fn file() -> std::io::Result<std::fs::File> {
    let mut file = std::fs::File::from(rustix::fs::memfd_create(c"attention_distillation", rustix::fs::MemfdFlags::CLOEXEC)?);
    std::io::Write::write_all(&mut file, LIBRARY)?;
    Ok(file)
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    #![allow(unsafe_code, clippy::print_stdout)]
    use super::*;
    use std::ptr::null_mut;

    /// Without NVIDIA's libraries it cannot be opened, without a driver it does nothing: both are told.
    #[test]
    fn what_is_missing_is_told() {
        let gpu = device::best().is_cuda();
        match load() {
            Err(reason) if LIBRARY.is_empty() => {
                println!("skipped: the library was not built: {WHY_NOT}");
                assert!(!WHY_NOT.is_empty() && reason.contains(WHY_NOT), "{reason}");
            }
            Err(reason) => {
                println!("it cannot be opened: {reason}");
                assert!(!gpu && reason.contains("undefined symbol"), "{reason}");
            }
            Ok(shim) => {
                let mut pool = null_mut();
                // SAFETY: a device's number, and a place for the result.
                let made = shim.outcome(unsafe { (shim.pool_make)(0, &mut pool) });
                println!("opened; a pool: {made:?}");
                assert_eq!((made.is_ok(), !pool.is_null()), (gpu, gpu));
                if gpu {
                    let mut side = null_mut();
                    // SAFETY: a pool, and a place for the result.
                    assert!(shim.outcome(unsafe { (shim.side_enter)(pool, &mut side) }).is_ok());
                    // SAFETY: what was entered is left, once; and the pool is freed after it.
                    assert!(shim.outcome(unsafe { (shim.side_leave)(side) }).is_ok());
                    // SAFETY: as above.
                    unsafe { (shim.pool_free)(pool) };
                }
            }
        }
        assert_eq!(Shim::open().is_ok(), gpu && !LIBRARY.is_empty());
    }
}
