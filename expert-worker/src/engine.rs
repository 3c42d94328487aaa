//! The compute thread and its front: frames are checked and queued on the caller's thread, computed on one thread of
//! the worker (with the kernels' pool under it), and answered from there. A caller of this process that only waits for
//! its answer computes it itself, if nobody else is computing. A GPU that fails ends the worker: what waits is refused, so
//! that other workers are asked.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use moesaic_dispatch::{Activations, ExpertHost, Refusal, ReplySender, RequestFrame, Shape};
use moesaic_kernels::cuda::GpuError;
use moesaic_kernels::{Backend, Dtype};
use moesaic_proto::v1::RefusalReason;
use tokio::sync::oneshot;

use crate::core::inbox::{Inbox, Job};
use crate::experts::Scratch;
use crate::shard::Shards;

/// What one call of the kernels may produce: bounds the thread's scratch memory whatever callers ask for, and is
/// thousands of rows for any model there is.
const RESULT_BYTES_MAX: usize = 64 << 20;

/// What the worker has computed since it started.
#[derive(Debug, Default)]
pub struct Profile {
    nanoseconds: AtomicU64,
    /// Pairs of a row and an expert.
    rows: AtomicU64,
    /// By reason.
    refused: [AtomicU64; 6],
}

impl Profile {
    fn add(&self, time: Duration, rows: usize) {
        self.nanoseconds.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
    }

    fn refuse(&self, reason: RefusalReason) {
        self.refused[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Frames that were not computed.
    pub fn refused(&self, reason: RefusalReason) -> u64 {
        self.refused[reason as usize].load(Ordering::Relaxed)
    }

    /// Time spent computing.
    pub fn busy(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }

    /// Pairs of a row and an expert that were computed.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }
}

/// The worker as transports see it.
pub struct Engine {
    shape: Shape,
    backend: Backend,
    shards: Shards,
    /// Held by who computes.
    scratch: Mutex<Scratch>,
    profile: Arc<Profile>,
    inbox: Mutex<Inbox>,
    /// Something is in the inbox, or it stops.
    news: Condvar,
}

/// The compute thread's end: resolves when it has ended, which before `Engine::stop` means that it panicked.
pub type Ended = oneshot::Receiver<()>;

impl Engine {
    /// Starts the compute thread; it ends after `stop`, when all that waits is answered.
    pub fn start(
        shape: Shape,
        backend: Backend,
        frames_max: usize,
        profile: Arc<Profile>,
    ) -> std::io::Result<(Arc<Self>, Ended)> {
        let inbox = Mutex::new(Inbox::new(frames_max));
        let engine = Arc::new(Self {
            shape,
            scratch: Mutex::new(Scratch::of(&backend)),
            backend,
            shards: Shards::default(),
            profile,
            inbox,
            news: Condvar::new(),
        });
        let (alive, ended) = oneshot::channel();
        let worker = engine.clone();
        thread::Builder::new().name("experts".into()).spawn(move || {
            worker.backend.pin_caller();
            worker.run();
            drop(alive);
        })?;
        Ok((engine, ended))
    }

    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Frames that wait to be computed.
    pub fn waiting(&self) -> usize {
        self.inbox().len()
    }

    /// Refuses new frames from now on. The compute thread answers what waits and ends.
    pub fn stop(&self) {
        self.inbox().stop();
        self.news.notify_all();
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, frame: &RequestFrame) -> Result<(), Refusal> {
        if !matches!(frame.activations(), Activations::F32(_)) && self.backend.dtype() == Dtype::F32 {
            let detail = format!("header: flags {:#06x} say bf16 rows; this worker computes f32", frame.header.flags);
            return Err(Refusal::new(RefusalReason::Malformed, detail));
        }
        self.shards.get(frame.header.epoch)?.check(frame)
    }

    fn run(&self) {
        loop {
            let jobs = self.wait();
            if jobs.is_empty() {
                return;
            }
            self.compute(jobs, &mut self.scratch.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Terms of one call of the kernels, and of the frames that are taken together.
    fn terms_max(&self) -> usize {
        (RESULT_BYTES_MAX / (self.shape.hidden * size_of::<f32>())).max(1)
    }

    /// The next jobs, of one layer and epoch; none when it is time to end.
    fn wait(&self) -> Vec<Job> {
        let idle = |inbox: &mut Inbox| inbox.is_empty() && !inbox.is_stopping();
        let mut inbox = self.news.wait_while(self.inbox(), idle).unwrap_or_else(PoisonError::into_inner);
        inbox.take(self.terms_max())
    }

    fn compute(&self, mut jobs: Vec<Job>, scratch: &mut Scratch) {
        let start = Instant::now();
        jobs.iter_mut().for_each(|job| job.span.event("computing"));
        let shard = match self.shards.get(jobs[0].frame.header.epoch) {
            Ok(shard) => shard,
            // Retired while they waited.
            Err(refusal) => return jobs.into_iter().for_each(|job| job.reply.send(Err(refusal.clone()))),
        };
        let hidden = self.shape.hidden;
        let frames: Vec<&RequestFrame> = jobs.iter().map(|job| &job.frame).collect();
        let layer = frames[0].header.layer;
        let held = |expert| shard.expert(layer, expert).expect("checked when the frame was taken");
        let terms = frames.iter().map(|frame| frame.terms().len()).sum();
        match scratch.answers(&frames, held, hidden, self.terms_max()) {
            Ok(answers) => jobs.into_iter().zip(answers).for_each(|(job, answer)| job.reply.send(Ok(answer))),
            Err(error) => {
                let refusal = self.refusal(&error);
                return jobs.into_iter().for_each(|job| job.reply.send(Err(refusal.clone())));
            }
        }
        // What comes meanwhile is computed together.
        if let Err(error) = scratch.finish() {
            self.lose_gpu(&error);
        }
        self.profile.add(start.elapsed(), terms);
    }

    /// Where memory is missing, others' rows and answers take it for a while; else the GPU is lost, and this worker with it.
    fn refusal(&self, error: &GpuError) -> Refusal {
        if matches!(error, GpuError::Full { .. }) {
            return Refusal::new(RefusalReason::Busy, error.to_string());
        }
        self.lose_gpu(error);
        Refusal::new(RefusalReason::Stopping, format!("the worker's GPU has failed: {error}"))
    }

    fn lose_gpu(&self, error: &GpuError) {
        tracing::error!(%error, "the GPU has failed: this worker ends");
        self.stop();
    }
}

impl ExpertHost for Engine {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn submit(&self, frame: RequestFrame, reply: ReplySender) {
        let taken = match self.check(&frame) {
            Ok(()) => self.inbox().offer(Job::new(frame, reply)),
            Err(refusal) => Err(Box::new((Job::new(frame, reply), refusal))),
        };
        match taken.map_err(|given_back| *given_back) {
            Ok(()) => self.news.notify_one(),
            Err((mut job, refusal)) => {
                job.span.fail(&refusal);
                tracing::debug!(header = ?job.frame.header, %refusal, "frame refused");
                self.profile.refuse(refusal.reason);
                job.reply.send(Err(refusal));
            }
        }
    }

    fn answer(&self, frame: RequestFrame, reply: ReplySender) {
        let idle = self.scratch.try_lock().ok().filter(|_| self.inbox().is_idle());
        match idle {
            Some(mut scratch) if self.check(&frame).is_ok() => self.compute(vec![Job::new(frame, reply)], &mut scratch),
            _ => self.submit(frame, reply),
        }
    }
}
