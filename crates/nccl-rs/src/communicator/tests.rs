//! Communicators over an NCCL that does what the test says.

use std::time::{Duration, Instant};

use super::*;
use crate::error::Code;
use crate::fake::{Fake, Script};
use crate::library::IN_PROGRESS;

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_millis(20);
const BUSY: [c_int; 3] = [IN_PROGRESS; 3];
const REMOTE_ERROR: c_int = 6;

fn busy_for_ever() -> Script {
    Script { states: vec![IN_PROGRESS; 100_000].into(), ..Script::default() }
}

fn aborted() -> Error {
    Error::Aborted { rank: 1, size: 4 }
}

#[test]
fn connecting_polls_until_all_ranks_are_there() {
    let fake = Fake::new(Script { states: BUSY.into(), ..Script::default() });
    let connecting = fake.begin((2, 28, 9), &Config::default()).expect("begins");
    let connected = connecting.wait(SECOND).expect("connects");
    assert_eq!((connected.rank(), connected.size(), connected.state()), (1, 4, State::Ready));
    assert_eq!(fake.script().calls, ["init", "state", "state", "state", "state", "state"]);
    assert_eq!(fake.script().arguments, [("init", vec![4, 1])]);
    drop(connected);
    assert_eq!(fake.count("abort"), 1);
}

#[test]
fn connecting_can_be_polled() {
    let fake = Fake::new(Script { states: [IN_PROGRESS].into(), ..Script::default() });
    let connecting = fake.begin((2, 28, 9), &Config::default()).expect("begins");
    let Ok(Progress::Waiting(connecting)) = connecting.poll() else { panic!("connected too early") };
    let Ok(Progress::Connected(connected)) = connecting.poll() else { panic!("not connected") };
    assert_eq!(connected.rank(), 1);
}

#[test]
fn dropping_what_is_not_connected_aborts_it() {
    let fake = Fake::new(busy_for_ever());
    drop(fake.begin((2, 28, 9), &Config::default()).expect("begins"));
    fake.wait_for("abort");
    assert_eq!(fake.script().calls, ["init", "abort"]);
}

#[test]
fn giving_up_while_connecting_does_not_block() {
    let abort_takes = 60 * SECOND;
    let [waiting, failing] = [vec![IN_PROGRESS; 100_000], vec![REMOTE_ERROR]]
        .map(|states| Fake::new(Script { abort_takes, states: states.into(), ..Script::default() }));
    let start = Instant::now();
    let Ok(Progress::Waiting(connecting)) = waiting.begin((2, 28, 9), &Config::default()).expect("begins").poll()
    else {
        panic!("nobody is there")
    };
    drop(connecting);
    let failed = failing.begin((2, 28, 9), &Config::default()).expect("begins").poll();
    assert!(matches!(failed, Err(Error::Nccl { code: Code::RemoteError, .. })), "{failed:?}");
    let took = start.elapsed();
    assert!(took < Config::default().close_timeout / 2, "{took:?}");
    waiting.wait_for("abort");
    failing.wait_for("abort");
}

#[test]
fn nobody_waits_twice_for_an_end() {
    let close_timeout = SECOND;
    let took = |end: fn(Communicator)| {
        let fake = Fake::new(Script { abort_takes: 60 * SECOND, ..Script::default() });
        let connected = fake.connected(&Config { close_timeout, ..Config::default() });
        let start = Instant::now();
        end(connected);
        start.elapsed()
    };
    let dropped = took(drop);
    let aborted = took(|connected| assert!(connected.abort().is_err()));
    for took in [dropped, aborted] {
        assert!(took >= close_timeout && took < close_timeout * 19 / 10, "{took:?}");
    }
}

