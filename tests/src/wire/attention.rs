//! An attention worker: the real gRPC service, table of requests and dispatcher around a played engine, which draws each
//! token from two layer calls to the expert workers.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use moesaic_attention_worker::core::batcher::{Counts, Finish, SequenceId};
use moesaic_attention_worker::engine::events::{Event, Events, Speaker};
use moesaic_attention_worker::engine::expert_counts::ExpertCounts;
use moesaic_attention_worker::engine::handle::{self, Command, Inbox, Running, Submit, Token};
use moesaic_attention_worker::shell::requests::Requests;
use moesaic_attention_worker::shell::run::{follow, sweep};
use moesaic_attention_worker::shell::service::Service;
use moesaic_dispatch::{DispatchConfig, DispatchError, Dispatcher, Rows};
use moesaic_proto::v1::{Hello, Role};
use tokio::task::spawn_local;
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::service::Routes;

use super::arithmetic::{Call, EXPERTS, GROUPS, HIDDEN, OPS, State, TOP_K};
use super::net;
use super::site::{Journal, Site};

/// A layer call fails after it.
pub const LAYER_DEADLINE: Duration = Duration::from_secs(30);
/// How long a sequence that nobody reads is kept.
const ORPHANS: Duration = Duration::from_secs(10);
/// Between two tokens of a sequence, beside what the experts take.
const TOKEN: Duration = Duration::from_millis(10);
const PAGES: usize = 1024;

/// Lives until it is killed.
pub async fn run(site: Site, id: String) -> turmoil::Result {
    let hello = site.hello(Role::AttentionWorker, &id);
    let dispatcher = dispatcher(hello.clone(), LAYER_DEADLINE);
    let counts = Counts { pages_total: PAGES, pages_free: PAGES, running: 0, waiting: 0, preemptions: 0 };
    let (engine, inbox) = handle::channel(counts, Arc::new(ExpertCounts::new(site.checkpoint.config())));
    let requests = Requests::new(ORPHANS);
    let service = Service {
        hello: hello.clone(),
        checkpoint: site.checkpoint.clone(),
        engine,
        dispatcher: dispatcher.clone(),
        waiting_max: 64,
        profile: Arc::default(),
        stop: CancellationToken::new(),
        requests: requests.clone(),
    };
    spawn_local(play(inbox, dispatcher.clone(), site.journal.clone()));
    tokio::spawn(follow(site.registry.view(), site.checkpoint.clone(), dispatcher));
    tokio::spawn(sweep(requests));
    site.register(hello).await;
    net::serve(Routes::new(service.server())).await
}

pub fn dispatcher(hello: Hello, layer_deadline: Duration) -> Dispatcher {
    let config = DispatchConfig {
        hidden: HIDDEN,
        experts: EXPERTS,
        groups: GROUPS,
        source: hello.source as u16,
        layer_deadline,
        hello,
        connector: net::connector(),
        fabric: None,
        ops: OPS,
    };
    Dispatcher::new(config, None)
}

/// Sends a layer call and waits for its sum.
pub async fn call(dispatcher: &Dispatcher, call: &Call) -> Result<Vec<f32>, DispatchError> {
    let rows = Rows::F32(call.x.clone());
    let mut y = vec![f32::NAN; call.rows() * HIDDEN];
    dispatcher.dispatch(call.layer, 0, rows, TOP_K, &call.routes)?.combine(&mut y).await?;
    Ok(y)
}

/// The engine: each sequence is a task of its own.
async fn play(mut inbox: Inbox, dispatcher: Dispatcher, journal: Rc<Journal>) {
    let mut running: BTreeMap<SequenceId, DropGuard> = BTreeMap::new();
    let mut next = 0;
    while let Some(command) = inbox.commands.recv().await {
        match command {
            Command::Abort(id) => drop(running.remove(&id)),
            Command::Submit(submit, reply) => {
                let (id, events, aborted) = (SequenceId(next), Arc::<Events>::default(), CancellationToken::new());
                next += 1;
                journal.count("moved", u64::from(!submit.emitted.is_empty()));
                for (index, token) in submit.emitted.iter().enumerate() {
                    events.push(Event::Token { index, token: token.clone(), prompt: Vec::new(), finish: None });
                }
                running.insert(id, aborted.clone().drop_guard());
                let reader = events.reader(submit.emitted.len());
                let _ = reply.send(Ok(Running { id, events: reader }));
                tokio::spawn(sequence(*submit, Speaker(events), dispatcher.clone(), aborted));
            }
        }
    }
}

async fn sequence(submit: Submit, events: Speaker, dispatcher: Dispatcher, aborted: CancellationToken) {
    let request = submit.request;
    let mut state = State::new(submit.sampling.seed, &[request.prompt, request.emitted.clone()].concat());
    for index in request.emitted.len()..request.max_tokens {
        if events.is_unheard() {
            return;
        }
        let drawn = match aborted.run_until_cancelled(draw(&dispatcher, state)).await {
            None => return events.0.push(Event::Aborted),
            Some(Err(error)) => return events.0.push(Event::Failed(error)),
            Some(Ok(drawn)) => drawn,
        };
        state = state.after(drawn);
        let finish = (index + 1 == request.max_tokens).then_some(Finish::Length);
        let token = Token { token: drawn, logprobs: None };
        events.0.push(Event::Token { index, token, prompt: Vec::new(), finish });
    }
}

async fn draw(dispatcher: &Dispatcher, state: State) -> Result<u32, DispatchError> {
    sleep(TOKEN).await;
    let mut answers = Vec::new();
    for layer in state.calls() {
        answers.push(call(dispatcher, &layer).await?);
    }
    Ok(state.token(&answers))
}
