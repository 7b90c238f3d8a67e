//! What is told through tracing.
#![allow(clippy::unwrap_used, missing_docs)] // A test may panic.

use std::cell::RefCell;
use std::io::Write;
use std::sync::Once;

thread_local! {
    /// What this thread was told while it listened.
    static HEARD: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

struct Ear;

impl Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        HEARD.with_borrow_mut(|heard| heard.iter_mut().for_each(|heard| heard.extend_from_slice(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What `work` tells at this level or above, and what it returns. One subscriber serves all threads for good: levels
/// are process-wide, and those of a subscriber for a while would be lost to tests on other threads.
pub fn told<T>(level: tracing::Level, work: impl FnOnce() -> T) -> (String, T) {
    static LISTEN: Once = Once::new();
    LISTEN.call_once(|| {
        let everything = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false).with_writer(|| Ear).finish();
        tracing::subscriber::set_global_default(everything).unwrap();
    });
    HEARD.set(Some(vec![]));
    let outcome = work();
    let text = String::from_utf8(HEARD.take().unwrap()).unwrap();
    let levels = [tracing::Level::ERROR, tracing::Level::WARN, tracing::Level::INFO, tracing::Level::DEBUG];
    let wanted = |line: &str| levels.iter().filter(|l| **l <= level).any(|l| line.contains(&format!(" {l} ")));
    (text.lines().filter(|line| wanted(line)).map(|line| format!("{line}\n")).collect(), outcome)
}
