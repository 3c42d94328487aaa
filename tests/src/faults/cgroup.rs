//! A control group with a bound on memory, of version 1 or 2.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::guard::{Guard, quoted};

const ROOT: &str = "/sys/fs/cgroup";

pub struct MemoryGroup {
    pub folder: PathBuf,
    limit: &'static str,
    /// The file that counts what was killed for want of memory.
    events: &'static str,
}

impl MemoryGroup {
    /// Fails where this program may not make one.
    pub fn make(name: &str, guard: &mut Guard) -> Result<Self> {
        let (parent, limit, events) = place()?;
        let folder = parent.join(name);
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        guard.at_end_soon(&format!("rmdir {}", quoted(&folder)))?;
        Ok(Self { folder, limit, events })
    }

    pub fn limit(&self, bytes: u64) -> Result<()> {
        let file = self.folder.join(self.limit);
        fs::write(&file, bytes.to_string()).with_context(|| format!("cannot write {}", file.display()))
    }

    pub fn kills(&self) -> Result<u64> {
        let text = fs::read_to_string(self.folder.join(self.events))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).context("no count of kills")?;
        Ok(count.trim().parse()?)
    }
}

/// Where a group can be made. Version 1: below our own. Version 2: below the root, since a group that has both
/// processes and groups cannot bound memory.
fn place() -> Result<(PathBuf, &'static str, &'static str)> {
    let own = fs::read_to_string("/proc/self/cgroup").context("no control groups here")?;
    let memory = |line: &str| Some(line.split_once(":memory:")?.1.trim_start_matches('/').to_owned());
    if let Some(own) = own.lines().find_map(memory) {
        let folder = Path::new(ROOT).join("memory");
        let inner = folder.join(own);
        let folder = if inner.is_dir() { inner } else { folder };
        return Ok((folder, "memory.limit_in_bytes", "memory.oom_control"));
    }
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.subtree_control"));
    let controllers = controllers.context("no control groups here")?;
    ensure!(controllers.split_whitespace().any(|name| name == "memory"), "control groups here do not bound memory");
    Ok((ROOT.into(), "memory.max", "memory.events"))
}