#[test]
fn a_deadline_aborts_once_and_says_who_waited() {
    let fake = Fake::new(busy_for_ever());
    let connecting = fake.begin((2, 28, 9), &Config::default()).expect("begins");
    let error = connecting.wait(SOON).expect_err("nobody is there");
    assert_eq!(error, Error::Timeout { action: "connecting", rank: 1, size: 4, after: SOON });
    assert_eq!(fake.count("abort"), 1);
}

#[test]
fn a_refused_start_leaves_no_group_open() {
    let fake = Fake::new(Script { answers: [("init", 1)].into(), ..Script::default() });
    let error = fake.begin((2, 28, 9), &Config::default()).expect_err("there is no GPU");
    let (function, detail) = ("ncclCommInitRankConfig", "as it was told to".into());
    assert_eq!(error, Error::Nccl { function, code: Code::UnhandledCudaError, detail });
    assert_eq!(fake.script().calls, ["init", "end"]);
    // Only there: NCCL would note that no group is open.
    let fake = Fake::new(Script { answers: [("init", 2)].into(), ..Script::default() });
    fake.begin((2, 28, 9), &Config::default()).expect_err("there is no network");
    assert_eq!(fake.script().calls, ["init"]);
}

#[test]
fn a_failure_while_connecting_is_told_and_aborts() {
    let fake = Fake::new(Script { states: [IN_PROGRESS, REMOTE_ERROR].into(), ..Script::default() });
    let error = fake.begin((2, 28, 9), &Config::default()).expect("begins").wait(SECOND).expect_err("a peer left");
    assert_eq!(error.to_string(), "a queued operation: ncclRemoteError: as it was told to");
    assert_eq!(fake.count("abort"), 1);
}

#[test]
fn ranks_are_checked() {
    let begin = |rank, size| {
        let api = Box::leak(Box::new(crate::fake::api((2, 28, 9))));
        let id = UniqueId::from_bytes([0; UniqueId::BYTES]);
        Communicator::begin_with(api, &id, rank, size, &Config::default()).expect_err("refused").to_string()
    };
    assert_eq!(begin(4, 4), "rank: 4 is not below 4, the number of ranks");
    assert_eq!(begin(0, 0), "rank: 0 is not below 0, the number of ranks");
    assert_eq!(begin(0, 1 << 31), "size: 2147483648 is too large");
}

#[test]
fn aborting_happens_once_from_whichever_thread() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    let monitor = connected.monitor();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(monitor.abort(), Ok(())));
        }
    });
    assert_eq!(connected.state(), State::Failed(aborted()));
    let split = connected.split(None, 0, &Config::default(), SECOND);
    assert_eq!(split.expect_err("it is closed"), aborted());
    assert_eq!(connected.abort(), Ok(()));
    drop(connected);
    assert_eq!(fake.script().calls, ["abort"]);
    assert_eq!(monitor.state(), State::Failed(aborted()));
}

#[test]
fn a_watchdog_frees_a_thread_that_waits() {
    let fake = Fake::new(busy_for_ever());
    let connecting = fake.begin((2, 28, 9), &Config::default()).expect("begins");
    let monitor = connecting.monitor();
    let watchdog = std::thread::spawn(move || {
        std::thread::sleep(SOON);
        monitor.abort()
    });
    assert_eq!(connecting.wait(60 * SECOND).expect_err("aborted"), aborted());
    assert_eq!(watchdog.join().expect("does not panic"), Ok(()));
}

#[test]
fn an_abort_that_hangs_does_not_keep_its_caller() {
    let fake = Fake::new(Script { abort_takes: 60 * SECOND, ..Script::default() });
    let connected = fake.connected(&Config { close_timeout: SOON, ..Config::default() });
    let start = Instant::now();
    let late = Error::Timeout { action: "closing", rank: 1, size: 4, after: SOON };
    assert_eq!(connected.abort(), Err(late.clone()));
    fake.wait_for("abort");
    assert_eq!(connected.abort(), Err(late));
    assert_eq!(connected.state(), State::Failed(aborted()));
    drop(connected);
    assert!(start.elapsed() < 30 * SECOND);
    assert_eq!(fake.count("abort"), 1);
}

