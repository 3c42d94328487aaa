//! Every task runs once, wherever; a panic comes out and leaves the pool as it was.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::samples::pools;

const MUCH: usize = PARALLEL_WORK_MIN;
const LITTLE: usize = PARALLEL_WORK_MIN - 1;

fn check_each_once(pool: &Pool, tasks: usize, work: usize) {
    let times: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
    pool.each(tasks, work, |i| {
        times[i].fetch_add(1, SeqCst);
    });
    assert!(times.iter().all(|t| t.load(SeqCst) == 1), "{tasks} tasks, work {work}, {} threads", pool.threads());
}

#[test]
fn every_task_runs_once() {
    for pool in pools() {
        for tasks in [0, 1, 2, 3, 7, 64, 10_000] {
            check_each_once(pool, tasks, LITTLE);
            check_each_once(pool, tasks, MUCH);
        }
    }
}

#[test]
fn has_the_threads_that_it_was_asked_for() {
    for (asked, has) in [(0, 1), (1, 1), (2, 2), (5, 5)] {
        assert_eq!(Pool::new(asked).threads(), has);
    }
}

#[test]
fn little_work_stays_on_the_thread_and_much_is_cut() {
    let [one, two, three] = pools();
    for (pool, work, inline, parts) in [
        (one, LITTLE, true, 1),
        (one, usize::MAX, true, 1),
        (two, LITTLE, true, 1),
        (two, MUCH, false, 8),
        (three, MUCH, false, 12),
    ] {
        assert_eq!((pool.is_inline(work), pool.parts(work)), (inline, parts), "{} threads, {work}", pool.threads());
    }
    let here = thread::current().id();
    let all_here = |pool: &Pool, tasks, work| {
        let elsewhere = AtomicUsize::new(0);
        pool.each(tasks, work, |_| {
            // Long enough for everybody to come.
            thread::sleep(Duration::from_millis(2));
            elsewhere.fetch_add(usize::from(thread::current().id() != here), SeqCst);
        });
        elsewhere.into_inner() == 0
    };
    assert!(all_here(one, 20, MUCH) && all_here(two, 20, LITTLE) && all_here(two, 1, MUCH));
}

/// As many tasks as threads, each of which waits until all have begun.
#[test]
fn tasks_run_at_the_same_time() {
    let (pool, begun, met) = (Pool::new(3), AtomicUsize::new(0), AtomicUsize::new(0));
    let deadline = Instant::now() + Duration::from_secs(60);
    pool.each(3, MUCH, |_| {
        begun.fetch_add(1, SeqCst);
        while begun.load(SeqCst) < 3 && Instant::now() < deadline {
            thread::yield_now();
        }
        met.fetch_add(usize::from(begun.load(SeqCst) == 3), SeqCst);
    });
    assert_eq!(met.into_inner(), 3);
}

#[test]
fn a_panic_comes_out_and_the_pool_goes_on() {
    for pool in pools() {
        for work in [LITTLE, MUCH] {
            for bad in [0, 49, 99] {
                let task = |i| assert!(i != bad, "task {i} is bad");
                let panic = catch_unwind(AssertUnwindSafe(|| pool.each(100, work, task))).unwrap_err();
                assert_eq!(*panic.downcast::<String>().unwrap(), format!("task {bad} is bad"));
                check_each_once(pool, 100, work);
            }
        }
    }
}

#[test]
fn a_task_may_use_the_pool_itself() {
    let [_, two, _] = pools();
    let sum = AtomicUsize::new(0);
    two.each(20, MUCH, |i| {
        two.each(20, MUCH, |j| {
            sum.fetch_add(20 * i + j, SeqCst);
        });
    });
    assert_eq!(sum.into_inner(), (0..400).sum());
}

#[test]
fn several_callers_share_a_pool() {
    let [_, two, _] = pools();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|tasks| check_each_once(two, tasks, MUCH)));
        }
    });
}

#[test]
fn parts_are_where_they_should_be() {
    let mut values: Vec<usize> = (0..10).collect();
    let shared = Shared::new(&mut values);
    // SAFETY: these two do not overlap.
    let (a, b) = unsafe { (shared.part(0, 4), shared.part(4, 6)) };
    (a[3], b[5]) = (30, 90);
    assert_eq!(values, [0, 1, 2, 30, 4, 5, 6, 7, 8, 90]);
}

#[test]
fn parts_do_not_reach_outside() {
    for (offset, len) in [(0, 11), (10, 1), (11, 0), (usize::MAX, 2), (2, usize::MAX)] {
        let mut values = [0; 10];
        let shared = Shared::new(&mut values);
        // SAFETY: nothing else holds a part.
        let part = catch_unwind(AssertUnwindSafe(|| unsafe { shared.part(offset, len) }.len()));
        assert!(part.is_err(), "{len} values from {offset} of 10");
    }
}

/// Each thread may run on one core, and no two on the same; without pinning, on all.
#[cfg(target_os = "linux")]
#[test]
fn pinned_threads_keep_to_cores_of_their_own() {
    use std::sync::Barrier;

    let cores = |pool: &Pool, threads: usize| {
        let allowed = Mutex::new(Vec::new());
        // Each thread takes one task, since none ends before all have begun.
        let begun = Barrier::new(threads);
        pool.each(threads, usize::MAX, |_| {
            begun.wait();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
            allowed.lock().unwrap().push(list.to_owned());
        });
        let mut allowed = allowed.into_inner().unwrap();
        allowed.sort();
        allowed
    };
    let available = core_affinity::get_core_ids().unwrap();
    let threads = available.len().min(2);
    let caller = move || {
        let pool = Pool::pinned(threads);
        pool.pin_caller();
        cores(&pool, threads)
    };
    let mut expected: Vec<String> = available.iter().take(threads).map(|core| core.id.to_string()).collect();
    expected.sort();
    assert_eq!(std::thread::spawn(caller).join().unwrap(), expected);

    let free = cores(&Pool::new(threads), threads);
    assert!(available.len() == 1 || free.iter().all(|list| list.parse::<usize>().is_err()), "{free:?}");
}
