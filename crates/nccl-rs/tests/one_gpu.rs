//! Two processes and one GPU. NCCL takes it for two, since each process says that it is a host of its own. Run by
//! `cargo test -p nccl-rs --test one_gpu -- --ignored --nocapture`, with libnccl.so.2 where the linker finds it.
#![allow(unsafe_code)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaStream, result, sys};
use nccl_rs::{
    Channel, Communicator, Config, DeviceSlice, DeviceSliceMut, Error, Event, Group, Outstanding, Part, ReduceOp,
    Stream, UniqueId, available, group,
};

const TIMEOUT: Duration = Duration::from_secs(60);
/// How long the near side may take to notice by itself that the far one is gone.
const NOTICES: Duration = Duration::from_secs(20);
const SIZES: [usize; 8] = [1, 7, 4096, 65_536, 65_537, 3 << 20, 100, (16 << 20) + 1];
const ROUNDS: usize = 50;
/// A message of which the beginning is taken to the host, and the rest to another place on the GPU, and to a third one by a stream
/// that has much to do before.
const PARTS: usize = 9000;
const HEAD: usize = 200;
const FILLED: usize = 256 << 20;

fn message(size: usize, seed: usize) -> Vec<u8> {
    (0..size).map(|i| (i.wrapping_mul(31) + seed + (i >> 8)) as u8).collect()
}

fn config() -> Config {
    Config { max_ctas: Some(1), ..Config::default() }
}

/// What one side says, by a word that its lines begin with. The test harness writes to the same lines.
struct Side {
    process: Child,
    lines: Receiver<String>,
}

impl Side {
    fn start(name: &str, ids: Option<&str>) -> Self {
        let mut side = Command::new(std::env::current_exe().expect("this test is a program"));
        side.args(["--ignored", "--exact", "side", "--nocapture"]).stdin(Stdio::null()).stdout(Stdio::piped());
        side.env("NCCL_RS_SIDE", name).envs(ids.map(|ids| ("NCCL_RS_IDS", ids)));
        side.env("NCCL_HOSTID", name).env("NCCL_SOCKET_IFNAME", "lo").env("NCCL_IB_DISABLE", "1");
        let mut process = side.spawn().expect("this test runs");
        let stdout = BufReader::new(process.stdout.take().expect("it is piped"));
        let (send, lines) = sync_channel(1000);
        let name = name.to_owned();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                println!("{name}: {line}");
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Self { process, lines }
    }

