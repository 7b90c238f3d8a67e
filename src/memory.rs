//! Whether a picture's size can fit at all: on a CPU the system would end the program without a word. And giving freed memory back.

use crate::{Error, Result};

/// Refuses what needs more bytes than this machine has free, where the system tells. GPUs say so themselves.
pub(crate) fn check(needed: i64, (height, width): (i64, i64)) -> Result<()> {
    check_for(needed, &format!("{width}x{height}"), "choose a smaller one")
}

/// [`check`] of more than a picture.
pub(crate) fn check_for(needed: i64, what: &str, advice: &str) -> Result<()> {
    match available() {
        Some(free) if needed > free => {
            let gib = |bytes: i64| bytes as f64 / f64::from(1 << 30);
            let reason = format!("{what} needs more than {:.1} GiB of memory, of which {:.1} GiB are free; {advice}", gib(needed), gib(free));
            Err(Error::argument("size", reason))
        }
        _ => Ok(()),
    }
}

/// Before another kind of work on the CPU. Of what tensors took and freed glibc keeps all but the largest pieces. They fit the next step
/// of a run; the autoencoder, whose pieces are others, would need its memory on top of a step's.
#[cfg(feature = "stable-diffusion")]
#[allow(unsafe_code)]
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// In bytes.
fn available() -> Option<i64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()?.checked_mul(1024)
}
