//! Freed memory that stays with the program: a program of its own, as it is for the whole process and wants to be asked for before there are
//! other threads, such as those of the usual test harness.
#![allow(missing_docs)]

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn main() {
    // Of 64 KiB, the largest that usual systems have.
    let pages = (TIMES * SIZE / (64 << 10)) as u64;
    let found = faults_of_coming_and_going();
    assert!(found >= pages, "{found} pages: the system does not take back what is freed, and there is nothing to gain");
    attention_distillation::keep_freed_memory();
    let found = faults_of_coming_and_going();
    assert!(found < pages / 10, "{found} pages on the first thread");
    let found = std::thread::spawn(faults_of_coming_and_going).join().unwrap();
    assert!(found < pages / 10, "{found} pages on another thread");
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn main() {
    attention_distillation::keep_freed_memory();
}

/// More than any heap but the first can hold.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const SIZE: usize = 256 << 20;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const TIMES: usize = 8;

/// Pages that the system had to clear or find for a piece of memory that is taken, written and freed so many times, after a first time.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn faults_of_coming_and_going() -> u64 {
    let once = || {
        let bytes = vec![1_u8; SIZE];
        assert_eq!(std::hint::black_box(&bytes)[SIZE / 2], 1);
    };
    once();
    let before = faults();
    (0..TIMES).for_each(|_| once());
    faults() - before
}

/// Of the process so far.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn faults() -> u64 {
    // The name, the second field, is in brackets and may have spaces.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(7).unwrap().parse().unwrap()
}
