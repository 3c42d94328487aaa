//! A whole cluster of processes: three etcds, two coordinators, three attention workers and four expert workers, each
//! expert on two of them. Each can be killed and restarted by its name, and the cluster says when it is whole.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::future::join_all;
use tokio::time::{Instant, sleep};

use super::cgroup::MemoryGroup;
use super::guard::{Guard, quoted};
use super::net::Net;
use super::process::{Launch, Process, Signals};
use super::programs::{self, Programs};
use super::view::{self, View};

pub const ETCDS: [&str; 3] = ["m0", "m1", "m2"];
pub const COORDINATORS: [&str; 2] = ["c0", "c1"];
pub const ATTENTION_WORKERS: [&str; 3] = ["a0", "a1", "a2"];
pub const EXPERT_WORKERS: [&str; 4] = ["e0", "e1", "e2", "e3"];

const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;
const DOOR_PORT: u16 = 8080;
const WORKER_PORT: u16 = 7000;

/// Longer than a cluster of the demo model takes to be whole, on a busy machine too.
const WHOLE_MAX: Duration = Duration::from_secs(60);
/// Each look is some connections, on a machine that has other things to do.
const WHOLE_POLL: Duration = Duration::from_millis(100);
/// How long a process may take to end well: the bar of F16.
pub const DRAIN_MAX: Duration = Duration::from_secs(30);

/// What clusters differ in. Faults of the same shape share one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// In a network of its own, which can be cut; otherwise on loopback addresses.
    pub net: bool,
    /// Attention workers in control groups, where there are such.
    pub bounded: bool,
    /// Of each attention worker.
    pub cache_tokens: usize,
    /// Of each coordinator.
    pub sequences_max: usize,
}

impl Shape {
    pub const PLAIN: Self = Self { net: false, bounded: false, cache_tokens: 16_384, sequences_max: 1024 };
}

pub struct Cluster {
    pub shape: Shape,
    pub net: Option<Net>,
    /// Of the attention workers, by name.
    pub groups: BTreeMap<&'static str, MemoryGroup>,
    /// Why there are none, if they were asked for.
    pub no_groups: Option<String>,
    /// Bytes of each attention worker before its first request.
    pub base: BTreeMap<&'static str, u64>,
    /// From the start of the expert workers to the moment when all experts were there.
    pub load_time: Duration,
    pub logs: PathBuf,
    programs: Programs,
    launches: BTreeMap<String, Launch>,
    /// Those that should run.
    processes: BTreeMap<String, Process>,
    /// The last field: what it undoes is in use until the processes have ended.
    guard: Guard,
}

impl Cluster {
    /// Returns when it is whole.
    pub async fn start(shape: &Shape, programs: &Programs, logs: PathBuf) -> Result<Self> {
        let mut cluster = Self::prepare(shape, programs, logs).await?;
        match cluster.start_all().await {
            Ok(()) => Ok(cluster),
            Err(error) => {
                cluster.end().await;
                Err(error)
            }
        }
    }

    /// Its network, its control groups and how each process is started.
    async fn prepare(shape: &Shape, programs: &Programs, logs: PathBuf) -> Result<Self> {
        let mut guard = Guard::new()?;
        let hosts = [&ETCDS[..], &COORDINATORS, &ATTENTION_WORKERS, &EXPERT_WORKERS].concat();
        let net = match shape.net {
            true => Some(Net::make(&hosts, &mut guard).await?),
            false => None,
        };
        let mut cluster = Self {
            shape: shape.clone(),
            net,
            groups: BTreeMap::new(),
            no_groups: None,
            base: BTreeMap::new(),
            load_time: Duration::ZERO,
            logs,
            programs: programs.clone(),
            launches: BTreeMap::new(),
            processes: BTreeMap::new(),
            guard,
        };
        if shape.bounded {
            cluster.no_groups = cluster.make_groups().err().map(|error| format!("{error:#}"));
        }
        cluster.plan()?;
        Ok(cluster)
    }

    async fn start_all(&mut self) -> Result<()> {
        for name in ETCDS {
            self.restart(name)?;
        }
        self.until_registry().await?;
        for name in COORDINATORS.into_iter().chain(ATTENTION_WORKERS) {
            self.restart(name)?;
        }
        let begin = Instant::now();
        for name in EXPERT_WORKERS {
            self.restart(name)?;
        }
        self.until_whole().await?;
        self.load_time = begin.elapsed();
        for name in ATTENTION_WORKERS {
            self.base.insert(name, self.process(name)?.memory("VmRSS")?);
        }
        Ok(())
    }

    fn make_groups(&mut self) -> Result<()> {
        for name in ATTENTION_WORKERS {
            let group = MemoryGroup::make(&format!("faults{}-{name}", std::process::id()), &mut self.guard)?;
            self.groups.insert(name, group);
        }
        Ok(())
    }

