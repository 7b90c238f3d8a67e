//! libtorch's choice among kernels of attention, where one of them cannot be relied on.

use std::sync::OnceLock;

/// Tells libtorch, for the whole process and once, to compute attention on GPUs by other kernels than cuDNN's. libtorch 2.11 prefers
/// these on H100 and H200, where their gradients are wrong by more than their own size as soon as the gradient of the output is laid
/// out otherwise than the output (measured with cuDNN 9.19, in bf16 and f16); a transfer then ends at a loss a quarter higher.
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

/// libtorch's C++ has a switch, tch has no function for it.
#[cfg(unix)]
#[allow(unsafe_code)]
fn switch_off() -> std::result::Result<(), String> {
    use crate::device;
    use libloading::os::unix::{Library, RTLD_NOW};
    use std::ffi::c_void;
    let library = match device::beside_libtorch_cpu("libtorch_cpu.so") {
        // SAFETY: it runs already, so nothing is initialised.
        Some(path) => unsafe { Library::open(Some(path), RTLD_NOW) }.map_err(|error| device::with_causes(&error))?,
        None => Library::this(),
    };
    // SAFETY: `at::globalContext()` and `at::Context::setSDPUseCuDNN(bool)` under the names, and with the calling convention, that
    // C++ compilers on Unix give them; a reference is a pointer there, and `this` the first argument.
    unsafe {
        let context =
            library.get::<unsafe extern "C" fn() -> *mut c_void>(b"_ZN2at13globalContextEv\0").map_err(|error| device::with_causes(&error))?;
        let switch = library
            .get::<unsafe extern "C" fn(*mut c_void, bool)>(b"_ZN2at7Context14setSDPUseCuDNNEb\0")
            .map_err(|error| device::with_causes(&error))?;
        switch(context(), false);
    }
    Ok(())
}

#[cfg(not(unix))]
fn switch_off() -> std::result::Result<(), String> {
    Err("this works on Unix only".into())
}

#[cfg(test)]
mod tests {
    use crate::device;
    use libloading::os::unix::{Library, RTLD_NOW};
    use std::error::Error;
    use std::ffi::c_void;

    /// By the switch's own question to libtorch.
    #[test]
    #[allow(unsafe_code)]
    fn libtorch_leaves_it_alone() -> Result<(), Box<dyn Error>> {
        super::switch_off()?;
        let path = device::beside_libtorch_cpu("libtorch_cpu.so");
        // SAFETY: as there; `at::Context::userEnabledCuDNNSDP() const`.
        let enabled = unsafe {
            let library = path.map_or_else(|| Ok(Library::this()), |path| Library::open(Some(path), RTLD_NOW))?;
            let context = library.get::<unsafe extern "C" fn() -> *mut c_void>(b"_ZN2at13globalContextEv\0")?;
            library.get::<unsafe extern "C" fn(*mut c_void) -> bool>(b"_ZNK2at7Context19userEnabledCuDNNSDPEv\0")?(context())
        };
        assert!(!enabled);
        Ok(())
    }
}
