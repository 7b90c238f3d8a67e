//! Whether a picture's size can fit at all: on a CPU the system would end the program without a word. And giving freed memory back.

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Refuses what needs more bytes than this machine has free, where the system tells. GPUs say so themselves.
pub(crate) fn check(needed: i64, what: impl Into<String>, advice: impl Into<String>) -> Result<()> {
    let short = || available().filter(|&free| needed > free);
    // What this program has freed and kept counts as taken.
    let still = short().and_then(|_| {
        give_back();
        short()
    });
    still.map_or(Ok(()), |free| Err(Error::Memory { what: what.into(), needed, free, advice: advice.into() }))
}

/// Before another kind of work on the CPU. Of what tensors took and freed glibc keeps all but the largest pieces, and these, too, up to 120 MiB,
/// where it was [told to](keep_freed_memory). They fit the next step of a run; the autoencoder, whose pieces are others, would need its memory
/// on top of a step's.
#[allow(unsafe_code)]
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// For programs that optimise pictures on a CPU, to be called once, before all else and before there are other threads: freed memory stays
/// with the program.
///
/// Tensors come and go by the thousand in each step. glibc gives the larger ones back to the system as they are freed, which then has to clear
/// the same pages for the next: with Stable Diffusion 1.5 at 256 px more than a quarter of the time of a run on two cores, with the bundled
/// model some 3 % (PERFORMANCE.md). What a run takes at most hardly changes, as `StableDiffusion` gives back what steps have left before its
/// autoencoder works; after a run a program holds much of what it needed at most. It is for the whole process, which is why no run does it
/// by itself. Where there is no glibc it does nothing.
#[allow(unsafe_code)]
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: numbers for the allocator; from then on it takes memory and gives it back otherwise.
    unsafe {
        // One heap for threads that are still to come, as all but the first could hold no large pieces.
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // What was taken by `mmap` goes back when it is freed. That is to be the autoencoder's large pieces, which would not find their like in
        // the heap again, but nothing of a step: the largest are weights of 113 MiB, which oneDNN lays out anew in Stable Diffusion 1.5. Older
        // versions of glibc take 32 at most.
        if libc::mallopt(libc::M_MMAP_THRESHOLD, 120 << 20) == 0 {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        }
        // Nothing back at the end of the heap, and that grown in larger steps.
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// In bytes: what the machine has free, or what a container may still take.
fn available() -> Option<i64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| field(&text, "MemAvailable:")?.checked_mul(1024));
    let container = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|of| within_limits(&of, Path::new("/sys/fs/cgroup")));
    machine.into_iter().chain(container).min()
}

/// The number of a line such as `MemAvailable:  3220 kB`.
fn field(text: &str, name: &str) -> Option<i64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}

/// What the control groups of a process (`/proc/self/cgroup`) may still take, by the tightest of the limits from its own up to the
/// root's; pages of files that the system can drop are free. Within a container the path is often that on the host, and what is
/// mounted is the container's own group, which is then the root.
fn within_limits(groups: &str, root: &Path) -> Option<i64> {
    let free = |group: PathBuf, limit: &str, used: &str, dropped: &[&str]| {
        let number = |name: &str| std::fs::read_to_string(group.join(name)).ok()?.trim().parse::<i64>().ok();
        let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let droppable = dropped.iter().filter_map(|name| field(&stat, name)).fold(0, i64::saturating_add);
        // No limit is a word, or a number that no machine has.
        Some(number(limit)?.saturating_sub(number(used)?).saturating_add(droppable).max(0))
    };
    let of = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, Path::new(parts.next()?.trim_start_matches('/')));
        let ancestors = path.ancestors();
        if controllers.is_empty() {
            ancestors
                .filter_map(|path| free(root.join(path), "memory.max", "memory.current", &["inactive_file ", "active_file ", "slab_reclaimable "]))
                .min()
        } else if controllers.split(',').any(|name| name == "memory") {
            let root = root.join("memory");
            ancestors
                .filter_map(|path| {
                    free(root.join(path), "memory.limit_in_bytes", "memory.usage_in_bytes", &["total_inactive_file ", "total_active_file "])
                })
                .min()
        } else {
            None
        }
    };
    groups.lines().filter_map(of).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_of_a_container_counts() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
            std::fs::write(path, text)
        };
        let free = |groups: &str| within_limits(groups, folder.path());
        assert_eq!(free("0::/\n"), None, "no limits at all");
        assert_eq!(free(""), None);
        write("memory.max", "max\n")?;
        write("memory.current", "700\n")?;
        assert_eq!(free("0::/\n"), None, "a word for none");
        write("a/memory.max", "5000\n")?;
        write("a/memory.current", "3000\n")?;
        write("a/memory.stat", "anon 1900\ninactive_file 400\nactive_file 600\nslab_reclaimable 100\nslab 150\n")?;
        assert_eq!(free("0::/a\n"), Some(3100));
        write("a/b/memory.max", "9000\n")?;
        write("a/b/memory.current", "10\n")?;
        assert_eq!(free("0::/a/b\n"), Some(3100), "its parent's is tighter");
        write("a/b/memory.max", "1000\n")?;
        assert_eq!(free("0::/a/b\n"), Some(990));
        write("a/b/memory.current", "1200\n")?;
        assert_eq!(free("0::/a/b\n"), Some(0));
        // The host's path, which is not mounted: the root is the container's own group.
        write("memory.max", "2000\n")?;
        assert_eq!(free("0::/docker/1f\n"), Some(1300));
        // The older hierarchy, one for each controller.
        write("memory/c/memory.limit_in_bytes", "800\n")?;
        write("memory/c/memory.usage_in_bytes", "300\n")?;
        write("memory/c/memory.stat", "inactive_file 1\ntotal_inactive_file 50\ntotal_active_file 30\n")?;
        assert_eq!(free("12:cpu,cpuacct:/c\n4:memory:/c\n"), Some(580));
        write("memory/memory.limit_in_bytes", "9223372036854771712\n")?;
        write("memory/memory.usage_in_bytes", "600\n")?;
        assert_eq!(free("4:memory:/docker/1f\n"), Some(9223372036854771712 - 600));
        Ok(())
    }
}
