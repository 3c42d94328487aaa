//! What a collector of traces is told of a request: its way through all roles, and nothing of what it says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use moesaic_tests::processes::Up;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const PROMPT: &str = "canary-prompt-77c2";
/// The clients' own spans: one that is traced, and one that is not.
const TRACED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const UNTRACED: &str = "00-11111111111111111111111111111111-2222222222222222-00";
const TOKENS: usize = 40;

/// Spans, each with its service's name.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_process in request.into_inner().resource_spans {
            let service = text(&of_process.resource.unwrap_or_default().attributes, "service.name");
            let spans = of_process.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn serve(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    attributes.iter().find(|attribute| attribute.key == key)?.value.as_ref()?.value.as_ref()
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    match value(attributes, key) {
        Some(Value::StringValue(text)) => text.clone(),
        other => panic!("{key} is {other:?}"),
    }
}

fn number(attributes: &[KeyValue], key: &str) -> i64 {
    match value(attributes, key) {
        Some(Value::IntValue(number)) => *number,
        other => panic!("{key} is {other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The spans of one trace by their ids.
struct Trace(BTreeMap<Vec<u8>, (String, Span)>);

impl Trace {
    fn named(&self, name: &str) -> Vec<&Span> {
        self.0.values().map(|(_, span)| span).filter(|span| span.name == name).collect()
    }

    /// That all spans of a name belong to this service and are parts of spans of another name, within their time.
    fn check(&self, name: &str, service: &str, parent: &str) {
        assert!(!self.named(name).is_empty(), "there is no {name}");
        for (of, span) in self.0.values().filter(|(_, span)| span.name == name) {
            let (_, above) = self.0.get(&span.parent_span_id).unwrap_or_else(|| panic!("{name} is part of nothing"));
            assert_eq!((of.as_str(), above.name.as_str()), (service, parent), "{name}");
            assert!(above.start_time_unix_nano <= span.start_time_unix_nano, "{name} begins before {parent}");
        }
    }
}

#[tokio::test]
async fn a_request_is_traced_through_all_roles() {
    let collector = Collector::default();
    let url = format!("http://{}", collector.serve().await);
    let up = Up::start(&["--processes", "--threads", "1", "--traces", &url]);
    let client = reqwest::Client::new();
    for caller in [Some(TRACED), Some(UNTRACED), None] {
        let body = json!({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true});
        let mut request = client.post(format!("{}/v1/completions", up.url())).json(&body);
        if let Some(caller) = caller {
            request = request.header("traceparent", caller);
        }
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    // Spans are sent when their processes end, at the latest.
    tokio::task::spawn_blocking(|| up.stop()).await.unwrap();

    let spans = std::mem::take(&mut *collector.0.lock().unwrap());
    assert!(!format!("{spans:?}").contains(PROMPT), "a prompt is in a trace");
    let traces: BTreeSet<String> = spans.iter().map(|(_, span)| hex(&span.trace_id)).collect();
    let [_, traced, parent, _] = TRACED.split('-').collect::<Vec<_>>()[..] else { panic!("four parts") };
    assert!(traces.len() == 2 && traces.contains(traced), "the untraced one is not among {traces:?}");

    for trace in &traces {
        let of_trace = spans.iter().filter(|(_, span)| hex(&span.trace_id) == *trace);
        let trace = Trace(of_trace.map(|named| (named.1.span_id.clone(), named.clone())).collect());
        let generates = trace.named("generate");
        assert_eq!(generates.len(), 1, "one sequence");
        let generate = generates[0];
        let expected = if hex(&generate.trace_id) == traced { parent } else { "" };
        assert_eq!(hex(&generate.parent_span_id), expected);
        assert_eq!(number(&generate.attributes, "gen_ai.usage.output_tokens"), TOKENS as i64);
        assert_eq!(text(&generate.attributes, "gen_ai.response.finish_reasons"), "length");
        assert_eq!(generate.events[0].name, "first token");
        trace.check("run", "moesaic-coordinator", "generate");
        trace.check("sequence", "moesaic-attention-worker", "run");
        trace.check("step", "moesaic-attention-worker", "sequence");
        trace.check("layer", "moesaic-attention-worker", "step");
        trace.check("experts", "moesaic-expert-worker", "layer");

        // The prefill, and of the steps after it one in sixteen.
        let steps = trace.named("step").len();
        assert_eq!(steps, 3, "of {TOKENS} tokens");
        let layers = trace.named("layer");
        let distinct: BTreeSet<i64> = layers.iter().map(|of| number(&of.attributes, "moesaic.layer")).collect();
        assert_eq!(layers.len(), steps * distinct.len(), "each step has every layer");
    }
}
