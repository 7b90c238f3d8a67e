//! Freed memory that stays with the program: a program of its own, as it is for the whole process and wants to be asked for before there are
//! other threads, such as those of the usual test harness.
#![allow(missing_docs)]

fn main() {
    // What harnesses are asked for.
    let asked = |flag: &str| std::env::args().any(|argument| argument == flag);
    if asked("--list") {
        if !asked("--ignored") {
            println!("freed_memory: test");
        }
        return;
    }
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::keeps_what_it_was_told_to();
    attention_distillation::keep_freed_memory();
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    const SIZE: usize = 20 << 20;
    const TIMES: usize = 10;

    pub fn keeps_what_it_was_told_to() {
        let all = (SIZE * TIMES) as i64;
        let found = held_after_coming_and_going();
        if found > all / 4 {
            return eprintln!("skipped: {found} bytes held by an allocator that was told to already, or is another");
        }
        attention_distillation::keep_freed_memory();
        let found = held_after_coming_and_going();
        assert!(found > all * 3 / 4, "{found} bytes held of {all}");
        // Nor do they add up, whichever thread comes next.
        let found = std::thread::spawn(held_after_coming_and_going).join().unwrap();
        assert!(found < all / 4, "{found} bytes more");
        // Large ones go back, as they would not find their like again.
        let before = resident();
        drop(std::hint::black_box(vec![1_u8; 130 << 20]));
        let found = resident() - before;
        assert!(found < 30 << 20, "{found} bytes held of a large piece");
    }

    /// How many bytes more the process holds once several pieces of memory were taken, written and freed.
    fn held_after_coming_and_going() -> i64 {
        let before = resident();
        let pieces: Vec<Vec<u8>> = (0..TIMES).map(|_| vec![1; SIZE]).collect();
        assert!(std::hint::black_box(&pieces).iter().all(|piece| piece[SIZE / 2] == 1));
        drop(pieces);
        resident() - before
    }

    fn resident() -> i64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0 kB");
            line.trim().strip_suffix("kB").unwrap().trim().parse::<i64>().unwrap() << 10
        };
        // What was swapped out has not been given back.
        of("VmRSS:") + of("VmSwap:")
    }
}
