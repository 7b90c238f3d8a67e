//! libtorch's choice among kernels of attention, where one of them cannot be relied on.

use std::sync::OnceLock;

/// Tells libtorch, for the whole process and once, to compute attention on GPUs by other kernels than cuDNN's. libtorch 2.11 prefers
/// these on H100 and H200, where their gradients are wrong by more than their own size as soon as the gradient of the output is laid
/// out otherwise than the output (measured with cuDNN 9.19, in bf16 and f16).
pub(crate) fn without_cudnn() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        if let Err(reason) = switch_off() {
            tracing::warn!(
                reason,
                "libtorch could not be told to leave cuDNN's attention alone; on H100 and H200 gradients in bf16 and f16 may be wrong"
            );
        }
    });
}

/// The same where this is a GPU: for programs that found it without this crate.
pub(crate) fn without_cudnn_on(device: tch::Device) {
    if device.is_cuda() {
        without_cudnn();
    }
}

/// libtorch's C++ has a switch, tch has no function for it.
#[cfg(unix)]
#[allow(unsafe_code)]
fn switch_off() -> std::result::Result<(), String> {
    use std::ffi::c_void;
    // SAFETY: `at::globalContext()` and `at::Context::setSDPUseCuDNN(bool)` under the names, and with the calling convention, that C++
    // compilers on Unix give them; a reference is a pointer there, and `this` the first argument. Both are of libtorch's public headers,
    // as is their signature, and set a flag or return an address, so nothing is thrown.
    unsafe {
        let context = symbol::<unsafe extern "C" fn() -> *mut c_void>(c"_ZN2at13globalContextEv")?;
        let switch = symbol::<unsafe extern "C" fn(*mut c_void, bool)>(c"_ZN2at7Context14setSDPUseCuDNNEb")?;
        switch(context(), false);
    }
    Ok(())
}

#[cfg(not(unix))]
fn switch_off() -> std::result::Result<(), String> {
    Err("this works on Unix only".into())
}

/// Of the libtorch_cpu that runs: among what the program sees, or where it was loaded for another library alone, in its file.
///
/// # Safety
/// `F` is to be the type of the function of this name.
#[cfg(unix)]
#[allow(unsafe_code)]
unsafe fn symbol<F: Copy>(name: &std::ffi::CStr) -> std::result::Result<F, String> {
    use crate::device::with_causes;
    use libloading::os::unix::Library;
    let of = |library: &Library| {
        // SAFETY: the caller's.
        let symbol = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
        symbol.map(|symbol| *symbol).map_err(|error| with_causes(&error))
    };
    of(&Library::this()).or_else(|reason| of(&running().ok_or(reason)?))
}

/// A handle on libtorch_cpu, where it runs; never another copy of it.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn running() -> Option<libloading::os::unix::Library> {
    use libloading::os::unix::{Library, RTLD_NOW};
    const RTLD_NOLOAD: std::ffi::c_int = 4;
    let path = crate::device::beside_libtorch_cpu("libtorch_cpu.so")?;
    // SAFETY: nothing is loaded, so nothing is initialised.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_NOLOAD) }.ok()
}

#[cfg(all(unix, not(target_os = "linux")))]
fn running() -> Option<libloading::os::unix::Library> {
    None
}

#[cfg(test)]
mod tests {
    /// By libtorch's own word, which is that it does at first.
    #[cfg(unix)]
    #[test]
    #[allow(unsafe_code)]
    fn libtorch_leaves_it_alone() -> Result<(), String> {
        use super::symbol;
        use std::ffi::c_void;
        // SAFETY: as in `switch_off`; `at::Context::userEnabledCuDNNSDP() const`.
        let enabled = || unsafe {
            let context = symbol::<unsafe extern "C" fn() -> *mut c_void>(c"_ZN2at13globalContextEv")?;
            Ok::<_, String>(symbol::<unsafe extern "C" fn(*mut c_void) -> bool>(c"_ZNK2at7Context19userEnabledCuDNNSDPEv")?(context()))
        };
        // SAFETY: as above.
        unsafe {
            let context = symbol::<unsafe extern "C" fn() -> *mut c_void>(c"_ZN2at13globalContextEv")?;
            symbol::<unsafe extern "C" fn(*mut c_void, bool)>(c"_ZN2at7Context14setSDPUseCuDNNEb")?(context(), true);
        }
        assert!(enabled()?);
        super::switch_off()?;
        assert!(!enabled()?);
        Ok(())
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_running_library_has_a_handle() {
        assert!(super::running().is_some());
    }
}
