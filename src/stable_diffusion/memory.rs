//! Whether a picture's size can fit at all: on a CPU the system would end the program without a word.

use crate::{Error, Result};
use tch::Device;

/// A step holds the U-Net's activations for its backward pass: as much as this many of its first layer's. Measured on
/// the bundled model, 3.7 kB per pixel from 128 to 512 px; deeper networks hold more.
const ACTIVATIONS: i64 = 300;

/// Refuses sizes at which one step is beyond the memory that is free. GPUs say so themselves. `activation` is the
/// U-Net's first layer's, in bytes.
pub(crate) fn check(device: Device, activation: i64, (height, width): (i64, i64)) -> Result<()> {
    let needed = activation.saturating_mul(ACTIVATIONS);
    match available() {
        Some(free) if device == Device::Cpu && needed > free => {
            let gib = |bytes: i64| bytes as f64 / f64::from(1 << 30);
            Err(Error::argument(
                "size",
                format!(
                    "{width}x{height} needs more than {:.1} GiB of memory, of which {:.1} GiB are free; choose a smaller one",
                    gib(needed),
                    gib(free)
                ),
            ))
        }
        _ => Ok(()),
    }
}

/// In bytes, where the system tells.
fn available() -> Option<i64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()?.checked_mul(1024)
}
