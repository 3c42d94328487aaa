//! Groups over an NCCL that does what the test says.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::time::Duration;

use super::*;
use crate::config::Config;
use crate::fake::{Fake, Script};
use crate::library::IN_PROGRESS;
use crate::memory::E4m3;
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

fn receive<'a>(group: &mut Group<'a>, communicator: &'a Communicator) -> Result<(), Error> {
    // SAFETY: the fake does not look at it.
    unsafe { group.receive(communicator, room::<f32>(3), 2, stream()) }
}

#[test]
fn operations_are_queued_in_order_and_waited_for() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    fake.script().answers.insert("end", IN_PROGRESS);
    fake.script().states = [IN_PROGRESS, IN_PROGRESS].into();
    let answer = group(|group| {
        send(group, &connected)?;
        receive(group, &connected)?;
        // SAFETY: the fake does not look at it.
        unsafe {
            group.all_reduce(&connected, values::<u8>(3), room(3), ReduceOp::Max, stream())?;
            group.all_reduce_in_place(&connected, room::<u8>(3), ReduceOp::Sum, stream())?;
            group.all_gather(&connected, values::<i64>(3), room(12), stream())?;
        }
        Ok(5)
    });
    assert_eq!(answer, Ok(5));
    let operations = ["send", "receive", "all_reduce", "all_reduce", "all_gather"];
    let expected = [&["start"][..], &operations, &["end", "state", "state", "state"]].concat();
    assert_eq!(fake.script().calls, expected);
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
    fake.script().answers = [("receive", 5), ("end", 4)].into();
    let error = group(|group| {
        send(group, &connected)?;
        receive(group, &connected)?;
        send(group, &connected)
    });
    assert_eq!(error.expect_err("refused").to_string(), "ncclRecv: ncclInvalidUsage: as it was told to");
    assert_eq!(fake.script().calls, ["start", "send", "receive", "end"]);
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
        receive(group, &two)?;
        send(group, &one)
    });
    assert_eq!(error.expect_err("a peer left").to_string(), "communicating: ncclRemoteError: as it was told to");
    // The thread's groups are seen by the fake that was connected last.
    assert_eq!(first.script().calls, ["send", "send", "state"]);
    assert_eq!(second.script().calls, ["start", "receive", "end", "state", "state"]);
}

#[test]
fn arguments_are_checked_before_nccl_sees_them() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    // SAFETY: nothing is queued.
    let errors = unsafe {
        [
            group(|group| group.send(&connected, values::<u8>(1), 4, stream())),
            group(|group| group.receive(&connected, room::<u8>(1), 9, stream())),
            group(|group| group.all_reduce(&connected, values::<u8>(3), room(2), ReduceOp::Sum, stream())),
            group(|group| group.all_gather(&connected, values::<u8>(3), room(11), stream())),
        ]
    };
    let texts = [
        "peer: 4 of 4 ranks",
        "peer: 9 of 4 ranks",
        "results: 2 values, of 3",
        "results: 11 values, of 3 from each of 4 ranks",
    ];
    assert_eq!(errors.map(|error| error.expect_err("refused").to_string()), texts);
    assert!(fake.script().calls.is_empty());
}

#[test]
fn an_old_library_has_no_8_bit_floats() {
    let connecting = Fake::new(Script::default()).begin((2, 20, 5), &Config::default()).expect("begins");
    let connected = connecting.wait(Duration::from_secs(1)).expect("connects");
    // SAFETY: the fake does not look at it.
    let error = group(|group| unsafe { group.send(&connected, values::<E4m3>(3), 2, stream()) });
    assert_eq!(
        error.expect_err("it is old").to_string(),
        "an 8-bit float needs NCCL 2.24.0 or newer, and 2.20.5 is loaded"
    );
}
