//! Operations, queued as one.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::{CUdeviceptr, CUstream};
use cudarc::nccl::sys::{ncclComm_t, ncclRedOp_t};

use crate::communicator::Communicator;
use crate::config::{argument, not_below};
use crate::error::Error;
use crate::library::{Api, Collective};
use crate::memory::{DataType, DeviceSlice, DeviceSliceMut, Element, Stream};
use crate::shared::Shared;

/// How values are reduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReduceOp {
    /// Of all ranks' values.
    Sum,
    /// Of all ranks' values.
    Product,
    /// The largest.
    Max,
    /// The smallest.
    Min,
    /// The sum, divided by the number of ranks.
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
/// and needs the peer's group. A communicator that is not done `queue_timeout` after the group has begun is aborted, in the
/// background. After an error of NCCL's, the communicators of the group are failed, and what was queued is undefined.
///
/// No GPU has to be current on the thread: each communicator has its own. While a stream is being captured into a graph,
/// operations become a part of the graph; their addresses and counts are fixed.
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
/// All operations have this contract, which no type could see to, since a peer takes part in it:
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
    from: CUdeviceptr,
    to: CUdeviceptr,
    count: usize,
    data_type: DataType,
    stream: CUstream,
}

enum Operation {
    Send { peer: c_int },
    Recv { peer: c_int },
    Broadcast { root: c_int },
    Reduce { op: ReduceOp, root: c_int },
    AllReduce { op: ReduceOp },
    ReduceScatter { op: ReduceOp },
    AllGather,
    AllToAll(Collective),
}

impl<'a> Group<'a> {
    /// To `peer`, which receives as many values in a group of its own.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn send<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        peer: usize,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let operation = Operation::Send { peer: checked("peer", communicator, peer)? };
        self.add::<T>(communicator, operation, (values.address, 0), values.len, stream)
    }

    /// From `peer`, which sends as many values in a group of its own.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn recv<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSliceMut<'_, T>,
        peer: usize,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let operation = Operation::Recv { peer: checked("peer", communicator, peer)? };
        self.add::<T>(communicator, operation, (0, values.address), values.len, stream)
    }

    /// The values of rank `root` go to all others, into their `values`.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn broadcast<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSliceMut<'_, T>,
        root: usize,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let operation = Operation::Broadcast { root: checked("root", communicator, root)? };
        self.add::<T>(communicator, operation, (values.address, values.address), values.len, stream)
    }

    /// Reduces the values that the ranks have at the same index. Rank `root` gets the results, and gives a place for them.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn reduce<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        results: Option<DeviceSliceMut<'_, T>>,
        (op, root): (ReduceOp, usize),
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let operation = Operation::Reduce { op, root: checked("root", communicator, root)? };
        if results.is_some() != (root == communicator.rank()) {
            return Err(argument("results", format!("rank {root} has a place for them, and no other")));
        }
        let results = results.map(|results| same_len(values.len, &results).map(|()| results.address)).transpose()?;
        self.add::<T>(communicator, operation, (values.address, results.unwrap_or(0)), values.len, stream)
    }

    /// Reduces the values that the ranks have at the same index; all of them get the results.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn all_reduce<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        results: DeviceSliceMut<'_, T>,
        op: ReduceOp,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        same_len(values.len, &results)?;
        let places = (values.address, results.address);
        self.add::<T>(communicator, Operation::AllReduce { op }, places, values.len, stream)
    }

    /// As [`all_reduce`](Self::all_reduce), over the values themselves.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn all_reduce_in_place<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSliceMut<'_, T>,
        op: ReduceOp,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let places = (values.address, values.address);
        self.add::<T>(communicator, Operation::AllReduce { op }, places, values.len, stream)
    }

    /// As [`all_reduce`](Self::all_reduce), but each rank gets a part of the results, in the order of the ranks: `values` is
    /// `size` times as long as `results`.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn reduce_scatter<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        results: DeviceSliceMut<'_, T>,
        op: ReduceOp,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        for_all_ranks(communicator, "values", values.len, results.len)?;
        let places = (values.address, results.address);
        self.add::<T>(communicator, Operation::ReduceScatter { op }, places, results.len, stream)
    }

    /// All ranks' values, in the order of the ranks: `results` is `size` times as long as `values`.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn all_gather<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        results: DeviceSliceMut<'_, T>,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        for_all_ranks(communicator, "results", results.len, values.len)?;
        let places = (values.address, results.address);
        self.add::<T>(communicator, Operation::AllGather, places, values.len, stream)
    }

    /// Each rank's values are a part for each rank, in the order of the ranks, and so are its results. They are as long, and
    /// do not overlap. From NCCL 2.28 on; before, it is a send and a receive for each rank.
    ///
    /// # Safety
    ///
    /// That of [`Group`].
    pub unsafe fn all_to_all<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        values: DeviceSlice<'_, T>,
        results: DeviceSliceMut<'_, T>,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let operation = Operation::AllToAll(communicator.shared.api.all_to_all()?);
        same_len(values.len, &results)?;
        let count = values.len / communicator.size();
        for_all_ranks(communicator, "values", values.len, count)?;
        self.add::<T>(communicator, operation, (values.address, results.address), count, stream)
    }

    fn add<T: Element>(
        &mut self,
        communicator: &'a Communicator,
        operation: Operation,
        (from, to): (CUdeviceptr, CUdeviceptr),
        count: usize,
        stream: Stream<'_>,
    ) -> Result<(), Error> {
        let shared = &communicator.shared;
        let known = self.communicators.iter().position(|known| Arc::ptr_eq(known, shared));
        let communicator = known.unwrap_or(self.communicators.len());
        if known.is_none() {
            self.communicators.push(shared);
        }
        let (data_type, stream) = (T::TYPE, stream.raw);
        self.operations.push(Queued { communicator, operation, from, to, count, data_type, stream });
        Ok(())
    }

    fn queue(self) -> Result<(), Error> {
        let Some(first) = self.communicators.first() else { return Ok(()) };
        let (api, start) = (first.api, Instant::now());
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
        let waits = self.communicators.iter().map(|of| of.wait("queueing a group", start, of.queue_timeout));
        waits.fold(Ok(()), Result::and)
    }
}

