//! What is run, and where it may write.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::fixtures;

/// Names the `moesaic` to test.
const MOESAIC_VARIABLE: &str = "MOESAIC_BIN";
/// Names the etcd to run, as for `moesaic up`.
const ETCD_VARIABLE: &str = "MOESAIC_ETCD";
/// Names the checkpoint to serve, as for `moesaic up`.
const MODEL_VARIABLE: &str = "MOESAIC_DEMO_MODEL";

#[derive(Clone, Debug)]
pub struct Programs {
    pub moesaic: PathBuf,
    pub etcd: PathBuf,
    /// A folder with a checkpoint.
    pub model: PathBuf,
    pub etcd_skips_fsync: bool,
}

impl Programs {
    pub fn find() -> Result<Self> {
        let moesaic = match std::env::var_os(MOESAIC_VARIABLE) {
            Some(file) => PathBuf::from(file),
            None => {
                let own = std::env::current_exe()?;
                own.parent().context("this program is in no folder")?.join("moesaic")
            }
        };
        let hint = "build it with cargo build --release, or name one with";
        ensure!(moesaic.is_file(), "there is no {}: {hint} {MOESAIC_VARIABLE}", moesaic.display());
        let etcd = match std::env::var_os(ETCD_VARIABLE) {
            Some(file) => PathBuf::from(file),
            None => {
                on_path("etcd").with_context(|| format!("no etcd: install one, or name it with {ETCD_VARIABLE}"))?
            }
        };
        let model = match std::env::var_os(MODEL_VARIABLE) {
            Some(folder) => PathBuf::from(folder),
            None => fixtures::folder("tiny-r1"),
        };
        ensure!(model.is_dir(), "there is no folder {}", model.display());
        let etcd_skips_fsync = help(&etcd, &[]).contains("--unsafe-no-fsync");
        Ok(Self { moesaic, etcd, model, etcd_skips_fsync })
    }

    pub fn knows(&self, role: &str, flag: &str) -> bool {
        help(&self.moesaic, &[role]).contains(flag)
    }
}

/// A new folder in memory if there is such a place: etcd writes all the time. The caller removes it.
pub fn fast_folder() -> Result<PathBuf> {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    Ok(tempfile::Builder::new().prefix("moesaic-faults-").tempdir_in(parent)?.keep())
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn help(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).arg("--help").output();
    let said = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    String::from_utf8_lossy(&said).into_owned()
}
