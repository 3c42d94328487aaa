//! `moesaic up` as a process, with its children if it has any. Built by the same `cargo test --workspace`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use futures::future::BoxFuture;
use moesaic_proto::v1::inference_client::InferenceClient;
use tonic::transport::Channel;

pub struct Up {
    child: Child,
    url: String,
}

impl Up {
    /// Returns when it says that it is ready.
    pub fn start(arguments: &[&str]) -> Self {
        Self::started(&mut command(arguments))
    }

    /// The same, with what it logs from a level on (such as "info,moesaic_coordinator=debug") in a file.
    pub fn start_logged(arguments: &[&str], level: &str, log: File) -> Self {
        Self::started(command(arguments).env("MOESAIC_LOG", level).stderr(log))
    }

    fn started(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.map_while(Result::ok).find(|line| line.starts_with("ready")).expect("it becomes ready");
        let url = ready.split_whitespace().find(|word| word.starts_with("http")).unwrap().to_owned();
        Self { child, url }
    }

    /// Where clients connect to.
    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn client(&self) -> BoxFuture<'_, InferenceClient<Channel>> {
        Box::pin(async move { InferenceClient::connect(self.url.clone()).await.unwrap() })
    }

    /// What `moesaic status --edges` says.
    pub fn status(&self) -> String {
        let said = Command::new(program()).args(["status", "--edges", "--server", &self.url]).output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8(said.stdout).unwrap()
    }

    /// The process of a node, such as ("expert-worker", "e0"), if it lives.
    pub fn node(&self, role: &str, id: &str) -> Option<u32> {
        let is_it = |pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // Behind the name, which may have anything in it, and the state.
            let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0).skip(1);
            let own = format!("--id={id}");
            parent == Some(&self.child.id().to_string())
                && words.next() == Some(role.as_bytes())
                && words.any(|word| word == own.as_bytes())
        };
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_it)
    }

    /// SIGTERM must end it well.
    pub fn stop(mut self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // Its children end when their standard input closes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(["up", "--listen", "127.0.0.1:0"]).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Beside the folder of this test's own program.
fn program() -> PathBuf {
    let program = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("moesaic");
    assert!(program.is_file(), "{} is not built: cargo build --release", program.display());
    program
}
