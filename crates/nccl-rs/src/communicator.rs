//! Communicators: connecting, dividing, watching and ending them.

use std::cell::Cell;
use std::ffi::c_int;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclComm_t;

use crate::config::{Config, argument, not_below};
use crate::error::Error;
use crate::library::{Api, api};
use crate::shared::{Close, Context, Shared, State};
use crate::unique_id::UniqueId;

/// One rank's end of a communicator, on the GPU that was current when it was made.
///
/// One thread at a time uses it, so it can be sent to another thread but not shared; [`Monitor`] is the part for
/// others. Operations are queued by [`group`](crate::group).
///
/// Dropping it aborts it: what is queued is lost, unless [`finalize`](Self::finalize) came before. That keeps the
/// thread for `close_timeout` at most, if nothing has before, and goes on in the background.
pub struct Communicator {
    pub(crate) shared: Arc<Shared>,
    /// Not `Sync`: a group locks several communicators, and two threads could lock the same ones in different orders.
    one_thread: PhantomData<Cell<()>>,
}

/// A communicator that is being connected. Dropping it aborts it, in the background.
#[derive(Debug)]
pub struct Connecting(Option<Communicator>);

/// How far connecting is.
#[derive(Debug)]
pub enum Progress {
    /// For other ranks.
    Waiting(Connecting),
    /// All ranks are.
    Connected(Communicator),
}

/// What other threads may do with a communicator. Lasts longer than it, and then says that it is closed.
#[derive(Clone)]
pub struct Monitor(Arc<Shared>);

/// Operations that are queued or running when a communicator shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outstanding {
    /// There are none: this rank's streams have passed all of them.
    None,
    /// They are aborted first, which leaves their results undefined. For when a peer is gone that they wait for.
    Abort,
}

/// `ncclCommSplit`'s color of those who do not take part.
const NO_COLOR: c_int = -1;
const SHRINK_DEFAULT: c_int = 0;
const SHRINK_ABORT: c_int = 1;

/// Settings of NCCL's that break what is promised here: communicators would block, or children share their parents' ends.
const BLOCKING: &str = "NCCL_COMM_BLOCKING";
const SPLIT_SHARES: &str = "NCCL_COMM_SPLIT_SHARE_RESOURCES";
const SHRINK_SHARES: &str = "NCCL_COMM_SHRINK_SHARE_RESOURCES";

impl Communicator {
    /// Connects `size` ranks, of which this is `rank`. Each has its own GPU, current on the thread that calls (its
    /// primary context), and gives the same `id` and `size`.
    ///
    /// Blocks until all ranks are connected, or `timeout` is over; then the communicator is aborted.
    ///
    /// An error where the environment has `NCCL_COMM_BLOCKING`: nothing could be waited for with a deadline. NCCL's files
    /// (`/etc/nccl.conf`, `~/.nccl.conf`) may not have it either, which is not checked.
    pub fn connect(id: &UniqueId, rank: usize, size: usize, config: &Config, timeout: Duration) -> Result<Self, Error> {
        Self::begin(id, rank, size, config)?.wait(timeout)
    }

    /// As [`connect`](Self::connect), but does not wait for the others. The first call of a process loads the library
    /// and starts CUDA, which takes a second or so.
    pub fn begin(id: &UniqueId, rank: usize, size: usize, config: &Config) -> Result<Connecting, Error> {
        Self::begin_with(api()?, id, rank, size, config)
    }

    pub(crate) fn begin_with(
        api: &'static Api,
        id: &UniqueId,
        rank: usize,
        size: usize,
        config: &Config,
    ) -> Result<Connecting, Error> {
        refuse(BLOCKING)?;
        let ranks = integer("size", size)?;
        let own = integer("rank", rank)?;
        if rank >= size {
            return Err(not_below("rank", rank, size));
        }
        let made = Self::of(Shared::new(api, std::ptr::null_mut(), (rank, size), config, Context::current()));
        config.with_raw(|raw| {
            // SAFETY: NCCL copies the configuration, and keeps the place for the handle no longer than the call.
            made.shared.init(|handle| unsafe { (api.init)(handle, ranks, id.raw(), own, raw) })
        })??;
        Ok(Connecting(Some(made)))
    }

