//! What the processor is, where that decides which of several ways is the fastest.

use std::sync::OnceLock;

/// Whether it is Intel's. libtorch multiplies by MKL, which makes the most of these, in half precisions by AMX where they have it: what gains
/// on AMD's for how little MKL makes of those is not taken for a gain there.
#[allow(unsafe_code, unused_unsafe)]
pub(crate) fn is_intel() -> bool {
    static INTEL: OnceLock<bool> = OnceLock::new();
    *INTEL.get_or_init(|| {
        // SAFETY: every x86-64 processor has the instruction, and the leaf that names its maker.
        let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
        [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    })
}
