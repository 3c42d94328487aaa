//! Groups over an NCCL that does what the test says.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::time::Duration;

use half::{bf16, f16};

use super::*;
use crate::config::Config;
use crate::fake::{Fake, Script};
use crate::library::IN_PROGRESS;
use crate::memory::E5m2;
use crate::shared::State;

fn values<'a, T: Element>(len: usize) -> DeviceSlice<'a, T> {
    // SAFETY: the fake does not look at it.
    unsafe { DeviceSlice::from_raw(4096, len) }
}

fn room<'a, T: Element>(len: usize) -> DeviceSliceMut<'a, T> {
    // SAFETY: the fake does not look at it.
    unsafe { DeviceSliceMut::from_raw(8192, len) }
}

fn stream<'a>() -> Stream<'a> {
    // SAFETY: the fake does not look at it.
    unsafe { Stream::from_raw(null_mut()) }
}

fn send<'a>(group: &mut Group<'a>, communicator: &'a Communicator) -> Result<(), Error> {
    // SAFETY: the fake does not look at it.
    unsafe { group.send(communicator, values::<f32>(3), 2, stream()) }
}

fn recv<'a>(group: &mut Group<'a>, communicator: &'a Communicator) -> Result<(), Error> {
    // SAFETY: the fake does not look at it.
    unsafe { group.recv(communicator, room::<f32>(3), 2, stream()) }
}

#[test]
fn operations_are_queued_in_order_and_waited_for() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    fake.script().answers.insert("end", IN_PROGRESS);
    fake.script().states = [IN_PROGRESS, IN_PROGRESS].into();
    let answer = group(|group| {
        send(group, &connected)?;
        recv(group, &connected).map(|()| 5)
    });
    assert_eq!(answer, Ok(5));
    assert_eq!(fake.script().calls, ["start", "send", "recv", "end", "state", "state", "state"]);
}

/// In the order of NCCL's header, with its numbers for types and ways to reduce. The fake is rank 1 of 4.
#[test]
fn nccl_gets_each_operations_arguments() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    let (from, to, on) = (4096, 8192, 16384);
    // SAFETY: the fake does not look at it.
    let stream = || unsafe { Stream::from_raw(std::ptr::without_provenance_mut(on)) };
    // SAFETY: the fake does not look at it.
    let queued = group(|group| unsafe {
        group.send(&connected, values::<f32>(3), 2, stream())?;
        group.recv(&connected, room::<bf16>(5), 0, stream())?;
        group.broadcast(&connected, room::<f64>(5), 3, stream())?;
        group.reduce(&connected, values::<i32>(6), None, (ReduceOp::Product, 2), stream())?;
        group.reduce(&connected, values::<i32>(6), Some(room(6)), (ReduceOp::Min, 1), stream())?;
        group.all_reduce(&connected, values::<u8>(3), room(3), ReduceOp::Max, stream())?;
        group.all_reduce_in_place(&connected, room::<f16>(3), ReduceOp::Sum, stream())?;
        group.reduce_scatter(&connected, values::<u32>(8), room(2), ReduceOp::Average, stream())?;
        group.all_gather(&connected, values::<i64>(3), room(12), stream())?;
        group.all_to_all(&connected, values::<E5m2>(8), room(8), stream())
    });
    assert_eq!(queued, Ok(()));
    let expected: [(_, &[usize]); 10] = [
        ("send", &[from, 3, 7, 2, on]),
        ("recv", &[to, 5, 9, 0, on]),
        ("broadcast", &[to, to, 5, 8, 3, on]),
        ("reduce", &[from, 0, 6, 2, 1, 2, on]),
        ("reduce", &[from, to, 6, 2, 3, 1, on]),
        ("all_reduce", &[from, to, 3, 1, 2, on]),
        ("all_reduce", &[to, to, 3, 6, 0, on]),
        ("reduce_scatter", &[from, to, 2, 3, 4, on]),
        ("all_gather", &[from, to, 3, 4, on]),
        ("all_to_all", &[from, to, 2, 11, on]),
    ];
    assert_eq!(fake.script().arguments, expected.map(|(name, arguments)| (name, arguments.to_vec())));
}

#[test]
fn nothing_is_queued_where_the_body_fails_or_panics() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    let failed: Result<(), _> = group(|group| {
        send(group, &connected)?;
        Err(argument("body", "no".into()))
    });
    assert_eq!(failed, Err(argument("body", "no".into())));
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        group(|group| -> Result<(), _> {
            send(group, &connected)?;
            panic!("in the body")
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(group(|_| Ok(())), Ok(()));
    assert!(fake.script().calls.is_empty());
}

#[test]
fn a_refused_operation_ends_the_group() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    fake.script().answers = [("recv", 5), ("end", 4)].into();
    let error = group(|group| {
        send(group, &connected)?;
        recv(group, &connected)?;
        send(group, &connected)
    });
    assert_eq!(error.expect_err("refused").to_string(), "ncclRecv: ncclInvalidUsage: as it was told to");
    assert_eq!(fake.script().calls, ["start", "send", "recv", "end"]);
}

