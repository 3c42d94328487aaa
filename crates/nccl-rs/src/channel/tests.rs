//! Channels without a GPU: what is refused, how they wait, and how they end.

use std::cell::Cell;
use std::collections::VecDeque;

use super::*;
use crate::fake::{Fake, Script};

const fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

/// A clock that a rest moves, by a microsecond at least.
#[derive(Default)]
struct Clock {
    now: Cell<Duration>,
    rests: Cell<usize>,
}

impl Clock {
    fn rest(&self, pause: Duration) {
        self.now.set(self.now.get() + pause.max(micros(1)));
        self.rests.set(self.rests.get() + 1);
    }

    /// What polling answers where all is done at `done`, and the state is `failed` from a time on.
    fn poll(&self, done: Duration, failed: Option<Duration>, timeout: Option<Duration>) -> Result<bool, Error> {
        let state = || match failed {
            Some(at) if self.now.get() >= at => State::Failed(aborted()),
            _ => State::Ready,
        };
        poll(|| Ok(self.now.get() >= done), state, timeout, || self.now.get(), |pause| self.rest(pause))
    }
}

fn aborted() -> Error {
    Error::Aborted { rank: 1, size: 4 }
}

fn id(byte: u8) -> UniqueId {
    UniqueId::from_bytes([byte; UniqueId::BYTES])
}

/// Its rank is 1, as the fake's; its GPU is none.
fn channel(fake: &'static Fake, name: u8, config: &Config) -> Channel {
    let end = End::of(&id(name)).expect("each test has its own");
    Channel::over(fake.connected(config), Gpu::nowhere(), config, end)
}

fn broken() -> Error {
    Error::Gpu { what: "working on the GPU", detail: "an illegal address".into() }
}

#[test]
fn what_is_done_is_seen_soon_after() {
    for done in [0, 1, 150, 200, 1000, 4_000, 30_000, 10_000_000].map(micros) {
        let clock = Clock::default();
        assert_eq!(clock.poll(done, None, None), Ok(true));
        let late = clock.now.get() - done;
        assert!(late <= (done / 8).min(LONGEST_PAUSE).max(micros(1)), "{late:?} after {done:?}");
    }
}

#[test]
fn idling_sleeps() {
    let clock = Clock::default();
    assert_eq!(clock.poll(micros(10_000_000), None, None), Ok(true));
    assert!(clock.rests.get() < 10_300, "{:?}", clock.rests);
    let pause = |waited| pause(waited, SPIN, LONGEST_PAUSE);
    assert_eq!((pause(micros(199)), pause(micros(200))), (Duration::ZERO, micros(12) + Duration::from_nanos(500)));
    assert_eq!(pause(Duration::MAX), LONGEST_PAUSE);
}

#[test]
fn the_deadline_is_kept_to_the_point() {
    for timeout in [0, 1, 150, 4_321, 1_000_500].map(micros) {
        let clock = Clock::default();
        assert_eq!(clock.poll(Duration::MAX, None, Some(timeout)), Ok(false));
        assert_eq!(clock.now.get(), timeout);
        // What is done by then is done.
        assert_eq!(Clock::default().poll(timeout, None, Some(timeout)), Ok(true));
    }
}

#[test]
fn a_failure_ends_waiting_and_counts_more_than_what_is_done() {
    let clock = Clock::default();
    assert_eq!(clock.poll(Duration::MAX, Some(micros(5_000)), None), Err(aborted()));
    assert!(clock.now.get() < micros(5_700), "{:?}", clock.now);
    // Aborting ends a kernel, whose work is not done then.
    assert_eq!(Clock::default().poll(micros(100), Some(micros(100)), None), Err(aborted()));
    let asked = poll(|| Err(broken()), || State::Ready, None, || Duration::ZERO, |_| panic!("waits"));
    assert_eq!(asked, Err(broken()));
}

#[test]
fn the_state_is_asked_after_what_is_done() {
    let asked = Cell::new(0);
    let mut answers = VecDeque::from([(false, State::Ready), (true, State::InProgress)]);
    let is_done = || {
        asked.set(asked.get() + 1);
        Ok(asked.get() == 2)
    };
    let state = || {
        let (_, state) = answers.pop_front().expect("asked twice");
        assert_eq!(asked.get(), 2 - answers.len());
        state
    };
    assert_eq!(poll(is_done, state, None, || Duration::ZERO, |_| {}), Ok(true));
}

