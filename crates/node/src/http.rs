//! A port for HTTP/1.1 and HTTP/2, told apart by what TLS has agreed on or, without it, by the connection's first bytes.
//! Bounds connections, headers, streams and waits; stops gracefully.

mod leftover;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures::future::BoxFuture;
use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::accept;
use crate::access::Caller;
use crate::connect::Stream;
use crate::tls::{ClientCertificate, HTTP2, Tls};

/// A connection that has not said what it wants by then is closed: the first bytes, and a request's headers.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(12);
const HEADER_LIST_BYTES_MAX: u32 = 16 << 10;
/// The same over HTTP/1.1, where what is read of a body passes through the same buffer.
const HTTP1_BUFFER_BYTES: usize = 64 << 10;
const HTTP1_HEADERS_MAX: usize = 64;
/// Requests at a time on one connection.
const STREAMS_MAX: u32 = 256;
/// Streams that a peer may open and reset before it is sent away (rapid reset).
const RESET_STREAMS_MAX: usize = 32;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// What a slow reader may leave in our memory.
const SEND_BUFFER_BYTES_MAX: usize = 256 << 10;
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PREFACE_POLL: Duration = Duration::from_millis(20);

pub struct Limits {
    pub connections_max: usize,
    /// How long running requests may go on after a stop.
    pub drain: Duration,
}

/// Serves until `stop`; then accepts nothing more, lets running requests finish within the bound, and cuts the rest. A
/// client's certificate, which it need not have, is noted on its requests as a `Caller`.
pub fn serve(
    listener: TcpListener,
    router: Router,
    tls: Option<Tls>,
    limits: Limits,
    stop: CancellationToken,
) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let places = Arc::new(Semaphore::new(limits.connections_max));
        let graceful = GracefulShutdown::new();
        let mut connections = JoinSet::new();
        loop {
            let (stream, place) = tokio::select! {
                accepted = accept(&listener, &places) => accepted,
                Some(_) = connections.join_next() => continue,
                () = stop.cancelled() => break,
            };
            let served = (router.clone(), tls.clone());
            connections.spawn(connection(stream, place, served, graceful.watcher(), stop.clone()));
        }
        drop(listener);
        let finished = async {
            graceful.shutdown().await;
            while connections.join_next().await.is_some() {}
        };
        if tokio::time::timeout(limits.drain, finished).await.is_err() {
            tracing::warn!(seconds = limits.drain.as_secs(), "requests were still running when the grace ended");
        }
    })
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    let place = places.clone().acquire_owned().await.expect("nobody closes it");
    (accept::next(listener).await.0, place)
}

async fn connection(
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
    (router, tls): (Router, Option<Tls>),
    watcher: Watcher,
    stop: CancellationToken,
) {
    let opened = tokio::select! {
        opened = tokio::time::timeout(HEADER_READ_TIMEOUT, open(stream, tls.as_ref())) => opened,
        () = stop.cancelled() => return,
    };
    let (stream, caller, builder) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) => return tracing::debug!(%error, "a client was sent away"),
        Err(_) => return tracing::debug!("a client said nothing"),
    };
    let service = tower::service_fn(move |request: Request<Incoming>| {
        let (mut request, leftover) = leftover::watch(request);
        request.extensions_mut().insert(caller.clone());
        let answer = router.clone().oneshot(request);
        async move {
            let mut response = answer.await?;
            if let Some(leftover) = leftover {
                leftover.read(&mut response).await;
            }
            Ok::<_, Infallible>(response)
        }
    });
    let serving = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)).into_owned();
    if let Err(error) = watcher.watch(serving).await {
        tracing::debug!(%error, "a connection broke");
    }
}

/// What is spoken over a new connection, and by whom.
async fn open(
    stream: TcpStream,
    tls: Option<&Tls>,
) -> std::io::Result<(Box<dyn Stream>, Caller, Builder<TokioExecutor>)> {
    let Some(tls) = tls else {
        // hyper decides between the versions only when it has the whole preface, and would wait for it for ever.
        preface_or_other(&stream).await;
        return Ok((Box::new(stream), Caller::default(), builder()));
    };
    let (stream, identity) = tls.accept(stream, ClientCertificate::Optional).await?;
    let is_http2 = stream.get_ref().get_ref().1.alpn_protocol() == Some(HTTP2);
    let builder = if is_http2 { builder().http2_only() } else { builder().http1_only() };
    Ok((Box::new(stream), Caller { identity }, builder))
}

/// Waits for enough bytes to tell HTTP/2 from HTTP/1.
async fn preface_or_other(stream: &TcpStream) {
    let mut first = [0; HTTP2_PREFACE.len()];
    while let Ok(read) = stream.peek(&mut first).await {
        if read == 0 || read == first.len() || !HTTP2_PREFACE.starts_with(&first[..read]) {
            return;
        }
        tokio::time::sleep(PREFACE_POLL).await;
    }
}

fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_TIMEOUT)
        .max_buf_size(HTTP1_BUFFER_BYTES)
        .max_headers(HTTP1_HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .max_pending_accept_reset_streams(RESET_STREAMS_MAX)
        .max_local_error_reset_streams(RESET_STREAMS_MAX)
        .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
}
