//! The settings that both kinds of workers have.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use clap::ArgAction;
use moesaic_dispatch::nccl::{Fabric, InvalidTransport, Transport};
use moesaic_kernels::cuda::{DeviceChoice, Missing, UnknownDevice};
use moesaic_kernels::{Backend, DtypeChoice, Pool, UnknownDtype};
use moesaic_node::config::{self, InvalidAddress, InvalidBytes, OutOfRange, check_address, check_ranges, read_bytes};
use moesaic_node::membership::MemberSettings;

#[derive(Clone, Debug, clap::Args)]
pub struct WorkerSettings {
    /// The checkpoint's folder
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub member: MemberSettings,
    /// Where to serve; port 0 takes any free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// What it stands on and may fail with (a host, a rack): copies of an expert go to different ones; its own id if not
    /// given
    #[arg(long)]
    pub node: Option<String>,
    /// f32; bf16, by the faster of bf16-fma and bf16-dp on a processor, or one of these; int8, on a processor
    #[arg(long, default_value = "bf16")]
    pub dtype: String,
    /// cpu, cuda:N or auto: the first GPU if there is one. A GPU computes bf16
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// How much of a GPU's memory to take, as 64GiB; nine tenths of what is free if not given
    #[arg(long, value_name = "SIZE")]
    pub device_memory: Option<String>,
    /// How rows travel between workers: grpc; nccl, from GPU to GPU where both have one; auto: that if it is there
    #[arg(long, default_value = "auto")]
    pub transport: String,
    /// Threads of the kernels; all cores if not given
    #[arg(long, value_name = "N", default_value_t = cores(), hide_default_value = true)]
    pub threads: usize,
    /// Keep each of them to a core of its own, among those that the process may use
    // Two workers on one machine would share their first cores.
    #[arg(
        long, num_args = 0..=1, default_value_t = false, default_missing_value = "true", value_name = "BOOL",
        action = ArgAction::Set
    )]
    pub pin: bool,
    /// How long running work may go on after a stop, and others may take to load what this worker alone has
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub drain_seconds: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidSettings {
    #[error("model is not set; give the checkpoint's folder")]
    Model,
    #[error(transparent)]
    Range(#[from] OutOfRange),
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    #[error(transparent)]
    Dtype(#[from] UnknownDtype),
    #[error(transparent)]
    Device(#[from] UnknownDevice),
    #[error(transparent)]
    Bytes(#[from] InvalidBytes),
    #[error(transparent)]
    Transport(#[from] InvalidTransport),
    #[error("device is {device:?}: {missing}")]
    NoDevice { device: String, missing: Missing },
}

impl Default for WorkerSettings {
    fn default() -> Self {
        config::defaults()
    }
}

impl WorkerSettings {
    /// The checkpoint's folder.
    pub fn model(&self) -> Result<&Path, InvalidSettings> {
        self.model.as_deref().ok_or(InvalidSettings::Model)
    }

    /// Opens the device.
    pub fn backend(&self) -> Result<Backend, InvalidSettings> {
        let pool = || if self.pin { Pool::pinned(self.threads) } else { Pool::new(self.threads) };
        Backend::open(self.device()?, self.dtype()?, self.device_memory()?, pool)
            .map_err(|missing| InvalidSettings::NoDevice { device: self.device.clone(), missing })
    }

    /// Opens what moves rows from GPU to GPU, if there is to be any.
    pub fn fabric(&self, backend: &Backend) -> Result<Option<Arc<dyn Fabric>>, InvalidSettings> {
        let device = backend.gpu();
        let gpu = device.map(|_| self.device().map(DeviceChoice::number)).transpose()?;
        Ok(self.transport()?.open(gpu, device, self.member.tls.is_some())?)
    }

    /// Checks what the types do not.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        check_ranges(&[("threads", self.threads as u64, 1024)])?;
        check_address(self.listen, self.member.advertise.as_deref())?;
        self.device_memory()?;
        self.transport()?;
        self.device()?;
        self.dtype().map(drop)
    }

    pub fn dtype(&self) -> Result<DtypeChoice, InvalidSettings> {
        Ok(self.dtype.parse()?)
    }

    fn device(&self) -> Result<DeviceChoice, InvalidSettings> {
        Ok(self.device.parse()?)
    }

    fn transport(&self) -> Result<Transport, InvalidSettings> {
        Ok(self.transport.parse()?)
    }

    fn device_memory(&self) -> Result<Option<usize>, InvalidSettings> {
        let read = |given: &String| Ok(read_bytes("device_memory", given)? as usize);
        self.device_memory.as_ref().map(read).transpose()
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_is_named_with_its_bounds() {
        type Change = fn(&mut WorkerSettings);
        let table: [(Change, &str); 7] = [
            (|s| s.transport = "rdma".into(), "transport `rdma` is none of `auto`, `grpc` and `nccl`"),
            (|s| s.threads = 0, "threads is 0; expected 1 to 1024"),
            (|s| s.dtype = "f8".into(), "dtype `f8`"),
            (|s| s.device = "gpu".into(), "device `gpu` is none of"),
            (|s| s.device_memory = Some("8 apples".into()), "device_memory is \"8 apples\""),
            (|s| s.member.advertise = Some("nowhere".into()), "advertise is \"nowhere\""),
            (|s| s.listen = SocketAddr::from(([0, 0, 0, 0], 1)), "set advertise"),
        ];
        WorkerSettings::default().validate().unwrap();
        for (change, expected) in table {
            let mut settings = WorkerSettings::default();
            change(&mut settings);
            let error = settings.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
        let error = WorkerSettings::default().model().unwrap_err().to_string();
        assert_eq!(error, "model is not set; give the checkpoint's folder");
    }

    #[test]
    fn a_gpu_computes_bf16_alone() {
        let settings = WorkerSettings { device: "cuda:0".into(), dtype: "f32".into(), ..WorkerSettings::default() };
        let error = settings.backend().unwrap_err().to_string();
        assert_eq!(error, "device is \"cuda:0\": it computes bf16 in its own way; set dtype to bf16, or device to cpu");
    }
}
