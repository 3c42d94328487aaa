//! What passes between attention workers and expert workers: `ExchangeMessage` and the frames in it.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, mpsc};
use std::time::Duration;

use bytes::Bytes;
use moesaic_dispatch::frame::Header;
use moesaic_dispatch::nccl::SLOT_TABLE_BYTES;
use moesaic_dispatch::nccl::core::{Head, Incoming, Kind as SlotKind};
use moesaic_dispatch::nccl::lane::{Offer, taken_ahead};
use moesaic_dispatch::{AnswerFrame, ExpertHost, Refusal, ReplySender, RequestFrame, Shape};
use moesaic_expert_worker::engine::{Engine, Profile};
use moesaic_expert_worker::experts::Expert;
use moesaic_expert_worker::shard::Shard;
use moesaic_kernels::{Backend, Dtype, Ffn, Numerics, Pool};
use moesaic_node::handshake;
use moesaic_proto::limits::{FRAME_BYTES_MAX, FRAME_ROWS_MAX};
use moesaic_proto::v1::exchange_message::Kind;
use moesaic_proto::v1::lane::What;
use moesaic_proto::v1::{ExchangeMessage, Frame, Hello, Lane, Role};
use moesaic_proto::{Epoch, ExpertId, LayerId, PROTOCOL_VERSION};
use prost::Message;

use super::checks::{check_error, within};

/// Small, so that an input of some hundred bytes is a frame of many rows.
pub(super) const SHAPE: Shape = Shape { hidden: 4, experts: 8 };
/// What errors and reference counts take beside the frame.
const SLACK: usize = 16 << 10;

pub fn request_frame(data: &[u8]) {
    let Ok(frame) = Frame::decode(Bytes::copy_from_slice(data)) else { return };
    drop(decoded(frame));
}

/// The valid frame, checked against all that its readers rely on.
fn decoded(frame: Frame) -> Option<RequestFrame> {
    let bytes = frame.rows.len() + frame.outputs.len() + frame.terms.len();
    let decode = || {
        let header = Header::decode(&frame.header)?;
        RequestFrame::decode(header, frame.clone(), SHAPE)
    };
    let request = match within(2 * bytes + SLACK, decode) {
        Ok(request) => request,
        Err(error) => {
            check_error(error);
            return None;
        }
    };
    let rows = request.row_count();
    assert!((1..=FRAME_ROWS_MAX).contains(&rows));
    // Of choices, rows that chose nothing of this worker's stay where they are.
    let positions: Vec<_> = (0..rows).map(|row| request.position(row as u16) as usize).collect();
    assert!(positions.is_sorted_by(|a, b| a < b) && positions[rows - 1] * SHAPE.hidden < request.activations().len());
    let are_all = rows * SHAPE.hidden == request.activations().len();
    assert!(if are_all { positions[rows - 1] == rows - 1 } else { frame.choices.is_some() });
    let (mut outputs, mut terms) = (0, 0);
    for (output, own) in request.outputs() {
        assert!(usize::from(output.row()) < rows && !own.is_empty() && own.len() == output.terms());
        assert!(output.is_weighted() || own.len() == 1);
        assert!(own.iter().all(|t| usize::from(t.expert().0) < SHAPE.experts && t.weight().is_finite()));
        assert!(own.is_sorted_by(|a, b| a.expert() < b.expert()));
        (outputs, terms) = (outputs + 1, terms + own.len());
    }
    assert_eq!((outputs, terms), (request.output_count(), request.terms().len()));
    let encoded = request.encode(SHAPE.hidden);
    match frame.choices {
        None => assert_eq!(encoded, Frame { refusal: None, ..frame }),
        // What they ask, as outputs.
        Some(_) => {
            let again = RequestFrame::decode(request.header, encoded, SHAPE).unwrap();
            assert!(again.outputs().eq(request.outputs()));
        }
    }
    Some(request)
}

pub fn answer_frame(data: &[u8]) {
    let Ok(frame) = Frame::decode(Bytes::copy_from_slice(data)) else { return };
    let detail = frame.refusal.as_ref().map_or(0, |refusal| refusal.detail.len());
    let answer = within(2 * (frame.rows.len() + detail) + SLACK, || AnswerFrame::decode(frame.clone()));
    match answer {
        Err(error) => check_error(error),
        Ok(answer) => match (&answer.result, &frame.refusal) {
            (Ok(values), None) => {
                assert_eq!(values.len() * size_of::<f32>(), frame.rows.len());
                let kept = Frame { outputs: Bytes::new(), terms: Bytes::new(), ..frame };
                assert_eq!(answer.encode(), kept);
            }
            (Err(Refusal { reason, detail }), Some(refusal)) => {
                assert_eq!((*reason, detail), (refusal.reason(), &refusal.detail));
                assert_eq!(
                    AnswerFrame::decode(answer.clone().encode()).unwrap().result.unwrap_err(),
                    answer.result.unwrap_err()
                );
            }
            (result, _) => panic!("{result:?} of {frame:?}"),
        },
    }
}

/// One message of the stream, at either end.
pub fn exchange(data: &[u8]) {
    let Ok(message) = ExchangeMessage::decode(Bytes::copy_from_slice(data)) else { return };
    match message.kind {
        Some(Kind::Hello(peer)) => hello(&peer),
        Some(Kind::Frame(frame)) => {
            AnswerFrame::decode(frame.clone()).map_err(check_error).ok();
            drop(decoded(frame));
        }
        Some(Kind::Lane(Lane { what: Some(What::Offer(offer)), .. })) => match Offer::decode(&offer) {
            Ok(taken) => assert_eq!(taken.encode(), offer),
            Err(invalid) => drop(invalid.to_string()),
        },
        Some(Kind::Lane(_) | Kind::Ping(_)) | None => {}
    }
}

