//! How much memory the test's own process takes.
#![allow(dead_code, clippy::disallowed_methods, clippy::unwrap_used, missing_docs)] // Each test file uses a part of it; a test may panic.

use std::{fs, io::Write};

/// In KiB; none where the system does not tell.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    pub resident: i64,
    pub allocated: Option<i64>,
}

impl Memory {
    pub fn now() -> Option<Self> {
        // What was swapped out has not been given back.
        Some(Self { resident: status("VmRSS:")? + status("VmSwap:").unwrap_or(0), allocated: allocated() })
    }

    pub fn since(self, before: Self) -> Self {
        let allocated = self.allocated.zip(before.allocated).map(|(now, before)| now - before);
        Self { resident: self.resident - before.resident, allocated }
    }
}

/// What glibc has handed out, libtorch's tensors included; other C libraries do not tell.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
pub fn allocated() -> Option<i64> {
    use libloading::os::unix::{Library, Symbol};

    /// glibc's `struct mallinfo2`.
    #[repr(C)]
    struct Info {
        _before: [usize; 4],
        mapped: usize,
        _between: [usize; 2],
        in_use: usize,
        _after: [usize; 2],
    }

    let library = Library::this();
    // SAFETY: the type is that of glibc's function, which may be called at any time.
    let info = unsafe {
        let info: Symbol<unsafe extern "C" fn() -> Info> = library.get(b"mallinfo2\0").ok()?;
        info()
    };
    i64::try_from((info.mapped + info.in_use) >> 10).ok()
}

#[cfg(not(target_os = "linux"))]
pub fn allocated() -> Option<i64> {
    None
}

/// The most that ever was resident, in KiB.
pub fn most_resident() -> Option<i64> {
    status("VmHWM:")
}

/// A line of what Linux tells of the process.
fn status(name: &str) -> Option<i64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Not by `eprintln!`, which is shown for failed tests only.
pub fn say(text: &str) {
    std::io::stderr().write_all(format!("{text}\n").as_bytes()).unwrap();
}
