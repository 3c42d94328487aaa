//! The OpenAI routes, through the coordinator's router: no worker is there, so what is valid ends as 503.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use moesaic_coordinator::model::Model;
use moesaic_coordinator::shell::http::fields::Fields;
use moesaic_coordinator::shell::http::progress::Progress;
use moesaic_coordinator::shell::http::router;
use moesaic_coordinator::shell::service::Service;
use moesaic_coordinator::shell::workers::Workers;
use moesaic_coordinator::text::{ChatTemplate, Tokenizer};
use moesaic_node::{Connector, registry};
use moesaic_proto::WorkerId;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::checks::check_error;
use super::requests::check_params;
use crate::fixtures;

const BODY_BYTES_MAX: usize = 8 << 10;

thread_local! {
    pub(super) static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().unwrap();
    static SERVICE: Arc<Service> = {
        let folder = fixtures::folder("tiny-r1");
        let model = Model::open(&folder, None).unwrap();
        let (tokenizer, template) = (Tokenizer::open(&folder).unwrap(), ChatTemplate::open(&folder).unwrap());
        let registry = RUNTIME.with(|runtime| runtime.block_on(registry::open("embedded", "fuzz"))).unwrap();
        let workers = Workers::new("fuzz", &WorkerId::new("c").unwrap(), &model, 1, &*registry, Connector::default());
        Arc::new(Service::new(model, tokenizer, template, Arc::new(workers), 64))
    };
    static CONFIG: moesaic_model::Config = moesaic_model::Config::read(&fixtures::folder("tiny-r1")).unwrap();
}

/// A coordinator that serves the demo model and has no workers.
pub(super) fn service() -> Arc<Service> {
    SERVICE.with(Arc::clone)
}

/// `<method> <path>`, header lines, an empty line, the body.
pub fn http(data: &[u8]) {
    let Some(request) = parse(data) else { return };
    let router = router(service(), BODY_BYTES_MAX, Router::new(), None, CancellationToken::new());
    let (status, body) = RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let response = router.oneshot(request).await.unwrap();
            (response.status(), response.into_body().collect().await.unwrap().to_bytes())
        })
    });
    let body: Value = serde_json::from_slice(&body).unwrap_or_else(|e| panic!("{status}, {e}: {body:?}"));
    if status == StatusCode::OK {
        return;
    }
    let known = [400, 404, 405, 413, 503];
    assert!(known.contains(&status.as_u16()), "{status}: {body}");
    check_error(body["error"]["message"].as_str().expect("an error has a message"));
}

fn parse(data: &[u8]) -> Option<Request<Body>> {
    let end = data.windows(2).position(|pair| pair == b"\n\n")?;
    let (head, body) = (&data[..end], &data[end + 2..]);
    let mut lines = head.split(|byte| *byte == b'\n');
    let mut first = lines.next()?.splitn(2, |byte| *byte == b' ');
    let mut request = Request::builder().method(first.next()?).uri(first.next()?);
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        request = request.header(name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?);
    }
    let body = body.to_vec();
    if let Ok(fields) = Fields::parse(&body) {
        check_fields(&fields);
    }
    request.body(Body::from(body)).ok()
}

/// Beyond the door: parameters that pass for a prompt here pass on the worker.
fn check_fields(fields: &Fields) {
    match fields.params() {
        Err(error) => check_error(error),
        Ok(params) => CONFIG.with(|config| check_params(&params, vec![5, 6], &service().model, config)),
    }
}

/// A `Last-Event-ID` is what `Display` writes, or nothing.
pub fn last_event_id(data: &[u8]) {
    let mut headers = HeaderMap::new();
    let Ok(value) = HeaderValue::from_bytes(data) else { return };
    headers.insert("last-event-id", value);
    match Progress::of_headers(&headers) {
        Err(error) => check_error(error),
        Ok(progress) => {
            let progress = progress.expect("the header is there");
            assert_eq!(progress.to_string().parse(), Ok(progress.clone()));
            assert!(progress.choices.len() <= data.len());
        }
    }
}
