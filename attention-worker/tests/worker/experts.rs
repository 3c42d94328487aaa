//! Expert workers of a few lines: one thread each, one row and one expert at a time.

use std::collections::BTreeMap;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use moesaic_dispatch::{Activations, ExpertHost, Refusal, ReplySender, RequestFrame, Shape};
use moesaic_kernels::{Ffn, Numerics, Pool, RowsRef, combine_first, combine_next};
use moesaic_model::Checkpoint;
use moesaic_proto::v1::RefusalReason;
use moesaic_proto::{ExpertId, LayerId};

pub struct Experts {
    shape: Shape,
    inbox: Mutex<SyncSender<(RequestFrame, ReplySender)>>,
}

impl Experts {
    /// `held`: the experts of every layer.
    pub fn start(checkpoint: &Checkpoint, numerics: Numerics, held: &[usize]) -> Arc<Self> {
        let config = checkpoint.config();
        let mut ffns = BTreeMap::new();
        for layer in config.moe_layers() {
            for &expert in held {
                let block = checkpoint.expert(layer, expert).unwrap();
                let ffn = Ffn::pack(&block.gate, &block.up, &block.down, numerics);
                ffns.insert((LayerId(layer as u8), ExpertId(expert as u16)), ffn);
            }
        }
        let shape = Shape { hidden: config.hidden_size, experts: config.n_routed_experts };
        let (sender, inbox) = sync_channel::<(RequestFrame, ReplySender)>(64);
        std::thread::spawn(move || {
            let pool = Pool::new(1);
            for (frame, reply) in inbox {
                reply.send(Ok(answer(&ffns, &pool, &frame, shape.hidden).into()));
            }
        });
        Arc::new(Self { shape, inbox: Mutex::new(sender) })
    }
}

impl ExpertHost for Experts {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn submit(&self, frame: RequestFrame, reply: ReplySender) {
        if let Err(full) = self.inbox.lock().unwrap().try_send((frame, reply)) {
            let (std::sync::mpsc::TrySendError::Full((_, reply))
            | std::sync::mpsc::TrySendError::Disconnected((_, reply))) = full;
            reply.send(Err(Refusal::new(RefusalReason::Busy, "the inbox is full")));
        }
    }
}

fn answer(ffns: &BTreeMap<(LayerId, ExpertId), Ffn>, pool: &Pool, frame: &RequestFrame, hidden: usize) -> Vec<f32> {
    let mut answer = vec![0.0; frame.output_count() * hidden];
    for ((output, terms), y) in frame.outputs().zip(answer.chunks_exact_mut(hidden)) {
        let row = frame.position(output.row()) as usize * hidden..(frame.position(output.row()) as usize + 1) * hidden;
        let x = match frame.activations() {
            Activations::F32(values) => RowsRef::F32(&values[row]),
            Activations::Bf16(values) => RowsRef::Bf16(&values[row]),
            Activations::There(_) => panic!("a processor's rows on a GPU"),
        };
        let mut single = vec![0.0; hidden];
        for (i, term) in terms.iter().enumerate() {
            ffns[&(frame.header.layer, term.expert())].forward(pool, x, &mut single);
            match (output.is_weighted(), i) {
                (false, _) => y.copy_from_slice(&single),
                (true, 0) => combine_first(y, term.weight(), &single),
                (true, _) => combine_next(y, term.weight(), &single),
            }
        }
    }
    answer
}