impl Queued {
    /// # Safety
    ///
    /// The handle is open, and the contract of [`Group`] holds.
    unsafe fn call(&self, api: &Api, handle: ncclComm_t) -> Result<(), Error> {
        let (from, to) = (pointer(self.from), pointer(self.to));
        let (count, data_type, stream) = (self.count, self.data_type.code(), self.stream);
        // SAFETY: the caller's promise.
        let (function, code) = unsafe {
            match self.operation {
                Operation::Send { peer } => ("ncclSend", (api.send)(from, count, data_type, peer, handle, stream)),
                Operation::Recv { peer } => ("ncclRecv", (api.recv)(to, count, data_type, peer, handle, stream)),
                Operation::Broadcast { root } => {
                    ("ncclBroadcast", (api.broadcast)(from, to, count, data_type, root, handle, stream))
                }
                Operation::Reduce { op, root } => {
                    ("ncclReduce", (api.reduce)(from, to, count, data_type, op.code(), root, handle, stream))
                }
                Operation::AllReduce { op } => {
                    ("ncclAllReduce", (api.all_reduce)(from, to, count, data_type, op.code(), handle, stream))
                }
                Operation::ReduceScatter { op } => {
                    ("ncclReduceScatter", (api.reduce_scatter)(from, to, count, data_type, op.code(), handle, stream))
                }
                Operation::AllGather => ("ncclAllGather", (api.all_gather)(from, to, count, data_type, handle, stream)),
                Operation::AllToAll(call) => ("ncclAlltoAll", call(from, to, count, data_type, handle, stream)),
            }
        };
        api.check(function, code)
    }
}

fn pointer(address: CUdeviceptr) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

/// One of the ranks.
fn checked(name: &'static str, communicator: &Communicator, rank: usize) -> Result<c_int, Error> {
    let size = communicator.size();
    // A size fits, so a rank does.
    if rank < size { Ok(rank as c_int) } else { Err(not_below(name, rank, size)) }
}

fn same_len<T: Element>(values: usize, results: &DeviceSliceMut<'_, T>) -> Result<(), Error> {
    match results.len {
        len if len == values => Ok(()),
        len => Err(argument("results", format!("there is room for {len}; expected as many as values, {values}"))),
    }
}

/// As many values as there are ranks, times `each`.
fn for_all_ranks(communicator: &Communicator, name: &'static str, len: usize, each: usize) -> Result<(), Error> {
    let size = communicator.size();
    match each.checked_mul(size) {
        Some(all) if all == len => Ok(()),
        _ => Err(argument(name, format!("{len} of them; expected {each} for each of {size} ranks"))),
    }
}

#[cfg(test)]
mod tests;
