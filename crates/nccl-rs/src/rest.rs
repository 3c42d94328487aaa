//! How threads wait for what has no way to wake them: they ask again and again.

use std::thread;
use std::time::Duration;

/// How long to sleep before asking again: not at all at first, then a sixteenth of what was waited, so that waiting takes
/// little more than that longer.
pub(crate) fn pause(waited: Duration, spin: Duration, longest: Duration) -> Duration {
    if waited < spin { Duration::ZERO } else { (waited / 16).min(longest) }
}

/// Sleeps, or lets others go first. From the first sleep on, this thread's sleeps end when they are over: Linux lets a thread sleep
/// up to 50 us longer if it does not ask for better, which would be most of a pause.
pub(crate) fn rest(pause: Duration) {
    thread_local!(static IS_SHARP: () = sharpen());
    if pause.is_zero() {
        return thread::yield_now();
    }
    IS_SHARP.with(|()| ());
    thread::sleep(pause);
}

#[cfg(target_os = "linux")]
fn sharpen() {
    // SAFETY: takes a number, and sets one of this thread's. Where it fails, sleeps are longer.
    let _ = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

#[cfg(not(target_os = "linux"))]
fn sharpen() {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// In nanoseconds.
    fn slack() -> i32 {
        // SAFETY: asks for a number.
        unsafe { libc::prctl(libc::PR_GET_TIMERSLACK) }
    }

    #[test]
    fn a_thread_that_rests_sleeps_no_longer_than_it_says() {
        let sleeper = thread::spawn(|| {
            let at_first = slack();
            rest(Duration::ZERO);
            assert_eq!(slack(), at_first);
            rest(Duration::from_micros(1));
            assert_eq!(slack(), 1);
        });
        sleeper.join().expect("it sleeps as it says");
    }
}