#[test]
fn wrong_arguments_are_refused_and_harmless() {
    let fake = Fake::new(Script { answers: [("abort", 3)].into(), ..Script::default() });
    let mut channel = channel(fake, 1, &Config::default());
    let error = channel.recv(&mut [], None).expect_err("nothing to receive");
    assert_eq!(error.to_string(), "bytes: an empty message");
    let error = channel.send(&[1], micros(1)).expect_err("it receives");
    assert_eq!(error.to_string(), "rank: 1 cannot do what 0 does: 0 sends, 1 receives");
    let error = channel.recv_beginning(5, &mut [0; 6], None).expect_err("more than there is");
    assert_eq!(error.to_string(), "at: 6 bytes from byte 0 on, of a message of 5");
    let error = channel.take(0, &mut [0], micros(1)).expect_err("nothing has come");
    assert_eq!(error.to_string(), "at: 1 bytes from byte 0 on, of a message of 0");
    channel.rank = Channel::SENDER;
    let mut refused = |parts: &[(usize, Part<'_>)]| {
        // SAFETY: nothing of it is on a GPU.
        unsafe { channel.send_parts(8, parts, micros(1), micros(1)) }.expect_err("the parts do not fit").to_string()
    };
    let (long, short) = (Part::Host(&[1; 5]), Part::Host(&[1; 2]));
    assert_eq!(refused(&[(0, long), (7, short)]), "parts: 2 bytes from byte 7 on, where bytes 5 to 8 are free");
    assert_eq!(refused(&[(0, long), (4, short)]), "parts: 2 bytes from byte 4 on, where bytes 5 to 8 are free");
    assert_eq!(refused(&[(3, long), (0, short)]), "parts: 2 bytes from byte 0 on, where bytes 8 to 8 are free");
    assert_eq!(
        refused(&[(usize::MAX, short)]),
        format!("parts: 2 bytes from byte {} on, where bytes 0 to 8 are free", usize::MAX)
    );
    let too_large = usize::MAX / 2 + 1;
    let words = format!("{too_large} bytes; expected {} at most", isize::MAX);
    // SAFETY: nothing of it is on a GPU.
    let error = unsafe { channel.send_parts(too_large, &[], micros(1), micros(1)) }.expect_err("no slice is so large");
    assert_eq!(error.to_string(), format!("bytes: {words}"));
    channel.rank = Channel::RECEIVER;
    let error = channel.recv_beginning(too_large, &mut [], None).expect_err("no slice is so large");
    assert_eq!(error.to_string(), format!("bytes: {words}"));
    assert!(channel.open.is_ok());
    assert_eq!(fake.script().calls, [""; 0]);

    let connected = Channel::connect(0, &id(2), 2, 1, &Config::default(), micros(1));
    assert_eq!(connected.expect_err("there are two").to_string(), "rank: 2 is not below 2, the number of ranks");
    let connected = Channel::connect(0, &id(2), 1, too_large, &Config::default(), micros(1));
    assert_eq!(connected.expect_err("no slice is so large").to_string(), format!("largest: {words}"));
}

/// Aborting fails, so that the GPU is left behind; if it were not, the driver would be called, which is not there.
#[test]
fn the_first_failure_stays_and_aborts_once() {
    let fake = Fake::new(Script { answers: [("abort", 3)].into(), ..Script::default() });
    let mut channel = channel(fake, 3, &Config::default());
    assert_eq!(channel.work(|_| Ok(())), Ok(()));
    assert_eq!(channel.work(|_| Err(broken())), Err(broken()));
    fake.wait_for("abort");
    assert_eq!(channel.work(|_| panic!("it is not open")), Err(broken()));
    assert_eq!(channel.recv(&mut [0], None), Err(broken()));
    assert!(format!("{channel:?}").contains("an illegal address"), "{channel:?}");
    let monitor = channel.monitor();
    drop(channel);
    assert_eq!(fake.script().calls, ["abort"]);
    assert_eq!(monitor.state(), State::Failed(aborted()));
}

/// NCCL may wait for another channel's receive until that channel is ended, too.
#[test]
fn nobody_waits_for_a_channels_end() {
    let fake = Fake::new(Script { abort_takes: Duration::from_secs(60), ..Script::default() });
    let channel = channel(fake, 4, &Config::default());
    let start = Instant::now();
    drop(channel);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(crate::is_closing());
    assert!(!crate::wait_closed(Duration::from_millis(1)));
    fake.wait_for("abort");
    assert_eq!(fake.count("abort"), 1);
}

#[test]
fn settings_that_make_channels_wait_for_each_other_are_refused() {
    let checked = |name, value: &str| check_environment(|asked| (asked == name).then(|| value.into()));
    for name in HARMFUL {
        assert_eq!((checked(name, "0"), checked(name, "")), (Ok(()), Ok(())));
        let words = format!("{name}: is set: channels would wait for each other's messages; unset it");
        assert_eq!(checked(name, "1").expect_err("it is set").to_string(), words);
    }
    assert_eq!(checked("NCCL_DEBUG", "1"), Ok(()));
}

#[test]
fn a_process_has_one_end() {
    let first = End::of(&id(5)).expect("the first");
    let error = End::of(&id(5)).expect_err("the second");
    assert_eq!(error.to_string(), "id: is that of a channel that has an end in this process");
    drop(first);
    End::of(&id(5)).expect("the first is gone");
}

#[test]
fn a_channel_moves_between_threads() {
    fn moves<T: Send>() {}
    moves::<Channel>();
}