#[test]
fn a_failed_start_has_no_end() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    fake.script().answers = [("start", 3)].into();
    let error = group(|group| send(group, &connected)).expect_err("refused");
    assert_eq!(error.to_string(), "ncclGroupStart: ncclInternalError: as it was told to");
    assert_eq!(fake.script().calls, ["start"]);
}

#[test]
fn a_group_that_is_never_queued_aborts_its_communicator() {
    let fake = Fake::new(Script::default());
    let queue_timeout = Duration::from_millis(20);
    let connected = fake.connected(&Config { queue_timeout, ..Config::default() });
    fake.script().states = vec![IN_PROGRESS; 100_000].into();
    let late = Error::Timeout { action: "queueing a group", rank: 1, size: 4, after: queue_timeout };
    assert_eq!(group(|group| send(group, &connected)), Err(late));
    let aborted = Error::Aborted { rank: 1, size: 4 };
    assert_eq!(connected.state(), State::Failed(aborted.clone()));
    assert_eq!(group(|group| send(group, &connected)), Err(aborted));
    assert_eq!(fake.count("start"), 1);
    drop(connected);
    assert_eq!(fake.count("abort"), 1);
}

#[test]
fn one_group_may_have_several_communicators() {
    let (first, second) = (Fake::new(Script::default()), Fake::new(Script::default()));
    let (one, two) = (first.connected(&Config::default()), second.connected(&Config::default()));
    first.script().states = [6].into();
    second.script().states = [IN_PROGRESS].into();
    let error = group(|group| {
        send(group, &one)?;
        recv(group, &two)?;
        send(group, &one)
    });
    assert_eq!(error.expect_err("a peer left").to_string(), "a queued operation: ncclRemoteError: as it was told to");
    // The thread's groups are seen by the fake that was connected last.
    assert_eq!(first.script().calls, ["send", "send", "state"]);
    assert_eq!(second.script().calls, ["start", "recv", "end", "state", "state"]);
}

#[test]
fn communicators_of_a_group_have_one_deadline() {
    let queue_timeout = Duration::from_millis(200);
    let config = Config { queue_timeout, ..Config::default() };
    let fakes = [(); 4].map(|()| Fake::new(Script { abort_takes: Duration::from_secs(60), ..Script::default() }));
    let connected = fakes.map(|fake| fake.connected(&config));
    for fake in fakes {
        fake.script().states = vec![IN_PROGRESS; 100_000].into();
    }
    let start = Instant::now();
    let queued = group(|group| connected.iter().try_for_each(|communicator| send(group, communicator)));
    assert!(matches!(queued, Err(Error::Timeout { .. })), "{queued:?}");
    let took = start.elapsed();
    assert!(took >= queue_timeout && took < Duration::from_secs(20), "{took:?}");
    fakes.iter().for_each(|fake| fake.wait_for("abort"));
    // Each would wait for its end.
    std::mem::forget(connected);
}

#[test]
fn arguments_are_checked_before_nccl_sees_them() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    let (sum, to_root) = (ReduceOp::Sum, (ReduceOp::Sum, 1));
    // SAFETY: nothing is queued.
    let errors = unsafe {
        [
            group(|group| group.send(&connected, values::<u8>(1), 4, stream())),
            group(|group| group.recv(&connected, room::<u8>(1), 9, stream())),
            group(|group| group.broadcast(&connected, room::<u8>(1), 4, stream())),
            group(|group| group.reduce(&connected, values::<u8>(1), None, to_root, stream())),
            group(|group| group.reduce(&connected, values::<u8>(3), Some(room(2)), to_root, stream())),
            group(|group| group.all_reduce(&connected, values::<u8>(3), room(2), sum, stream())),
            group(|group| group.reduce_scatter(&connected, values::<u8>(7), room(2), sum, stream())),
            group(|group| group.all_gather(&connected, values::<u8>(3), room(11), stream())),
            group(|group| group.all_to_all(&connected, values::<u8>(7), room(7), stream())),
        ]
    };
    let texts = [
        "peer: 4 is not below 4, the number of ranks",
        "peer: 9 is not below 4, the number of ranks",
        "root: 4 is not below 4, the number of ranks",
        "results: rank 1 has a place for them, and no other",
        "results: there is room for 2; expected as many as values, 3",
        "results: there is room for 2; expected as many as values, 3",
        "values: 7 of them; expected 2 for each of 4 ranks",
        "results: 11 of them; expected 3 for each of 4 ranks",
        "values: 7 of them; expected 1 for each of 4 ranks",
    ];
    assert_eq!(errors.map(|error| error.expect_err("refused").to_string()), texts);
    assert!(fake.script().calls.is_empty());
}

#[test]
fn what_a_library_has_not_is_said() {
    let connecting = Fake::new(Script::default()).begin((2, 27, 5), &Config::default()).expect("begins");
    let connected = connecting.wait(Duration::from_secs(1)).expect("connects");
    // SAFETY: the fake does not look at it.
    let error = group(|group| unsafe { group.all_to_all(&connected, values::<u8>(4), room(4), stream()) });
    assert_eq!(
        error.expect_err("it is old").to_string(),
        "ncclAlltoAll needs NCCL 2.28.0 or newer, and 2.27.5 is loaded"
    );
}
