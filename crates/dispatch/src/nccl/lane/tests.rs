//! What a frame that was sent ahead may be, and calls that do not return.

use std::sync::atomic::AtomicBool;

use moesaic_kernels::cuda::Buffer;
use moesaic_proto::v1::Choices;

use super::super::core::Head;
use super::*;

const ROW_BYTES: usize = 12;
const ROOM: usize = 20;

/// What comes before `count` rows of two choices each, with the message at byte `at`, and the load.
fn slot(at: usize, count: u32, choices: Option<Choices>) -> (Vec<u8>, usize, Load) {
    let message = v1::Frame { choices, ..Default::default() }.encode_to_vec();
    let mut start = vec![0xa5; SLOT_TABLE_BYTES];
    start[at..][..message.len()].copy_from_slice(&message);
    let table = SLOT_TABLE_BYTES - Split::table_bytes(ROOM, 2);
    start[table..][..4].copy_from_slice(&count.to_le_bytes());
    start[table + Split::CHOICES..].iter_mut().zip(counting()).for_each(|(byte, value)| *byte = value);
    (start, at, Load::new(message.len(), ROOM * ROW_BYTES))
}

/// From 1 on, again and again.
fn counting() -> impl Iterator<Item = u8> {
    (0..=u8::MAX).cycle().skip(1)
}

fn choices(top_k: u32, room: u32) -> Option<Choices> {
    Some(Choices { top_k, room, ..Default::default() })
}

#[test]
fn its_table_says_how_many_rows_it_has_and_what_they_chose() {
    for (at, count) in [(Head::LEN, 0), (Head::LEN, 1), (0, 3), (0, ROOM as u32)] {
        let (start, at, load) = slot(at, count, choices(2, ROOM as u32));
        let (frame, bytes) = taken_ahead(&start, at, load).unwrap();
        assert_eq!(bytes, count as usize * ROW_BYTES);
        assert_eq!(frame.terms.len(), count as usize * 2 * size_of::<Term>());
        assert!(frame.terms.iter().zip(counting()).all(|(byte, value)| *byte == value));
    }
}

#[test]
fn what_it_cannot_be_ends_the_lane() {
    let error = |(start, at, load): (Vec<u8>, usize, Load)| taken_ahead(&start, at, load).unwrap_err();
    let of = |count, choices| error(slot(Head::LEN, count, choices));
    assert_eq!(of(21, choices(2, 20)), "a frame that was sent ahead has 21 rows; expected at most 20");
    assert_eq!(of(1, None), "a frame that was sent ahead says no choices");
    for (top_k, room) in [(64, 20), (1 << 20, 20), (u32::MAX, 1), (8, 240)] {
        let words = format!("a slot has no room for a table of {room} rows with {top_k} choices each");
        assert_eq!(of(1, choices(top_k, room)), words);
    }
    for room in [0, 19, u32::MAX] {
        let words = format!("a frame that was sent ahead has room for {room} rows, in 240 bytes");
        assert_eq!(of(1, choices(2, room)), words);
    }
    // Bytes of a message that is none, and one that is too long.
    let (mut start, at, load) = slot(0, 1, choices(2, 20));
    start[0] = 0xff;
    assert!(taken_ahead(&start, at, load).is_err());
    let load = Load { message: 9000, ..load };
    assert_eq!(taken_ahead(&start, at, load).unwrap_err(), "a frame that was sent ahead has no room for its message");
}

/// A driver that waits for other lanes once the first slot has left: its calls return when they are aborted.
#[derive(Clone, Default)]
struct Stuck {
    /// From the beginning.
    connects: bool,
    has_sent: Arc<AtomicBool>,
    is_aborted: Arc<(Mutex<bool>, Condvar)>,
}

impl Stuck {
    fn wait(&self) -> Result<(), String> {
        let (is_aborted, news) = &*self.is_aborted;
        drop(news.wait_while(is_aborted.lock().unwrap(), |is_aborted| !*is_aborted).unwrap());
        Err("aborted".into())
    }
}

impl Fabric for Stuck {
    fn version(&self) -> String {
        "1.2.3".into()
    }

    fn new_id(&self) -> Result<Id, String> {
        Ok([1; 128])
    }

    fn connect(
        &self,
        _: &Id,
        _: Direction,
        _: usize,
        _: Duration,
        begun: &dyn Fn(Arc<dyn Breaker>),
    ) -> Result<Box<dyn Channel>, String> {
        begun(Arc::new(self.clone()));
        if self.connects { Ok(Box::new(self.clone())) } else { self.wait().map(|()| unreachable!("it is aborted")) }
    }
}

impl Channel for Stuck {
    fn send(&mut self, _: usize, _: &[(usize, Source<'_>)], _: Duration) -> Result<(), String> {
        if self.has_sent.swap(true, Ordering::Relaxed) { self.wait() } else { Ok(()) }
    }

    fn receive(&mut self, _: usize, _: &mut [u8], _: Option<Duration>) -> Result<(), String> {
        self.wait()
    }

    fn take(&mut self, _: usize, _: &mut [u8]) -> Result<(), String> {
        self.wait()
    }

    fn take_there(&mut self, _: usize, to: Buffer<u8>) -> Result<Buffer<u8>, String> {
        self.wait().map(|()| to)
    }
}

impl Breaker for Stuck {
    fn abort(&self) -> bool {
        let (is_aborted, news) = &*self.is_aborted;
        *is_aborted.lock().unwrap() = true;
        news.notify_all();
        true
    }
}

/// Hears why a lane has failed.
struct Owner(SyncSender<String>);

impl LaneOwner for Owner {
    fn up(&self) {}

    fn frame(&self, _: v1::Frame, _: Payload, _: &Sender) {}

    fn wake(&self, _: u32) {}

    fn failed(&self, reason: &str) {
        self.0.send(reason.into()).unwrap();
    }
}

fn open(stuck: &Stuck, failed: SyncSender<String>) -> Lane {
    let (offer, place) = (Offer::new(stuck, 4).unwrap(), Place::take(stuck).unwrap());
    Lane::open(Arc::new(stuck.clone()), 1, offer, End::Attention, Arc::new(Owner(failed)), place).unwrap()
}

#[test]
fn a_lane_that_nobody_wants_any_more_does_not_go_on_connecting() {
    let (failed, why) = sync_channel(1);
    let stuck = Stuck::default();
    let start = Instant::now();
    drop(open(&stuck, failed));
    // Its thread has ended when nothing else has what it had.
    while Arc::strong_count(&stuck.is_aborted) > 1 {
        assert!(start.elapsed() < OPEN_TIMEOUT / 2);
        thread::sleep(Duration::from_millis(1));
    }
    assert!(why.recv().is_err(), "who drops it is told nothing");
}

/// The slot that says that nothing follows is such a call, too: a lane that idles is watched.
#[test]
fn a_lane_ends_whose_calls_do_not_return() {
    let (failed, why) = sync_channel(1);
    let stuck = Stuck { connects: true, ..Stuck::default() };
    let start = Instant::now();
    let lane = open(&stuck, failed);
    assert_eq!(why.recv_timeout(Duration::from_secs(60)).unwrap(), "calls to the GPU's driver do not return");
    assert!(start.elapsed() >= SEND_TIMEOUT);
    assert!(!lane.sender().send(Message::Warm));
    assert_eq!(stuck.wait(), Err("aborted".into()));
}
