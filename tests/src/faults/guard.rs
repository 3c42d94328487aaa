//! Undoes what a run has made on this machine, however the run ends: a shell that is told how, line by line, and does
//! it in reverse order when the pipe to it closes.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result};

/// A Ctrl-C must not end it: it is there for the time after.
const SCRIPT: &str = r#"trap '' INT TERM HUP
undo=
while IFS= read -r line; do undo="$line
$undo"; done
eval "$undo" >/dev/null 2>&1"#;

pub struct Guard {
    shell: Child,
    /// None once everything is undone.
    pipe: Option<ChildStdin>,
}

impl Guard {
    pub fn new() -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        let mut shell = command.spawn().context("cannot start a shell")?;
        let pipe = shell.stdin.take();
        Ok(Self { shell, pipe })
    }

    /// One line of shell.
    pub fn at_end(&mut self, line: &str) -> Result<()> {
        let pipe = self.pipe.as_mut().context("the guard has ended")?;
        writeln!(pipe, "{line}").context("the guard has ended")
    }

    /// The same for a line that works only after processes have ended, which takes them a moment.
    pub fn at_end_soon(&mut self, line: &str) -> Result<()> {
        self.at_end(&format!("for i in 1 2 3 4 5 6 7 8 9; do {line} && break; sleep 0.2; done"))
    }
}

/// As one word of shell.
pub fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.pipe = None;
        let _ = self.shell.wait();
    }
}
