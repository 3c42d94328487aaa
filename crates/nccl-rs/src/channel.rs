//! Channels: messages from one process to another, by way of their GPUs; from and to host memory, or what lies on a GPU.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::communicator::{Communicator, Monitor};
use crate::config::{Config, argument, not_below};
use crate::error::Error;
use crate::group::group;
use crate::library::{Version, version};
use crate::memory::{DeviceSlice, DeviceSliceMut, Event};
use crate::rest::{Sleeper, pause};
use crate::shared::{Closing, State};
use crate::unique_id::UniqueId;

mod gpu;

use gpu::Gpu;

/// One direction between two processes: rank 0 sends, and rank 1 receives.
///
/// It is a communicator of two ranks, with a stream and buffers of its own. The buffers are as large as the largest
/// message so far, up to the next power of two; smaller ones stay until the channel ends, which makes twice as much at
/// most, in pinned memory and in the GPU's.
///
/// After an error other than [`Error::Argument`], the communicator is aborted in the background, and the channel answers the
/// same error from then on.
///
/// While a receive waits, a kernel of NCCL's does so too. It keeps a multiprocessor busy (or more: `max_ctas`), and all
/// that waits for the whole GPU waits for it: freeing memory, loading a kernel on first use, and what NCCL does as it
/// closes another channel. Other streams may wait as well, where there are more than `CUDA_DEVICE_MAX_CONNECTIONS`. So
/// receive when a message is about to come, or end the channels that idle first; and where one channel fails beside others, do
/// not wait for its end before theirs.
///
/// A thread that waits for a message asks for it: 200 us all the time, and then between short sleeps, for whose sake Linux is told
/// to wake this thread in time (`PR_SET_TIMERSLACK`) meanwhile. All calls make the context of the channel's GPU current.
///
/// Dropping it aborts the communicator, in the background too: see [`is_closing`](crate::is_closing). What was sent last may
/// then be lost, unless the other side has said that it came. Once the stream is through, memory is kept for the channels to come,
/// since freeing it would wait for all that runs on the GPU. Where aborting fails or takes too long, or the stream does not end, it
/// is left behind: a kernel may still write to it.
pub struct Channel {
    rank: usize,
    /// The error, once there is one.
    open: Result<Open, Error>,
    monitor: Monitor,
    close_timeout: Duration,
    _end: End,
}

struct Open {
    communicator: Communicator,
    gpu: Gpu,
    /// Bytes of the message that came last.
    received: usize,
}

/// A part of a message, where it lies.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// In host memory.
    Host(&'a [u8]),
    /// On the channel's GPU.
    Device(DeviceSlice<'a, u8>),
    /// The same, once this event has come by: the processor need not wait for whoever writes it.
    After(Event<'a>, DeviceSlice<'a, u8>),
}

impl Part<'_> {
    fn event(&self) -> Option<Event<'_>> {
        if let Self::After(event, _) = self { Some(*event) } else { None }
    }

    fn len(&self) -> usize {
        match self {
            Self::Host(bytes) => bytes.len(),
            Self::Device(bytes) | Self::After(_, bytes) => bytes.len,
        }
    }
}

/// Settings under which one channel's thread would wait for another channel's message.
const HARMFUL: [&str; 3] = ["NCCL_COMM_BLOCKING", "NCCL_LAUNCH_ORDER_IMPLICIT", "CUDA_LAUNCH_BLOCKING"];

/// Whether a channel can be made on GPU `ordinal`: there are a driver, that GPU and NCCL, whose version is answered, and the
/// environment does not forbid what channels do. Makes no context on the GPU.
pub fn available(ordinal: usize) -> Result<Version, Error> {
    gpu::device(ordinal)?;
    let loaded = version()?;
    check_environment(|name| std::env::var(name).ok()).map(|()| loaded)
}

fn check_environment(value: impl Fn(&str) -> Option<String>) -> Result<(), Error> {
    let is_set = |name: &&str| value(name).is_some_and(|value| !matches!(value.trim(), "" | "0"));
    match HARMFUL.into_iter().find(is_set) {
        Some(name) => Err(argument(name, "is set: channels would wait for each other's messages; unset it".into())),
        None => Ok(()),
    }
}

impl Channel {
    /// The rank that sends.
    pub const SENDER: usize = 0;
    /// The rank that receives.
    pub const RECEIVER: usize = 1;