#[test]
fn finalizing_waits_and_destroys() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    fake.script().states = BUSY.into();
    assert_eq!(connected.finalize(SECOND), Ok(()));
    assert_eq!(fake.script().calls, ["finalize", "state", "state", "state", "state", "destroy"]);
}

#[test]
fn finalizing_too_long_aborts() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    *fake.script() = busy_for_ever();
    let late = Error::Timeout { action: "finalizing", rank: 1, size: 4, after: SOON };
    assert_eq!(connected.finalize(SOON), Err(late));
    assert_eq!((fake.count("abort"), fake.count("destroy")), (1, 0));
}

#[test]
fn splitting_waits_on_the_parent_and_asks_the_child() {
    let child = Fake::new(Script::default());
    let fake = Fake::new(Script { child: Some(child), ..Script::default() });
    let connected = fake.connected(&Config::default());
    fake.script().states = BUSY.into();
    let half = connected.split(Some(1), 7, &Config::default(), SECOND).expect("splits").expect("has a color");
    assert_eq!((half.rank(), half.size()), (0, 2));
    assert_eq!(fake.script().calls, ["split", "state", "state", "state", "state"]);
    assert_eq!(fake.script().arguments, [("split", vec![1, 7])]);
    assert_eq!(connected.state(), State::Ready);
    drop(half);
    assert_eq!((child.count("abort"), fake.count("abort")), (1, 0));
}

#[test]
fn without_a_color_there_is_no_communicator() {
    let fake = Fake::new(Script::default());
    let none = fake.connected(&Config::default()).split(None, 0, &Config::default(), SECOND);
    assert!(none.expect("splits").is_none());
}

#[test]
fn what_was_made_too_late_is_aborted_too() {
    let child = Fake::new(Script::default());
    let fake = Fake::new(Script { child: Some(child), ..Script::default() });
    let connected = fake.connected(&Config::default());
    fake.script().states = busy_for_ever().states;
    let late = Error::Timeout { action: "splitting", rank: 1, size: 4, after: SOON };
    assert_eq!(connected.split(Some(0), 0, &Config::default(), SOON).expect_err("late"), late);
    drop(connected);
    assert_eq!((child.count("abort"), fake.count("abort")), (1, 1));
}

#[test]
fn shrinking_leaves_the_excluded_out() {
    let fake = Fake::new(Script { child: Some(Fake::new(Script::default())), ..Script::default() });
    let connected = fake.connected(&Config::default());
    let shrink = |ranks: &[usize], outstanding| connected.shrink(ranks, outstanding, &Config::default(), SECOND);
    let rest = shrink(&[3, 0], Outstanding::Abort).expect("shrinks");
    assert_eq!((rest.rank(), rest.size()), (0, 2));
    assert_eq!(fake.script().arguments.pop(), Some(("shrink", vec![0, 3, 1])));
    shrink(&[2], Outstanding::None).expect("shrinks");
    assert_eq!(fake.script().arguments.pop(), Some(("shrink", vec![2, 0])));
    for (ranks, text) in [
        (&[][..], "excluded: no rank"),
        (&[0, 4], "excluded: 4 is not below 4, the number of ranks"),
        (&[1], "excluded: rank 1 is the caller's own"),
        (&[2, 2], "excluded: [2, 2] has a rank twice"),
    ] {
        assert_eq!(shrink(ranks, Outstanding::None).expect_err(text).to_string(), text);
    }
}

#[test]
fn nccls_handle_is_there_while_the_communicator_is_open() {
    let fake = Fake::new(Script::default());
    let connected = fake.connected(&Config::default());
    assert_eq!(connected.with_raw(|handle| handle.is_null()), Ok(false));
    assert_eq!(connected.abort(), Ok(()));
    assert_eq!(connected.with_raw(|_| panic!("it is closed")), Err(aborted()));
}