/// Of the lane's largest slot.
const SLOT_BYTES: usize = 4 * SLOT_TABLE_BYTES;

/// The first slot of a lane, as far as the processor reads it: how many bytes come at its beginning (u16), these, and the others right
/// before its rows, where the sender's GPU has written a table.
pub fn slot(data: &[u8]) {
    let Some((front, data)) = data.split_first_chunk() else { return };
    let (front, back) = data.split_at(usize::from(u16::from_le_bytes(*front)).min(data.len()));
    let mut start = [0; SLOT_TABLE_BYTES];
    if front.len() + back.len() > start.len() {
        return;
    }
    start[..front.len()].copy_from_slice(front);
    start[SLOT_TABLE_BYTES - back.len()..].copy_from_slice(back);
    let bytes = start.first_chunk().expect("a head is shorter");
    let head = match Head::decode(bytes) {
        Ok(head) => head,
        Err(fault) => return check_error(fault),
    };
    assert_eq!(head.encode(), *bytes);
    let mut incoming = Incoming::new(head.generation, SLOT_BYTES, FRAME_BYTES_MAX);
    match incoming.receive(bytes) {
        Ok(received) => assert_eq!(received, head),
        Err(fault) => return check_error(fault),
    }
    assert!((SLOT_TABLE_BYTES..=SLOT_BYTES).contains(&incoming.slot_bytes()));
    let (place, rows) = (head.load.place(head.kind, SLOT_BYTES), head.load.rows as usize);
    // A message that runs into a table is refused below.
    assert!(place.message + head.load.message as usize <= place.rows || head.kind == SlotKind::Ahead);
    assert!(place.rows + rows <= place.behind.unwrap_or(SLOT_BYTES));
    if head.kind == SlotKind::Ahead {
        match within(2 * SLOT_TABLE_BYTES + SLACK, || taken_ahead(&start, place.message, head.load)) {
            Err(error) => check_error(error),
            Ok((frame, bytes)) => {
                assert!(bytes <= rows);
                drop(decoded(Frame { rows: vec![0; bytes.min(SLACK)].into(), ..frame }));
            }
        }
    }
}

pub(super) fn own_hello() -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        cluster: "c".into(),
        role: Role::ExpertWorker.into(),
        id: "e0".into(),
        fingerprint: "f".into(),
        numerics: "f32".into(),
        ..Default::default()
    }
}

fn hello(peer: &Hello) {
    let own = own_hello();
    match handshake::check(&own, peer, Role::AttentionWorker) {
        Err(mismatch) => check_error(mismatch),
        Ok(()) => {
            assert_eq!(peer.protocol_version, own.protocol_version);
            assert_eq!(
                (&peer.cluster, &peer.fingerprint, peer.role()),
                (&own.cluster, &own.fingerprint, Role::AttentionWorker)
            );
            let experts = if peer.expert_numerics.is_empty() { &peer.numerics } else { &peer.expert_numerics };
            assert!(peer.numerics.is_empty() || *experts == own.numerics);
        }
    }
}

/// Answers frames of epoch 1, layer 1.
static ENGINE: LazyLock<Arc<Engine>> = LazyLock::new(|| {
    let numerics = Numerics::detect(Dtype::Bf16);
    let weights = |n: usize, seed: usize| -> Vec<f32> { (0..n).map(|i| ((i * 7 + seed) % 5) as f32 - 2.0).collect() };
    let (hidden, width) = (SHAPE.hidden, 2);
    let linear =
        |rows, cols, seed| moesaic_kernels::Linear::pack_f32(rows, cols, &weights(rows * cols, seed), numerics);
    // One expert less than the model has: not every one is held everywhere.
    let expert = |e: usize| {
        let ffn = Ffn {
            gate: linear(width, hidden, e),
            up: linear(width, hidden, e + 1),
            down: linear(hidden, width, e + 2),
        };
        (ExpertId(e as u16), Expert::Cpu(Arc::new(ffn)))
    };
    let held: BTreeMap<_, _> = (0..SHAPE.experts - 1).map(expert).collect();
    let (engine, _) =
        Engine::start(SHAPE, Backend::Cpu(numerics, Pool::new(1)), 16, Arc::<Profile>::default()).unwrap();
    engine.shards().install(Epoch(1), Shard::new([(LayerId(1), held)].into()));
    engine
});

/// A frame through the expert worker: a valid one has an answer of one row for each output, or a refusal.
pub fn experts(data: &[u8]) {
    let Ok(frame) = Frame::decode(Bytes::copy_from_slice(data)) else { return };
    let Some(request) = decoded(frame) else { return };
    let (header, outputs) = (request.header, request.output_count());
    let (sender, answer) = mpsc::sync_channel(1);
    let reply = ReplySender::new(header, move |answer| sender.send(answer).unwrap());
    ENGINE.answer(request, reply);
    let answer = answer.recv_timeout(Duration::from_secs(10)).expect("every frame is answered");
    assert_eq!((answer.header.sequence, answer.header.micro_batch), (header.sequence, header.micro_batch));
    match answer.result {
        Ok(values) => assert_eq!(values.len(), outputs * SHAPE.hidden),
        Err(refusal) => check_error(refusal),
    }
}