    /// The rest of the line with `word`.
    fn says(&self, word: &str) -> String {
        let deadline = Instant::now() + 4 * TIMEOUT;
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            let line = line.unwrap_or_else(|error| panic!("{word} was not said: {error}"));
            if let Some((_, rest)) = line.split_once(word) {
                return rest.trim().to_owned();
            }
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "needs a GPU"]
fn messages_pass_both_ways_and_a_killed_side_is_noticed() {
    match available(0) {
        Ok(version) => println!("NCCL {version}"),
        Err(error) => return println!("SKIPPED: {error}"),
    }
    let mut near = Side::start("near", None);
    let mut far = Side::start("far", Some(&near.says("@ids")));
    near.says("@waits");
    // Until the kernel of its receive runs.
    thread::sleep(Duration::from_secs(1));
    far.process.kill().expect("it runs");
    near.says("@ended");
    assert!(near.process.wait().expect("it ends").success());
}

#[test]
#[ignore = "run by the other test"]
fn side() {
    match std::env::var("NCCL_RS_SIDE").as_deref() {
        Ok("near") => near(),
        Ok(_) => far(),
        Err(_) => println!("SKIPPED: it is a part of the other test"),
    }
}

fn near() {
    let ids = [(); 3].map(|()| UniqueId::new().expect("there is a network"));
    println!("\n@ids {}", ids.each_ref().map(hex).join(" "));
    collectives(&ids[2], 0);
    let start = Instant::now();
    let mut out = Channel::connect(0, &ids[0], 0, PARTS, &config(), TIMEOUT).expect("connects");
    let mut back = Channel::connect(0, &ids[1], 1, PARTS, &config(), TIMEOUT).expect("connects");
    println!("connected in {:?}", start.elapsed());

    for (seed, size) in SIZES.into_iter().enumerate() {
        let sent = message(size, seed);
        let mut received = vec![0; size];
        out.send(&sent, TIMEOUT).expect("sends");
        back.recv(&mut received, Some(TIMEOUT)).expect("receives");
        let expected = sent.iter().map(|byte| byte ^ 0xff).collect::<Vec<_>>();
        assert!(received == expected, "{size} bytes came back as others");
    }
    let (sent, mut received) = (message(PARTS, 7), vec![0; PARTS]);
    out.send(&sent, TIMEOUT).expect("sends");
    back.recv_beginning(PARTS, &mut received[..HEAD], Some(TIMEOUT)).expect("receives");
    back.take(HEAD, &mut received[HEAD..], TIMEOUT).expect("takes");
    assert!(received == sent, "a message of parts came back as another");
    let start = Instant::now();
    for _ in 0..ROUNDS {
        out.send(&[5; 64], TIMEOUT).expect("sends");
        back.recv(&mut [0; 64], Some(TIMEOUT)).expect("receives");
    }
    println!("a round of 64 bytes takes {:?}", start.elapsed() / ROUNDS as u32);

    let monitor = back.monitor();
    let (ended, is_ended) = sync_channel::<()>(1);
    let watchdog = thread::spawn(move || match is_ended.recv_timeout(NOTICES) {
        Ok(()) => println!("NCCL has noticed"),
        Err(_) => println!("NCCL has not noticed: aborting answers {:?}", monitor.abort()),
    });
    time_calls("while none waits");
    let times = thread::spawn(|| {
        thread::sleep(Duration::from_millis(300));
        time_calls("while a receive waits");
    });
    println!("@waits");
    let start = Instant::now();
    let error = back.recv(&mut [0; 8], None).expect_err("the other side is killed");
    println!("received {error} after {:?}", start.elapsed());
    assert!(start.elapsed() < NOTICES + TIMEOUT);
    assert!(matches!(error, Error::Nccl { .. } | Error::Aborted { .. }), "{error}");
    // The watchdog may have gone off.
    let _ = ended.send(());
    times.join().expect("the driver answers once the receive has ended");
    watchdog.join().expect("the watchdog does not panic");

    assert_eq!(back.recv(&mut [0; 8], None), Err(error));
    let start = Instant::now();
    drop((out, back));
    println!("dropped in {:?}", start.elapsed());
    // Whoever leaves earlier takes the library away from under NCCL.
    assert!(nccl_rs::wait_closed(2 * config().close_timeout));
    println!("closed in {:?}", start.elapsed());
    println!("@ended");
}

/// Each operation of a group, over memory of cudarc's; then dividing and ending communicators.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all, said before them")]
fn collectives(id: &UniqueId, rank: usize) {
    let stream = CudaContext::new(0).expect("there is a GPU").new_stream().expect("makes a stream");
    let whole = Communicator::connect(id, rank, 2, &config(), TIMEOUT).expect("connects");
    let (other, own) = (1 - rank, [rank as f32 + 1.0, 10.0 * rank as f32, 3.0, -1.0]);
    let (of_0, of_1, sums) = ([1.0, 0.0, 3.0, -1.0], [2.0, 10.0, 3.0, -1.0], [3.0, 10.0, 6.0, -2.0]);
    let check = |what: &str, found: Result<Vec<f32>, Error>, expected: [&[f32]; 2]| match found {
        Err(Error::Unsupported { function, needs, .. }) => println!("{what}: no {function} before NCCL {needs}"),
        found => assert_eq!(found.expect(what), expected[rank], "{what}"),
    };
    // SAFETY, of all operations: memory and stream are of this GPU, and stay until `queued` has seen the results; the other rank
    // queues the same.
    let exchange = || {
        queued(&stream, &own, 4, |group, values, results, on| unsafe {
            group.send(&whole, values, other, on)?;
            group.recv(&whole, results, other, on)
        })
    };
    check("send and recv", exchange(), [&of_1, &of_0]);
    let found = queued(&stream, &own, 4, |group, values, results, on| unsafe {
        group.all_reduce(&whole, values, results, ReduceOp::Sum, on)
    });
    check("all-reduce", found, [&sums; 2]);
    let found = queued(&stream, &own, 4, |group, values, results, on| unsafe {
        group.reduce(&whole, values, (rank == 1).then_some(results), (ReduceOp::Max, 1), on)
    });
    check("reduce", found, [&of_0, &of_1]);
    let found = queued(&stream, &own, 2, |group, values, results, on| unsafe {
        group.reduce_scatter(&whole, values, results, ReduceOp::Sum, on)
    });
    check("reduce-scatter", found, [&sums[..2], &sums[2..]]);
    let gather = |of: &Communicator| {
        queued(&stream, &own, 8, |group, values, results, on| unsafe { group.all_gather(of, values, results, on) })
    };
    check("all-gather", gather(&whole), [&[of_0, of_1].concat(); 2]);
    let found =
        queued(&stream, &own, 4, |group, values, results, on| unsafe { group.all_to_all(&whole, values, results, on) });
    check("all-to-all", found, [&[1.0, 0.0, 2.0, 10.0], &[3.0, -1.0, 3.0, -1.0]]);
    let found = queued(&stream, &own, 4, |group, _, results, on| unsafe { group.broadcast(&whole, results, 1, on) });
    check("broadcast", found, [&of_1; 2]);
    let found = queued(&stream, &own, 4, |group, _, results, on| unsafe {
        group.all_reduce_in_place(&whole, results, ReduceOp::Sum, on)
    });
    check("all-reduce in place", found, [&sums; 2]);

    let turned = whole.split(Some(7), other as i32, &config(), TIMEOUT).expect("splits").expect("has a color");
    assert_eq!((turned.rank(), turned.size()), (other, 2));
    check("all-gather after a split", gather(&turned), [&[of_1, of_0].concat(); 2]);
    turned.finalize(TIMEOUT).expect("both do it");
    assert!(whole.split(None, 0, &config(), TIMEOUT).expect("splits").is_none());
    if rank == 0 {
        let alone = whole.shrink(&[1], Outstanding::None, &config(), TIMEOUT).expect("shrinks");
        assert_eq!((alone.rank(), alone.size()), (0, 1));
        let found = queued(&stream, &own, 4, |group, values, results, on| unsafe {
            group.all_reduce(&alone, values, results, ReduceOp::Sum, on)
        });
        assert_eq!(found.expect("reduces"), own);
        alone.finalize(TIMEOUT).expect("it is alone");
    }
    // The whole one stays, and nobody leaves it before the other is here.
    check("send and recv at last", exchange(), [&of_1, &of_0]);
    whole.abort().expect("ends");
    println!("collectives are right");
}

/// What a group makes of `own`, with room for so many results, which are `own` again and again at first.
fn queued<'a>(
    stream: &Arc<CudaStream>,
    own: &[f32],
    room: usize,
    queue: impl FnOnce(&mut Group<'a>, DeviceSlice<'_, f32>, DeviceSliceMut<'_, f32>, Stream<'_>) -> Result<(), Error>,
) -> Result<Vec<f32>, Error> {
    let values = stream.clone_htod(own).expect("copies");
    let mut results = stream.clone_htod(&own.repeat(room.div_ceil(own.len()))[..room]).expect("copies");
    {
        let (values, _read) = DeviceSlice::new(&values, stream);
        let (results, _written) = DeviceSliceMut::new(&mut results, stream);
        group(|group| queue(group, values, results, Stream::from(&**stream)))?;
    }
    Ok(stream.clone_dtoh(&results).expect("copies"))
}