    /// Connects as `rank`, on the primary context of GPU `ordinal`, which becomes current on this thread. The other
    /// side is in another process, has another GPU and the other rank, and gives the same `id`.
    ///
    /// Takes memory for messages of `largest` bytes at once, and for larger ones when they come, which may wait for all that
    /// runs on the GPU.
    ///
    /// Blocks until the other side has connected too, or `timeout` is over; then the communicator is aborted. A message
    /// of one byte passes, since NCCL does not connect two ranks before the first. It has `queue_timeout` on top.
    pub fn connect(
        ordinal: usize,
        id: &UniqueId,
        rank: usize,
        largest: usize,
        config: &Config,
        timeout: Duration,
    ) -> Result<Self, Error> {
        Self::connect_with(ordinal, id, rank, largest, config, timeout, drop)
    }

    /// The same, and gives `begun` a handle for a watchdog before it waits.
    pub fn connect_with(
        ordinal: usize,
        id: &UniqueId,
        rank: usize,
        largest: usize,
        config: &Config,
        timeout: Duration,
        begun: impl FnOnce(Monitor),
    ) -> Result<Self, Error> {
        let start = Instant::now();
        if rank > Self::RECEIVER {
            return Err(not_below("rank", rank, 2));
        }
        check_size("largest", largest)?;
        available(ordinal)?;
        let end = End::of(id)?;
        let context = gpu::open(ordinal)?;
        let mut gpu = Gpu::new(context)?;
        // Memory first: later, others' receives may wait.
        let connected = gpu.room(largest).and_then(|_| {
            let connecting = Communicator::begin(id, rank, 2, config)?;
            begun(connecting.monitor());
            connecting.wait(timeout)
        });
        let communicator = match connected {
            Ok(communicator) => communicator,
            Err(error) => {
                gpu.release(config.close_timeout);
                return Err(error);
            }
        };
        let mut channel = Self::over(communicator, gpu, config, end);
        let left = timeout.saturating_sub(start.elapsed());
        match rank {
            Self::SENDER => channel.send(&[0], left)?,
            _ => channel.recv(&mut [0], Some(left))?,
        }
        Ok(channel)
    }

    fn over(communicator: Communicator, gpu: Gpu, config: &Config, end: End) -> Self {
        Self {
            rank: communicator.rank(),
            monitor: communicator.monitor(),
            open: Ok(Open { communicator, gpu, received: 0 }),
            close_timeout: config.close_timeout,
            _end: end,
        }
    }

    /// Sends a message, which is not empty. The other side receives as many bytes.
    ///
    /// Blocks until it has left this GPU, or `timeout` is over; then the communicator is aborted. That it has left does
    /// not say that it came: NCCL has buffers on the way.
    pub fn send(&mut self, bytes: &[u8], timeout: Duration) -> Result<(), Error> {
        // SAFETY: nothing of it is on the GPU.
        unsafe { self.send_parts(bytes.len(), &[(0, Part::Host(bytes))], Duration::ZERO, timeout) }
    }