    fn of(shared: Shared) -> Self {
        Self { shared: Arc::new(shared), one_thread: PhantomData }
    }

    /// This rank, from 0 on.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.shared.size
    }

    /// Does not block. Tells failures of the network and of peers too, which NCCL notices while operations run.
    pub fn state(&self) -> State {
        self.shared.state()
    }

    /// A handle for a watchdog.
    pub fn monitor(&self) -> Monitor {
        Monitor(self.shared.clone())
    }

    /// Does something with NCCL's handle, for what this crate has not. The handle may not be kept, waited on or closed:
    /// whoever aborts the communicator waits until this has returned.
    pub fn with_raw<T>(&self, call: impl FnOnce(ncclComm_t) -> T) -> Result<T, Error> {
        Ok(call(self.shared.open()?.0))
    }

    /// Divides the ranks: those with the same color make a communicator, ordered by `key` and then by their rank.
    /// Without a color, this rank is in none.
    ///
    /// All ranks have to call it, with the current communicator ready. Blocks until they have, or `timeout` is over;
    /// then the communicator is aborted. It stays usable otherwise. NCCL takes the communicator's GPU, whichever is current.
    pub fn split(
        &self,
        color: Option<u32>,
        key: i32,
        config: &Config,
        timeout: Duration,
    ) -> Result<Option<Self>, Error> {
        refuse(SPLIT_SHARES)?;
        let color = color.map_or(Ok(NO_COLOR), |color| integer("color", color as usize))?;
        let split = self.shared.api.split;
        config.with_raw(|raw| {
            // SAFETY: the handle is open; NCCL copies the configuration, and the place for the new handle lasts as long
            // as this one.
            self.shared.call("ncclCommSplit", |handle, made| unsafe { split(handle, color, key, made, raw) })
        })??;
        self.shared.wait("splitting", Instant::now(), timeout)?;
        self.take_made(config)
    }

    /// A communicator of all ranks but the excluded ones, in the order they had. This one stays, to be dropped.
    ///
    /// All ranks that are left have to call it, with the same ranks excluded, and those do not. Blocks until they have,
    /// or `timeout` is over; then the communicator is aborted. NCCL refuses where [`state`](Self::state) is `Failed`,
    /// even with `Outstanding::Abort`: connect anew then.
    pub fn shrink(
        &self,
        excluded: &[usize],
        outstanding: Outstanding,
        config: &Config,
        timeout: Duration,
    ) -> Result<Self, Error> {
        refuse(SHRINK_SHARES)?;
        let shrink = self.shared.api.shrink;
        let mut ranks = self.excluded(excluded)?;
        let flags = if outstanding == Outstanding::Abort { SHRINK_ABORT } else { SHRINK_DEFAULT };
        config.with_raw(|raw| {
            // SAFETY: the handle is open; NCCL copies the ranks and the configuration, and the place for the new handle
            // lasts as long as this one.
            self.shared.call("ncclCommShrink", |handle, made| unsafe {
                shrink(handle, ranks.as_mut_ptr(), ranks.len() as c_int, made, raw, flags)
            })
        })??;
        self.shared.wait("shrinking", Instant::now(), timeout)?;
        let made = self.take_made(config)?;
        made.ok_or_else(|| argument("excluded", format!("no communicator was made without {excluded:?}")))
    }

    fn excluded(&self, ranks: &[usize]) -> Result<Vec<c_int>, Error> {
        let mut sorted = ranks.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let problem = match sorted.last() {
            None => "no rank".into(),
            Some(last) if *last >= self.size() => return Err(not_below("excluded", *last, self.size())),
            Some(_) if sorted.contains(&self.rank()) => format!("rank {} is the caller's own", self.rank()),
            Some(_) if sorted.len() < ranks.len() => format!("{ranks:?} has a rank twice"),
            Some(_) => return sorted.into_iter().map(|rank| integer("excluded", rank)).collect(),
        };
        Err(argument("excluded", problem))
    }

    /// What NCCL made of this communicator.
    fn take_made(&self, config: &Config) -> Result<Option<Self>, Error> {
        let (api, handle) = (self.shared.api, self.shared.made()?);
        if handle.is_null() {
            return Ok(None);
        }
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the handle is new, and nobody else's.
        let asked = unsafe { [(api.rank)(handle, &mut rank), (api.size)(handle, &mut size)] };
        let (place, context) = ((rank as usize, size as usize), self.shared.context);
        let made = Self::of(Shared::new(api, handle, place, config, context));
        for (function, code) in ["ncclCommUserRank", "ncclCommCount"].into_iter().zip(asked) {
            api.check(function, code)?;
        }
        Ok(Some(made))
    }

    /// Ends what runs, and the communicator. Later calls wait for the same end. All ranks have to do it, since NCCL
    /// waits for those of the same process, and the others would wait for this one.
    ///
    /// Blocks for `close_timeout` at most; after that it is an error, and goes on in the background. Captured graphs
    /// that use the communicator have to be destroyed before: NCCL waits for that.
    pub fn abort(&self) -> Result<(), Error> {
        self.shared.close(Close::Abort)
    }

    /// Waits for what is queued, and ends the communicator. All ranks have to do it. At the deadline, the communicator
    /// is aborted.
    ///
    /// Blocks for `timeout` and then for `close_timeout` at most. NCCL takes the communicator's GPU, whichever is current.
    pub fn finalize(self, timeout: Duration) -> Result<(), Error> {
        // SAFETY: the handle is open.
        self.shared.call("ncclCommFinalize", |handle, _| unsafe { (self.shared.api.finalize)(handle) })?;
        self.shared.wait("finalizing", Instant::now(), timeout)?;
        self.shared.close(Close::Destroy)
    }
}

