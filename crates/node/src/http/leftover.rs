//! What is left of a request's body when its answer is there already, as of one that was refused by its headers. A client
//! that is still writing when its connection closes may never see the answer, and one that takes the connection for its
//! next request finds it closed: so the rest is read first, within bounds, or the client is told that the connection ends.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, Request, Version, header};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use tokio::sync::oneshot;

const BYTES_MAX: usize = 1 << 20;
const TIME_MAX: Duration = Duration::from_secs(1);

/// Comes with the rest of a body, if there was one when it was dropped.
pub struct Leftover(oneshot::Receiver<Incoming>);

/// A request's body that gives back what was not read of it.
struct Returned {
    body: Option<Incoming>,
    back: Option<oneshot::Sender<Incoming>>,
}

/// None over HTTP/2, where a stream ends without its connection, and of clients that ask before they send a body.
pub fn watch(request: Request<Incoming>) -> (Request<Body>, Option<Leftover>) {
    let asks_first = request.headers().contains_key(header::EXPECT);
    if request.version() == Version::HTTP_2 || asks_first || request.body().is_end_stream() {
        return (request.map(Body::new), None);
    }
    let (back, rest) = oneshot::channel();
    (request.map(|body| Body::new(Returned { body: Some(body), back: Some(back) })), Some(Leftover(rest)))
}

impl Leftover {
    /// Reads what is left, before `response` is sent.
    pub async fn read(mut self, response: &mut Response) {
        let Ok(mut rest) = self.0.try_recv() else { return };
        let read_all = async {
            let mut bytes = 0;
            while let Some(frame) = rest.frame().await {
                bytes += frame.ok()?.data_ref().map_or(0, Bytes::len);
                if bytes > BYTES_MAX {
                    return None;
                }
            }
            Some(())
        };
        if !matches!(tokio::time::timeout(TIME_MAX, read_all).await, Ok(Some(()))) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

impl http_body::Body for Returned {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(cx);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), |body| body.size_hint())
    }
}

impl Drop for Returned {
    fn drop(&mut self) {
        if let (Some(body), Some(back)) = (self.body.take(), self.back.take())
            && !body.is_end_stream()
        {
            // Nobody waits for it if the answer came first.
            let _ = back.send(body);
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use http::StatusCode;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::http::{Limits, serve};

    /// Announces a body of so many bytes and sends some, in two parts; what is answered.
    async fn post(stream: &mut TcpStream, announced: usize, sent: usize) -> String {
        let head = format!("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {announced}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            stream.write_all(&vec![b'x'; sent / 2]).await.unwrap();
        }
        let mut answer = vec![0; 4096];
        let read = stream.read(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    }

    #[tokio::test]
    async fn whoever_is_refused_gets_the_answer_and_keeps_the_connection_within_bounds() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let router = Router::new().fallback(async || StatusCode::UNAUTHORIZED);
        let limits = Limits { connections_max: 2, drain: Duration::from_secs(1) };
        let server = tokio::spawn(serve(listener, router, None, limits, stop.clone()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        for _ in 0..3 {
            let answer = post(&mut stream, 300_000, 300_000).await;
            assert!(answer.starts_with("HTTP/1.1 401") && !answer.contains("connection: close"), "{answer}");
        }
        let answer = post(&mut stream, 300_000, 1000).await;
        assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("connection: close"), "{answer}");
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "closed");
        stop.cancel();
        server.await.unwrap();
    }
}
