//! How threads wait for what has no way to wake them: they ask again and again.

use std::thread;
use std::time::Duration;

/// How long to sleep before asking again: not at all at first, then a sixteenth of what was waited, so that waiting takes
/// little more than that longer.
pub(crate) fn pause(waited: Duration, spin: Duration, longest: Duration) -> Duration {
    if waited < spin { Duration::ZERO } else { (waited / 16).min(longest) }
}

/// Sleeps, or lets others go first.
pub(crate) fn rest(pause: Duration) {
    if pause.is_zero() { thread::yield_now() } else { thread::sleep(pause) }
}

/// A thread that rests to the point: from its first sleep on, its sleeps end when they are over. Linux lets a thread sleep up to
/// 50 us longer if it does not ask for better, which would be most of a pause. The thread is as it was when this is dropped.
#[derive(Default)]
pub(crate) struct Sleeper {
    /// What the thread lets pass, in nanoseconds, if that is changed.
    slack: Option<libc::c_ulong>,
}

impl Sleeper {
    pub fn rest(&mut self, pause: Duration) {
        if !pause.is_zero() && self.slack.is_none() {
            self.slack = Some(slack());
            set_slack(1);
        }
        rest(pause);
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.slack.into_iter().for_each(set_slack);
    }
}

#[cfg(target_os = "linux")]
fn slack() -> libc::c_ulong {
    // SAFETY: asks for a number of this thread's, which is not negative where there is one.
    unsafe { libc::prctl(libc::PR_GET_TIMERSLACK) }.max(0) as libc::c_ulong
}

#[cfg(target_os = "linux")]
fn set_slack(nanos: libc::c_ulong) {
    // SAFETY: sets a number of this thread's. Where it fails, sleeps are longer.
    let _ = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, nanos) };
}

#[cfg(not(target_os = "linux"))]
fn slack() -> libc::c_ulong {
    0
}

#[cfg(not(target_os = "linux"))]
fn set_slack(_: libc::c_ulong) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_rests_sleeps_no_longer_than_it_says_and_is_then_as_before() {
        let sleeper = thread::spawn(|| {
            let before = slack();
            assert_ne!(before, 1);
            let mut sleeper = Sleeper::default();
            sleeper.rest(Duration::ZERO);
            assert_eq!(slack(), before);
            sleeper.rest(Duration::from_micros(1));
            assert_eq!(slack(), 1);
            drop(sleeper);
            assert_eq!(slack(), before);
        });
        sleeper.join().expect("it sleeps as it says");
    }
}
