//! OpenTelemetry traces: spans of a request's way through the cluster, sent to a collector over OTLP (gRPC).
//!
//! Whether a request is traced is decided once, where it comes in; everything after that only adds to traces that are
//! there. A span that nobody wants is nothing and costs nothing. From one process to the next a span is named by its
//! `traceparent` (<https://www.w3.org/TR/trace-context/>). What clients and models say is in no span.

use std::sync::{Arc, OnceLock};

use http::Uri;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span as _, SpanBuilder, SpanContext, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};

pub use opentelemetry::trace::SpanKind as Kind;

/// The header, and the key of gRPC metadata, that names the caller's span.
pub const HEADER: &str = "traceparent";

/// Set once, by `Traces::start`.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("traces is {given:?}; expected http://host:port of a collector that takes OTLP over gRPC")]
    Collector { given: String },
    #[error("trace_ratio is {given}; expected 0 to 1")]
    Ratio { given: f64 },
    #[error("traces: cannot send to {collector}")]
    Exporter { collector: String, source: ExporterBuildError },
    #[error("traces are set up already")]
    Twice,
}

/// This process' spans on their way to the collector.
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Sends spans to `collector`, from inside a tokio runtime; without one there are none. `ratio`: the share of
    /// requests that are traced, of those whose callers do not say.
    pub fn start(
        collector: Option<&str>,
        service: &'static str,
        id: Option<&str>,
        ratio: f64,
    ) -> Result<Self, TraceError> {
        let Some(collector) = collector else { return Ok(Self(None)) };
        let uri = collector.parse::<Uri>().ok();
        if !uri.is_some_and(|uri| uri.scheme_str() == Some("http") && uri.port().is_some()) {
            return Err(TraceError::Collector { given: collector.to_owned() });
        }
        if !(0.0..=1.0).contains(&ratio) {
            return Err(TraceError::Ratio { given: ratio });
        }
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(collector).build();
        let failed = |source| TraceError::Exporter { collector: collector.to_owned(), source };
        let id = id.map_or_else(|| uuid::Uuid::new_v4().to_string(), str::to_owned);
        let resource = Resource::builder().with_service_name(service);
        let resource = resource.with_attribute(KeyValue::new("service.instance.id", id));
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter.map_err(failed)?)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(resource.build())
            .build();
        TRACER.set(provider.tracer("moesaic")).map_err(|_| TraceError::Twice)?;
        Ok(Self(Some(provider)))
    }

    /// Sends what is left, and nothing from then on.
    pub async fn finish(self) {
        let Some(provider) = self.0 else { return };
        let done = tokio::task::spawn_blocking(move || provider.shutdown()).await;
        if let Ok(Err(error)) = done {
            tracing::warn!(%error, "the last spans are not sent");
        }
    }
}

/// A span; ends when it is dropped. None at all where nothing is traced.
#[derive(Debug, Default)]
pub struct Span(Option<Box<opentelemetry_sdk::trace::Span>>);

/// A request's first span here. `caller`: the `traceparent` that it came with, which says whether it is traced.
pub fn root(name: &'static str, caller: Option<&str>) -> Span {
    build(Kind::Server, name, &caller.map(context).unwrap_or_default())
}

/// A part of the span of another process or thread; none of an empty or wrong `parent`.
pub fn part(kind: Kind, name: &'static str, parent: &str) -> Span {
    if parent.is_empty() || TRACER.get().is_none() {
        return Span::default();
    }
    match context(parent) {
        context if context.has_active_span() => build(kind, name, &context),
        _ => Span::default(),
    }
}

fn build(kind: Kind, name: &'static str, parent: &Context) -> Span {
    let Some(tracer) = TRACER.get() else { return Span::default() };
    let span = tracer.build_with_context(SpanBuilder::from_name(name).with_kind(kind), parent);
    Span(span.is_recording().then(|| Box::new(span)))
}

impl Span {
    /// A part of this one.
    pub fn child(&self, kind: Kind, name: &'static str) -> Self {
        let Some(span) = &self.0 else { return Self::default() };
        build(kind, name, &Context::new().with_remote_span_context(span.span_context().clone()))
    }

    /// Its name for other processes and threads.
    pub fn traceparent(&self) -> Option<Arc<str>> {
        self.0.as_ref().map(|span| traceparent(span.span_context()).into())
    }

    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// Something that happens now.
    pub fn event(&mut self, name: &'static str) {
        if let Some(span) = &mut self.0 {
            span.add_event(name, Vec::new());
        }
    }

    pub fn fail(&mut self, reason: impl ToString) {
        if let Some(span) = &mut self.0 {
            span.set_status(Status::error(reason.to_string()));
        }
    }
}

/// Version 00.
fn traceparent(span: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags())
}

/// What a `traceparent` names; nothing if it is wrong.
fn context(traceparent: &str) -> Context {
    struct Header<'a>(&'a str);
    impl Extractor for Header<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            (key == HEADER).then_some(self.0)
        }

        fn keys(&self) -> Vec<&str> {
            vec![HEADER]
        }
    }
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Header(traceparent))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification's example.
    const EXAMPLE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_span_has_the_same_name_everywhere() {
        let context = context(EXAMPLE);
        assert_eq!(traceparent(context.span().span_context()), EXAMPLE);
        for wrong in ["", "00-0-0-01", "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "é"] {
            assert!(!super::context(wrong).span().span_context().is_valid(), "{wrong:?}");
        }
    }

    #[test]
    fn without_a_collector_there_are_no_spans() {
        assert!(Traces::start(None, "x", None, 1.0).is_ok());
        let mut span = root("request", Some(EXAMPLE));
        span.set("key", 1);
        span.event("event");
        span.fail("reason");
        assert_eq!(span.traceparent(), None);
        assert_eq!(span.child(Kind::Internal, "child").traceparent(), None);
        assert_eq!(part(Kind::Server, "part", EXAMPLE).traceparent(), None);
    }

    #[test]
    fn a_wrong_setting_is_named() {
        for collector in ["collector:4317", "https://collector:4317", "http://collector", ""] {
            let error = Traces::start(Some(collector), "x", None, 1.0).err().unwrap().to_string();
            assert!(error.contains(&format!("{collector:?}; expected http://host:port")), "{error}");
        }
        let error = Traces::start(Some("http://collector:4317"), "x", None, 1.5).err().unwrap().to_string();
        assert_eq!(error, "trace_ratio is 1.5; expected 0 to 1");
    }
}
