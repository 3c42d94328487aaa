//! How a node reaches another one: over TCP, or over what a test puts in its place. The one room of the product that
//! opens connections to peers.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint, Error, Uri};

/// Opens connections; by default over TCP. Clones share it.
#[derive(Clone, Default)]
pub struct Connector {
    dial: Option<Arc<Dial>>,
}

type Dial = dyn Fn(String) -> BoxFuture<'static, io::Result<TokioIo<Box<dyn Stream>>>> + Send + Sync;

/// What a connection is.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Connector {
    /// Over what `dial` opens to an address, "host:port". Of an endpoint's options those of TCP mean nothing then.
    pub fn new<S, F>(dial: impl Fn(String) -> F + Send + Sync + 'static) -> Self
    where
        S: Stream + 'static,
        F: Future<Output = io::Result<S>> + Send + 'static,
    {
        let boxed = move |address| dial(address).map(|opened| opened.map(|s| TokioIo::new(Box::new(s) as _))).boxed();
        Self { dial: Some(Arc::new(boxed)) }
    }

    /// Connects now.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, Error> {
        match self.dial.clone() {
            None => endpoint.connect().await,
            Some(dial) => endpoint.connect_with_connector(tower::service_fn(move |uri| dial(address(&uri)))).await,
        }
    }

    /// Connects at the first call, and again whenever the connection has broken.
    pub fn connect_lazy(&self, endpoint: &Endpoint) -> Channel {
        match self.dial.clone() {
            None => endpoint.connect_lazy(),
            Some(dial) => endpoint.connect_with_connector_lazy(tower::service_fn(move |uri| dial(address(&uri)))),
        }
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.dial.is_some() { "Connector(injected)" } else { "Connector(TCP)" })
    }
}

fn address(uri: &Uri) -> String {
    uri.authority().map(ToString::to_string).unwrap_or_default()
}