/// Says how long calls to the driver take, and what others make meanwhile: what waits for all that runs on the GPU waits for a receive
/// that waits. No more is said of it, since nothing is promised.
fn time_calls(when: &str) {
    let (stop, longest) = (AtomicBool::new(false), Mutex::new(Duration::ZERO));
    thread::scope(|scope| {
        scope.spawn(|| {
            open_here();
            // SAFETY: the memory is this thread's.
            unsafe {
                let (at, stream) =
                    (result::malloc_sync(1 << 20), result::stream::create(result::stream::StreamKind::NonBlocking));
                let (at, stream) = (at.expect("there is memory"), stream.expect("makes a stream"));
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    result::memset_d8_async(at, 1, 1 << 20, stream).expect("queues");
                    result::stream::synchronize(stream).expect("fills");
                    let took = start.elapsed();
                    let mut longest = longest.lock().expect("nobody panics");
                    *longest = took.max(*longest);
                }
            }
        });
        open_here();
        thread::sleep(Duration::from_millis(50));
        let timed = |what: &str, call: &mut dyn FnMut()| {
            *longest.lock().expect("nobody panics") = Duration::ZERO;
            let start = Instant::now();
            call();
            let took = start.elapsed();
            thread::sleep(Duration::from_millis(5));
            println!(
                "{when}, {what} takes {took:?}, and queued work beside it {:?}",
                longest.lock().expect("nobody panics")
            );
        };
        // SAFETY: memory is freed once.
        unsafe {
            let (mut device, mut host) = (0, std::ptr::null_mut());
            timed("cuMemAlloc", &mut || device = result::malloc_sync(1 << 20).expect("there is memory"));
            timed("cuMemHostAlloc", &mut || host = result::malloc_host(1 << 20, 0).expect("there is memory"));
            timed("cuMemFreeHost", &mut || result::free_host(host).expect("frees"));
            timed("cuMemFree", &mut || result::free_sync(device).expect("frees"));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// The channels' context, on this thread.
fn open_here() {
    let device = result::device::get(0).expect("there is a GPU");
    // SAFETY: the device is one, and the context is not given back.
    let context = unsafe { result::primary_ctx::retain(device) }.expect("channels have opened it");
    // SAFETY: the context is kept to the end of the process.
    unsafe { result::ctx::set_current(context) }.expect("it can be current");
}

fn far() {
    let ids = std::env::var("NCCL_RS_IDS").expect("the other side made them");
    let ids: Vec<_> = ids.split(' ').map(from_hex).collect();
    collectives(&ids[2], 1);
    let mut incoming = Channel::connect(0, &ids[0], 1, PARTS, &config(), TIMEOUT).expect("connects");
    let mut out = Channel::connect(0, &ids[1], 0, PARTS, &config(), TIMEOUT).expect("connects");
    for size in SIZES {
        turn_back(&mut incoming, &mut out, size);
    }
    let mut head = [0; HEAD];
    incoming.recv_beginning(PARTS, &mut head, Some(TIMEOUT)).expect("receives");
    let rest = PARTS - HEAD;
    // SAFETY: the context is current, since channels were connected; the memory is this function's to its end.
    let (late, event) = unsafe {
        let [taken, late] = [rest, FILLED].map(|bytes| result::malloc_sync(bytes).expect("there is memory"));
        incoming.take_on_device(HEAD, DeviceSliceMut::<u8>::from_raw(taken, rest), TIMEOUT).expect("takes");
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).expect("makes a stream");
        for byte in 0..50 {
            result::memset_d8_async(late, byte, FILLED, stream).expect("fills");
        }
        result::memcpy_dtod_async(late, taken, rest, stream).expect("copies");
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).expect("makes an event");
        result::event::record(event, stream).expect("records");
        (DeviceSlice::<u8>::from_raw(late, rest), Event::from_raw(event))
    };
    let parts = [(0, Part::Host(&head)), (HEAD, Part::After(event, late))];
    // SAFETY: the event is behind the copy to `late`, which nobody writes to after it.
    unsafe { out.send_parts(PARTS, &parts, TIMEOUT, TIMEOUT) }.expect("sends");
    for _ in 0..ROUNDS {
        turn_back(&mut incoming, &mut out, 64);
    }
    // Until it is killed, or the test is gone.
    let _ = incoming.recv(&mut [0], Some(4 * TIMEOUT));
}

/// Sends a message back with other bits.
fn turn_back(incoming: &mut Channel, out: &mut Channel, size: usize) {
    let mut bytes = vec![0; size];
    incoming.recv(&mut bytes, Some(TIMEOUT)).expect("receives");
    bytes.iter_mut().for_each(|byte| *byte ^= 0xff);
    out.send(&bytes, TIMEOUT).expect("sends");
}

fn hex(id: &UniqueId) -> String {
    id.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> UniqueId {
    let byte = |i: usize| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).expect("two digits");
    UniqueId::from_bytes(std::array::from_fn(byte))
}
