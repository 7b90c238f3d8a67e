//! What the processor is, where that decides which of several ways is the fastest.

/// Whether it is Intel's. What was measured on AMD's alone is not taken for granted there: libtorch multiplies by MKL, which makes the
/// most of Intel's processors, in half precisions by AMX where they have it.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, unused_unsafe)]
pub(crate) fn is_intel() -> bool {
    // SAFETY: every x86-64 processor has the instruction, and the leaf that names its maker.
    let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}