    /// The same of a message of `len` bytes that is put together on the GPU: each part with the byte where it begins, in this
    /// order. What no part says is any bytes of earlier messages, of this channel's or of one that has ended. Events may take
    /// `events_timeout` to come by; `timeout` counts from then on.
    ///
    /// # Safety
    ///
    /// Parts on the GPU are written to by nobody, once what writes them is through (of [`Part::Device`]: before this is called; of
    /// [`Part::After`]: when its event has come by), until this returns. After an error, they may be read until
    /// [`wait_closed`](crate::wait_closed) says that all channels that have failed are closed; if it does not, for ever.
    pub unsafe fn send_parts(
        &mut self,
        len: usize,
        parts: &[(usize, Part<'_>)],
        events_timeout: Duration,
        timeout: Duration,
    ) -> Result<(), Error> {
        let start = Instant::now();
        self.check(Self::SENDER, len)?;
        let mut free = 0;
        for (at, part) in parts {
            let end = at.checked_add(part.len()).filter(|end| *at >= free && *end <= len);
            free = end.ok_or_else(|| {
                let detail = format!("{} bytes from byte {at} on, where bytes {free} to {len} are free", part.len());
                argument("parts", detail)
            })?;
        }
        self.work(|Open { communicator, gpu, .. }| {
            let address = gpu.room(len)?;
            // SAFETY: the memory is the channel's own, on the GPU of the communicator and of the stream. Nothing uses
            // it at this time: earlier calls have waited for their operations, or the channel would not be open. It
            // stays until the stream is through, or the communicator is aborted and then the stream is through. The
            // other side is a channel in another process; what it queues can make this fail or hang, and no more.
            unsafe {
                for (at, part) in parts {
                    match part {
                        Part::Host(bytes) => gpu.queue_write(*at, bytes)?,
                        Part::Device(bytes) => gpu.queue_copy_in(*at, *bytes)?,
                        Part::After(event, bytes) => {
                            gpu.queue_wait(*event)?;
                            gpu.queue_copy_in(*at, *bytes)?;
                        }
                    }
                }
                let values = DeviceSlice::<u8>::from_raw(address, len);
                group(|group| group.send(communicator, values, Self::RECEIVER, gpu.stream()))?;
            }
            let events = || parts.iter().filter_map(|(_, part)| part.event());
            let are_past = || events().try_fold(true, |all, event| Ok(all && gpu.is_past(event)?));
            let sending = if events().next().is_some() {
                wait("computing what is sent", communicator, are_past, start, Some(events_timeout))?;
                Instant::now()
            } else {
                start
            };
            wait("sending", communicator, || gpu.is_through(), sending, Some(timeout))
        })
    }

    /// Receives a message, as long as `bytes`, which is not empty.
    ///
    /// Blocks until it is there, or `timeout` is over; then the communicator is aborted. Without a timeout, until it is
    /// there, or NCCL notices a failure, or a [`Monitor`] aborts. A kernel of NCCL's waits on the GPU for as long.
    pub fn recv(&mut self, bytes: &mut [u8], timeout: Option<Duration>) -> Result<(), Error> {
        self.recv_beginning(bytes.len(), bytes, timeout)
    }

    /// The same of a message of `len` bytes, of which the first ones are wanted at once. It stays on the GPU until the next
    /// one is received, for [`Channel::take`] and [`Channel::take_on_device`].
    pub fn recv_beginning(&mut self, len: usize, beginning: &mut [u8], timeout: Option<Duration>) -> Result<(), Error> {
        let start = Instant::now();
        self.check(Self::RECEIVER, len)?;
        self.check_received(len, 0, beginning.len())?;
        self.work(|Open { communicator, gpu, received }| {
            *received = 0;
            let address = gpu.room(len)?;
            // SAFETY: as in `send_parts`.
            unsafe {
                let values = DeviceSliceMut::<u8>::from_raw(address, len);
                group(|group| group.recv(communicator, values, Self::SENDER, gpu.stream()))?;
            }
            wait("receiving", communicator, || gpu.is_through(), start, timeout)?;
            *received = len;
            // Not queued behind the receive: copies of others to the processor might have to wait for one that waits.
            take(communicator, gpu, 0, beginning, TAKE_TIMEOUT)
        })
    }

    /// Copies from the last message, from byte `at` on.
    pub fn take(&mut self, at: usize, to: &mut [u8], timeout: Duration) -> Result<(), Error> {
        self.check_received(self.received(), at, to.len())?;
        self.work(|Open { communicator, gpu, .. }| take(communicator, gpu, at, to, timeout))
    }

    /// The same to a place on the GPU.
    ///
    /// # Safety
    ///
    /// Whatever uses that place is through before this is called, and nobody uses it until this returns. After an error, it may
    /// be written to until [`wait_closed`](crate::wait_closed) says that all channels that have failed are closed; if it does not,
    /// for ever.
    pub unsafe fn take_on_device(
        &mut self,
        at: usize,
        to: DeviceSliceMut<'_, u8>,
        timeout: Duration,
    ) -> Result<(), Error> {
        self.check_received(self.received(), at, to.len)?;
        self.work(|Open { communicator, gpu, .. }| {
            // SAFETY: the message has as many bytes, and the stream is through.
            unsafe { gpu.queue_copy_out(at, to)? };
            wait("taking", communicator, || gpu.is_through(), Instant::now(), Some(timeout))
        })
    }

    /// Bytes of the last message, if there is one.
    fn received(&self) -> usize {
        self.open.as_ref().map_or(0, |open| open.received)
    }

    fn check_received(&self, len: usize, at: usize, bytes: usize) -> Result<(), Error> {
        match at.checked_add(bytes) {
            Some(end) if end <= len || self.open.is_err() => Ok(()),
            _ => Err(argument("at", format!("{bytes} bytes from byte {at} on, of a message of {len}"))),
        }
    }

    /// Why it is of no use any more, if it is not.
    pub fn error(&self) -> Option<&Error> {
        self.open.as_ref().err()
    }

    /// A handle for a watchdog. Lasts longer than the channel.
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    fn check(&self, rank: usize, bytes: usize) -> Result<(), Error> {
        if self.rank != rank {
            return Err(argument("rank", format!("{} cannot do what {rank} does: 0 sends, 1 receives", self.rank)));
        }
        if bytes == 0 { Err(argument("bytes", "an empty message".into())) } else { check_size("bytes", bytes) }
    }

    /// Does something with a channel that is open, and ends the channel where that fails.
    fn work(&mut self, work: impl FnOnce(&mut Open) -> Result<(), Error>) -> Result<(), Error> {
        work(self.open.as_mut().map_err(|error| error.clone())?).inspect_err(|error| self.end(error))
    }

    fn end(&mut self, error: &Error) {
        let Ok(Open { communicator, gpu, .. }) = std::mem::replace(&mut self.open, Err(error.clone())) else { return };
        let (closing, timeout) = (Closing::begin(), self.close_timeout);
        let end = move || {
            let _closing = closing;
            match communicator.abort() {
                // NCCL has nothing queued any more, so that the stream ends.
                Ok(()) => gpu.release(timeout),
                // The GPU's part is left behind. So is the communicator: dropping it would wait once more.
                Err(_) => std::mem::forget((communicator, gpu)),
            }
        };
        // Where this fails, the closure is dropped, and with it the communicator; a `Gpu` has no destructor.
        let _ = thread::Builder::new().name("nccl-end".into()).spawn(end);
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.end(&Error::Aborted { rank: self.rank, size: 2 });
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("rank", &self.rank).field("error", &self.error()).finish_non_exhaustive()
    }
}

/// An end of a channel in this process, which is the only one here: between ranks of one process, NCCL writes right
/// into the receiver's memory, as much as the sender says. Between processes, each side counts for itself.
#[derive(Debug)]
struct End(UniqueId);

impl End {
    fn of(id: &UniqueId) -> Result<Self, Error> {
        let mut ends = Self::all();
        if ends.contains(id) {
            return Err(argument("id", "is that of a channel that has an end in this process".into()));
        }
        ends.push(*id);
        Ok(Self(*id))
    }

    fn all() -> MutexGuard<'static, Vec<UniqueId>> {
        static ALL: Mutex<Vec<UniqueId>> = Mutex::new(Vec::new());
        ALL.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        Self::all().retain(|id| *id != self.0);
    }
}

/// No message is larger than a slice.
fn check_size(name: &'static str, bytes: usize) -> Result<(), Error> {
    let too_large = || argument(name, format!("{bytes} bytes; expected {} at most", isize::MAX));
    if bytes <= isize::MAX as usize { Ok(()) } else { Err(too_large()) }
}

/// Copies from the last message, which has as many bytes.
fn take(communicator: &Communicator, gpu: &mut Gpu, at: usize, to: &mut [u8], timeout: Duration) -> Result<(), Error> {
    // SAFETY: the message has them, and the stream is through.
    unsafe { gpu.queue_read(at..at + to.len())? };
    wait("taking", communicator, || gpu.is_through(), Instant::now(), Some(timeout))?;
    // SAFETY: they are read, and the stream is through again.
    unsafe { gpu.take(at, to) };
    Ok(())
}

/// Waits for the GPU.
fn wait(
    action: &'static str,
    communicator: &Communicator,
    is_through: impl FnMut() -> Result<bool, Error>,
    start: Instant,
    timeout: Option<Duration>,
) -> Result<(), Error> {
    let (elapsed, mut sleeper) = (|| start.elapsed(), Sleeper::default());
    let rest = |pause| sleeper.rest(pause);
    let is_through = poll(is_through, || communicator.state(), timeout, elapsed, rest)?;
    let after = timeout.unwrap_or_default();
    let late = || Error::Timeout { action, rank: communicator.rank(), size: communicator.size(), after };
    if is_through { Ok(()) } else { Err(late()) }
}

/// Asks until all is done or something has failed. False at the deadline; what is done then counts.
///
/// The state is asked after what is done: aborting ends the stream's work too, and is known before it does.
fn poll(
    mut is_done: impl FnMut() -> Result<bool, Error>,
    mut state: impl FnMut() -> State,
    timeout: Option<Duration>,
    mut elapsed: impl FnMut() -> Duration,
    mut rest: impl FnMut(Duration),
) -> Result<bool, Error> {
    loop {
        let waited = elapsed();
        let is_done = is_done()?;
        if let State::Failed(error) = state() {
            return Err(error);
        }
        let left = timeout.map(|timeout| timeout.saturating_sub(waited));
        if is_done || left.is_some_and(|left| left.is_zero()) {
            return Ok(is_done);
        }
        let pause = pause(waited, SPIN, LONGEST_PAUSE);
        rest(left.map_or(pause, |left| pause.min(left)));
    }
}

/// To copy what has come, with nothing before it.
const TAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// A message passes within some 100 µs where the other side is ready, so that a sleep, which takes 50 µs more than was
/// asked for, would be most of it.
const SPIN: Duration = Duration::from_micros(200);
/// A receiver that idles asks a thousand times a second, which should take a hundredth of a core.
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests;
