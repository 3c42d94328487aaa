//! Operations, queued as one.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{CUdeviceptr, CUstream};
use cudarc::nccl::sys::{ncclComm_t, ncclRedOp_t};

use crate::communicator::Communicator;
use crate::config::argument;
use crate::error::Error;
use crate::library::Api;
use crate::memory::{DataType, DeviceSlice, DeviceSliceMut, Element, Stream};
use crate::shared::Shared;

/// How values are reduced. `Average` is the sum, divided by the number of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    Sum,
    Product,
    Max,
    Min,
    Average,
}

impl ReduceOp {
    fn code(self) -> c_int {
        let op = match self {
            Self::Sum => ncclRedOp_t::ncclSum,
            Self::Product => ncclRedOp_t::ncclProd,
            Self::Max => ncclRedOp_t::ncclMax,
            Self::Min => ncclRedOp_t::ncclMin,
            Self::Average => ncclRedOp_t::ncclAvg,
        };
        op as c_int
    }
}

/// Collects operations, which NCCL then queues as one.
///
/// Sends and receives of a group run at the same time, in any order; so whatever ranks exchange with each other belongs
/// into one group, and so do all of the communicators that one thread has. `body` only collects: where it fails or
/// panics, NCCL has seen nothing.
///
/// Blocks until all is queued on its streams, not until it has run. For that, NCCL starts a thread for each group of
/// non-blocking communicators; where two ranks meet for the first time, it also connects them, which can take seconds
/// and needs the peer's group. A communicator that is not done after its `queue_timeout` is aborted. After an error of
/// NCCL's, the communicators of the group are failed, and what was queued is undefined.
///
/// While a stream is being captured into a graph, operations become a part of the graph; their addresses and counts are
/// fixed.
pub fn group<'a, T>(body: impl FnOnce(&mut Group<'a>) -> Result<T, Error>) -> Result<T, Error> {
    let mut group = Group { communicators: Vec::new(), operations: Vec::new() };
    let value = body(&mut group)?;
    group.queue()?;
    Ok(value)
}

/// What is to be queued. Operations are checked when they are added; an error leaves the group as it was.
///
/// # Safety
///
/// All operations have this contract:
/// - The memory is on the communicator's GPU, and the stream too.
/// - The memory stays until the stream has passed the operation, also where queueing it fails; or until aborting the
///   communicator has succeeded, and the stream is through. That is longer than the call and than the borrow. Where the
///   stream is captured, it stays as long as the graph can be launched.
/// - Until then, what is sent is not written to and what is received is not used, but by work that is ordered by the
///   stream.
/// - The stream exists until this group is queued.
/// - The other ranks queue what matches it, with as many values of the same type: NCCL leaves open what happens
///   otherwise.
pub struct Group<'a> {
    communicators: Vec<&'a Arc<Shared>>,
    operations: Vec<Queued>,
}

struct Queued {
    /// Index into `communicators`.
    communicator: usize,
    operation: Operation,
    count: usize,
    data_type: DataType,
    stream: CUstream,
}

enum Operation {
    Send { from: CUdeviceptr, peer: c_int },
    Receive { to: CUdeviceptr, peer: c_int },
    AllReduce { from: CUdeviceptr, to: CUdeviceptr, op: ReduceOp },
    AllGather { from: CUdeviceptr, to: CUdeviceptr },
}