    /// How each process is started.
    fn plan(&mut self) -> Result<()> {
        let data = programs::fast_folder()?;
        self.guard.at_end_soon(&format!("rm -rf {}", quoted(&data)))?;
        for name in ETCDS {
            self.add(name, self.programs.etcd.clone(), self.etcd(name, &data)?)?;
        }
        for name in COORDINATORS {
            let listen = format!("{}:{DOOR_PORT}", self.address(name)?);
            let mut arguments = self.role("coordinator", name, &listen, &self.programs.model)?;
            arguments.extend(["--expert-workers", "4", "--sequences-max"].map(str::to_owned));
            arguments.push(self.shape.sequences_max.to_string());
            if self.programs.knows("coordinator", "--allow-anyone") {
                arguments.push("--allow-anyone".into());
            }
            if self.programs.knows("coordinator", "--replicas") {
                arguments.extend(["--replicas", "2"].map(str::to_owned));
            }
            self.add(name, self.programs.moesaic.clone(), arguments)?;
        }
        for name in ATTENTION_WORKERS {
            let listen = format!("{}:{WORKER_PORT}", self.address(name)?);
            let mut arguments = self.role("attention-worker", name, &listen, &self.programs.model)?;
            let cache_tokens = self.shape.cache_tokens.to_string();
            arguments.extend(["--dtype", "f32", "--threads", "1", "--cache-tokens", &cache_tokens].map(str::to_owned));
            self.add(name, self.programs.moesaic.clone(), arguments)?;
        }
        for name in EXPERT_WORKERS {
            self.add_expert_worker(name, &self.programs.model.clone())?;
        }
        Ok(())
    }

    /// Also one more than there are, for a fault that needs it.
    pub fn add_expert_worker(&mut self, name: &str, model: &Path) -> Result<()> {
        let listen = format!("{}:{WORKER_PORT}", self.address(name)?);
        let mut arguments = self.role("expert-worker", name, &listen, model)?;
        arguments.extend(["--dtype", "f32", "--threads", "1"].map(str::to_owned));
        if self.programs.knows("expert-worker", "--node") {
            arguments.extend(["--node".to_owned(), name.replace('e', "n")]);
        }
        self.add(name, self.programs.moesaic.clone(), arguments)
    }

    fn role(&self, role: &str, name: &str, listen: &str, model: &Path) -> Result<Vec<String>> {
        let etcds = ETCDS.iter().map(|etcd| Ok(format!("{}:{ETCD_PORT}", self.address(etcd)?)));
        let registry = format!("etcd://{}", etcds.collect::<Result<Vec<_>>>()?.join(","));
        let model = model.display().to_string();
        let arguments =
            [role, "--model", &model, "--id", name, "--cluster", "faults", "--listen", listen, "--registry", &registry];
        Ok(arguments.map(str::to_owned).into())
    }

    fn etcd(&self, name: &str, data: &Path) -> Result<Vec<String>> {
        let peer = |name: &str| self.address(name).map(|address| format!("http://{address}:{ETCD_PEER_PORT}"));
        let all = ETCDS.iter().map(|&name| Ok(format!("{name}={}", peer(name)?))).collect::<Result<Vec<_>>>()?;
        let (own, client) = (peer(name)?, format!("http://{}:{ETCD_PORT}", self.address(name)?));
        let data = data.join(name).display().to_string();
        let pairs = [
            ("--name", name),
            ("--data-dir", &data),
            ("--listen-client-urls", &client),
            ("--advertise-client-urls", &client),
            ("--listen-peer-urls", &own),
            ("--initial-advertise-peer-urls", &own),
            ("--initial-cluster", &all.join(",")),
            ("--heartbeat-interval", "50"),
            ("--election-timeout", "500"),
            ("--logger", "zap"),
            ("--log-level", "warn"),
        ];
        let mut arguments: Vec<String> = pairs.into_iter().flat_map(|(k, v)| [k.to_owned(), v.to_owned()]).collect();
        if self.programs.etcd_skips_fsync {
            arguments.push("--unsafe-no-fsync".into());
        }
        Ok(arguments)
    }

    fn add(&mut self, name: &str, program: PathBuf, arguments: Vec<String>) -> Result<()> {
        let launch = Launch {
            name: name.to_owned(),
            program,
            arguments,
            log: self.logs.join(format!("{name}.log")),
            namespace: self.net.as_ref().map(|net| net.namespace(name)),
            cgroup: self.groups.get(name).map(|group| group.folder.clone()),
        };
        self.launches.insert(name.to_owned(), launch);
        Ok(())
    }