/// An error where the environment has that setting, other than 0.
fn refuse(name: &'static str) -> Result<(), Error> {
    let value = std::env::var(name).unwrap_or_default();
    match value.trim() {
        "" | "0" => Ok(()),
        set => Err(argument(name, format!("is {set} in the environment, which breaks what is promised; unset it"))),
    }
}

fn integer(name: &'static str, value: usize) -> Result<c_int, Error> {
    c_int::try_from(value).map_err(|_| argument(name, format!("{value} is too large")))
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.shared.give_up(true);
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator").field("rank", &self.rank()).field("size", &self.size()).finish_non_exhaustive()
    }
}

impl Connecting {
    /// Does not block. The deadline is the caller's: drop this to give up, which does not block either.
    pub fn poll(self) -> Result<Progress, Error> {
        match self.inner().state() {
            State::InProgress => Ok(Progress::Waiting(self)),
            State::Ready => Ok(Progress::Connected(self.into_inner())),
            State::Failed(error) => Err(error),
        }
    }

    /// Blocks until all ranks are connected, or `timeout` is over; then the communicator is aborted.
    pub fn wait(self, timeout: Duration) -> Result<Communicator, Error> {
        // Where it fails, the end is waited for, too.
        let communicator = self.into_inner();
        communicator.shared.wait("connecting", Instant::now(), timeout).map(|()| communicator)
    }

    /// A handle for a watchdog, which may end [`wait`](Self::wait).
    pub fn monitor(&self) -> Monitor {
        self.inner().monitor()
    }

    fn inner(&self) -> &Communicator {
        self.0.as_ref().expect("it is taken with this alone")
    }

    fn into_inner(mut self) -> Communicator {
        self.0.take().expect("it is taken with this alone")
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        if let Some(communicator) = &self.0 {
            communicator.shared.give_up(false);
        }
    }
}

impl Monitor {
    /// As [`Communicator::state`].
    pub fn state(&self) -> State {
        self.0.state()
    }

    /// As [`Communicator::abort`]. Calls in which the communicator's thread waits return an error.
    pub fn abort(&self) -> Result<(), Error> {
        self.0.close(Close::Abort)
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("rank", &self.0.rank).field("size", &self.0.size).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