#[allow(clippy::missing_safety_doc, reason = "the type has one contract for all")]
impl<'a> Group<'a> {
    /// To `peer`, which receives as many values in a group of its own.
    pub unsafe fn send<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        peer: usize,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let operation = Operation::Send { from: values.address, peer: checked_peer(communicator, peer)? };
        self.add::<T>(communicator, operation, values.len, stream)
    }

    /// From `peer`, which sends as many values in a group of its own.
    pub unsafe fn receive<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSliceMut<'_, T>,
        peer: usize,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let operation = Operation::Receive { to: values.address, peer: checked_peer(communicator, peer)? };
        self.add::<T>(communicator, operation, values.len, stream)
    }

    /// Reduces the values that the ranks have at the same index; all of them get the result.
    pub unsafe fn all_reduce<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        results: DeviceSliceMut<'_, T>,
        op: ReduceOp,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        if results.len != values.len {
            return Err(argument("results", format!("{} values, of {}", results.len, values.len)));
        }
        let operation = Operation::AllReduce { from: values.address, to: results.address, op };
        self.add::<T>(communicator, operation, values.len, stream)
    }

    /// As [`all_reduce`](Self::all_reduce), over the values themselves.
    pub unsafe fn all_reduce_in_place<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSliceMut<'_, T>,
        op: ReduceOp,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let operation = Operation::AllReduce { from: values.address, to: values.address, op };
        self.add::<T>(communicator, operation, values.len, stream)
    }

    /// All ranks' values, in the order of the ranks: `results` is `size` times as long as `values`.
    pub unsafe fn all_gather<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        results: DeviceSliceMut<'_, T>,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let size = communicator.size();
        if Some(results.len) != values.len.checked_mul(size) {
            let problem = format!("{} values, of {} from each of {size} ranks", results.len, values.len);
            return Err(argument("results", problem));
        }
        let operation = Operation::AllGather { from: values.address, to: results.address };
        self.add::<T>(communicator, operation, values.len, stream)
    }

    fn add<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        operation: Operation,
        count: usize,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let shared = &communicator.shared;
        shared.api.require("an 8-bit float", T::TYPE.needs())?;
        let known = self.communicators.iter().position(|known| Arc::ptr_eq(known, shared));
        let communicator = known.unwrap_or(self.communicators.len());
        if known.is_none() {
            self.communicators.push(shared);
        }
        self.operations.push(Queued { communicator, operation, count, data_type: T::TYPE, stream: stream.raw });
        Ok(())
    }

    fn queue(self) -> Result<(), Error> {
        let Some(first) = self.communicators.first() else { return Ok(()) };
        let api = first.api;
        // Held until the end, so that nobody closes a communicator that NCCL has in its list.
        let handles = self.communicators.iter().map(|shared| shared.open()).collect::<Result<Vec<_>, _>>()?;
        // SAFETY: ended below, on this thread, whatever happens between.
        api.check("ncclGroupStart", unsafe { (api.group_start)() })?;
        // SAFETY: the handles are open; the rest is what the caller promised for each operation.
        let queued =
            self.operations.iter().try_for_each(|queued| unsafe { queued.call(api, handles[queued.communicator].0) });
        // SAFETY: started above. Where an operation was refused, NCCL drops the others.
        let ended = api.check("ncclGroupEnd", unsafe { (api.group_end)() });
        drop(handles);
        queued.and(ended)?;
        // Each of them is waited for, also where one fails: a later operation would find it in progress.
        let waits = self.communicators.iter().map(|shared| shared.wait("queueing a group", shared.queue_timeout));
        waits.fold(Ok(()), Result::and)
    }
}

impl Queued {
    /// # Safety
    ///
    /// The handle is open, and the contract of [`Group`] holds.
    unsafe fn call(&self, api: &Api, handle: ncclComm_t) -> Result<(), Error> {
        let (count, data_type, stream) = (self.count, self.data_type.code(), self.stream);
        // SAFETY: the caller's promise.
        let (function, code) = unsafe {
            match self.operation {
                Operation::Send { from, peer } => {
                    ("ncclSend", (api.send)(pointer(from), count, data_type, peer, handle, stream))
                }
                Operation::Receive { to, peer } => {
                    ("ncclRecv", (api.receive)(pointer(to), count, data_type, peer, handle, stream))
                }
                Operation::AllReduce { from, to, op } => {
                    let (from, to) = (pointer(from), pointer(to));
                    ("ncclAllReduce", (api.all_reduce)(from, to, count, data_type, op.code(), handle, stream))
                }
                Operation::AllGather { from, to } => {
                    ("ncclAllGather", (api.all_gather)(pointer(from), pointer(to), count, data_type, handle, stream))
                }
            }
        };
        api.check(function, code)
    }
}

fn pointer(address: CUdeviceptr) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

fn checked_peer(communicator: &Communicator, peer: usize) -> Result<c_int, Error> {
    let size = communicator.size();
    // A size fits, so a peer does.
    if peer < size { Ok(peer as c_int) } else { Err(argument("peer", format!("{peer} of {size} ranks"))) }
}

#[cfg(test)]
mod tests;
