//! A running `moesaic`: its output as it comes, signals by its id, and an end with a deadline.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Far more than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn moesaic() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moesaic"));
    command.stdin(Stdio::null()).env_remove("MOESAIC_LOG").env_remove("MOESAIC_DEMO_MODEL");
    command
}

/// Runs to its end: exit code, standard output, standard error.
pub fn finish(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

pub struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: String,
}

impl Running {
    pub fn start(arguments: &[&str]) -> Self {
        let mut command = moesaic();
        let mut child = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = sync_channel(1024);
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines, seen: String::new() }
    }

    /// The URL that it prints once it is ready, with what to do there.
    pub fn url(&mut self) -> String {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen.contains("Ctrl-C stops it") {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push_str(&line);
                    self.seen.push('\n');
                }
                Err(RecvTimeoutError::Timeout) => panic!("not ready after {PATIENCE:?}; it said:\n{}", self.seen),
                Err(RecvTimeoutError::Disconnected) => {
                    let errors = self.errors();
                    panic!("it ended; it said:\n{}{errors}", self.seen)
                }
            }
        }
        let ready = self.seen.lines().find(|line| line.starts_with("ready")).unwrap();
        ready.split_whitespace().find(|word| word.starts_with("http")).unwrap().to_owned()
    }

    /// What it printed until it was ready.
    pub fn seen(&self) -> &str {
        &self.seen
    }

    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "still running after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Standard error, once it has ended.
    pub fn errors(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Ids of the processes that it has started, with their command lines.
    pub fn children(&self) -> Vec<(u32, String)> {
        let id = self.child.id();
        let listed = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        // A multi-threaded parent's children hang on the thread that started them.
        let tasks = std::fs::read_dir(format!("/proc/{id}/task")).unwrap().flatten();
        let all = tasks.map(|task| std::fs::read_to_string(task.path().join("children")).unwrap_or_default());
        let mut ids: Vec<u32> = all
            .chain([listed])
            .flat_map(|text| text.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids.into_iter().map(|id| (id, command_line(id))).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(id: u32, name: &str) {
    let status = Command::new("kill").args([format!("-{name}"), id.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{name} {id}");
}

/// Empty for a process that is gone.
pub fn command_line(id: u32) -> String {
    std::fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default().replace('\0', " ")
}