    /// Each process has one of its own: no connection's own port can then be in the way of a restart.
    fn address(&self, name: &str) -> Result<Ipv4Addr> {
        if let Some(net) = &self.net {
            return net.address(name);
        }
        let number = name[1..].parse::<u8>().with_context(|| format!("{name} has no number"))?;
        let id = std::process::id();
        Ok(Ipv4Addr::new(127, 64 + (id >> 8 & 63) as u8, id as u8, 16 * (name.as_bytes()[0] - b'a' + 1) + number))
    }

    // === Processes ===

    pub fn restart(&mut self, name: &str) -> Result<()> {
        let launch = self.launches.get(name).with_context(|| format!("there is no process {name}"))?;
        ensure!(!self.processes.contains_key(name), "{name} runs already");
        let process = launch.start()?;
        self.processes.insert(name.to_owned(), process);
        Ok(())
    }

    pub async fn kill(&mut self, name: &str) -> Result<()> {
        self.take(name)?.kill().await
    }

    /// SIGTERM, and waits for the end.
    pub async fn terminate(&mut self, name: &str) -> Result<ExitStatus> {
        self.take(name)?.terminate(DRAIN_MAX).await
    }

    pub fn signals(&self, name: &str) -> Result<Signals> {
        self.process(name)?.signals()
    }

    /// The most that it has held so far, in bytes.
    pub fn memory_peak(&self, name: &str) -> Result<u64> {
        self.process(name)?.memory("VmHWM")
    }

    pub fn log(&self, name: &str) -> Result<String> {
        let file = self.logs.join(format!("{name}.log"));
        std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    }

    /// Some once it has ended, which it may.
    pub async fn ended(&mut self, name: &str) -> Result<Option<ExitStatus>> {
        let status = self.processes.get_mut(name).with_context(|| format!("{name} does not run"))?.ended().await?;
        if status.is_some() {
            self.processes.remove(name);
        }
        Ok(status)
    }

    fn process(&self, name: &str) -> Result<&Process> {
        self.processes.get(name).with_context(|| format!("{name} does not run"))
    }

    fn take(&mut self, name: &str) -> Result<Process> {
        self.processes.remove(name).with_context(|| format!("{name} does not run"))
    }

    /// Returns when nothing runs any more. Dropped instead, it ends soon after.
    pub async fn end(mut self) {
        join_all(std::mem::take(&mut self.processes).into_values().map(Process::kill)).await;
    }

    /// Nobody has ended but those that were made to.
    pub async fn check(&mut self) -> Result<()> {
        for (name, process) in &mut self.processes {
            if let Some(status) = process.ended().await? {
                bail!("{name} has ended by itself: {status}; see {}", self.logs.join(format!("{name}.log")).display());
            }
        }
        Ok(())
    }

    // === What the cluster says of itself ===

    /// Coordinators, as clients call them.
    pub fn doors(&self) -> Result<Vec<String>> {
        COORDINATORS.iter().map(|name| self.door(name)).collect()
    }

    pub fn door(&self, name: &str) -> Result<String> {
        Ok(format!("http://{}:{DOOR_PORT}", self.address(name)?))
    }

    /// Of all that should run.
    pub async fn view(&self) -> Result<View> {
        let running = |names: &'static [&'static str]| names.iter().filter(|name| self.processes.contains_key(**name));
        let doors = running(&COORDINATORS).map(|name| self.door(name)).collect::<Result<Vec<_>>>()?;
        let workers = running(&ATTENTION_WORKERS);
        let workers = workers.map(|name| Ok((*name, format!("http://{}:{WORKER_PORT}", self.address(name)?))));
        let workers = workers.collect::<Result<Vec<_>>>()?;
        let doors = join_all(doors.iter().map(|door| view::door(door))).await;
        let loads = join_all(workers.iter().map(|(_, url)| view::load(url))).await;
        let loads = workers.iter().zip(loads).map(|((name, _), load)| (*name, load)).collect();
        Ok(View { doors, loads })
    }

    /// Waits until the etcds have a leader.
    pub async fn until_registry(&mut self) -> Result<()> {
        let begin = Instant::now();
        let url = format!("http://{}:{ETCD_PORT}/health", self.address(ETCDS[0])?);
        while !view::is_healthy(&url).await {
            self.check().await?;
            ensure!(begin.elapsed() < WHOLE_MAX, "etcd has no leader after {WHOLE_MAX:?}");
            sleep(WHOLE_POLL).await;
        }
        Ok(())
    }

    /// Waits until each expert has two live copies and every worker can reach them. Returns how long that took.
    pub async fn until_whole(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        loop {
            self.check().await?;
            match self.view().await?.why_not_whole(EXPERT_WORKERS.len()) {
                None => return Ok(begin.elapsed()),
                Some(reason) if begin.elapsed() > WHOLE_MAX => bail!("not whole after {WHOLE_MAX:?}: {reason}"),
                Some(_) => sleep(WHOLE_POLL).await,
            }
        }
    }
}
