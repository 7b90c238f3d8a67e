//! An example program that is watched while it runs, and interrupted.

use super::{texts, Place};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

pub struct Watched {
    child: Child,
    stderr: Option<BufReader<ChildStderr>>,
}

impl Place {
    pub fn watch(&self, model: &Path, flags: &[&str]) -> Watched {
        let mut child = self.command(model, flags).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().map(BufReader::new);
        Watched { child, stderr }
    }
}

impl Watched {
    /// Reads its stderr on to a line that starts so; the lines before it.
    #[track_caller]
    pub fn until(&mut self, start: &str) -> Vec<String> {
        let mut passed = vec![];
        loop {
            let mut line = String::new();
            assert!(self.stderr.as_mut().unwrap().read_line(&mut line).unwrap() > 0, "no line starts with `{start}`: {passed:?}");
            if line.trim_start().starts_with(start) {
                return passed;
            }
            passed.push(line.trim_end().to_owned());
        }
    }

    /// Nobody reads its stderr any more.
    pub fn turn_away(&mut self) {
        self.stderr = None;
    }

    /// By the shell's own `kill`: not every system has a program of that name.
    pub fn ctrl_c(&self) {
        assert!(Command::new("sh").args(["-c", r#"kill -INT "$0""#, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// At once, with no chance to write anything.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end: its status, what it said on stdout, and the rest of what it said on stderr.
    pub fn end(mut self) -> (Option<i32>, String, String) {
        let mut rest = vec![];
        if let Some(mut stderr) = self.stderr.take() {
            stderr.read_to_end(&mut rest).unwrap();
        }
        let mut outcome = self.child.wait_with_output().unwrap();
        outcome.stderr = rest;
        let (stdout, stderr) = texts(&outcome);
        (outcome.status.code(), stdout, stderr)
    }
}
