//! How a node reaches another one: over TCP, over TLS, or over what a test puts in their place. The one room of the
//! product that opens connections to peers.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use hyper_util::rt::TokioIo;
use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Error};

use crate::tls::Tls;

/// Whom a connection is meant for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub role: Role,
    /// None: whoever of that role is there.
    pub id: Option<WorkerId>,
    /// "host:port"
    pub address: String,
}

/// Opens connections; by default over TCP. Clones share it.
#[derive(Clone, Default)]
pub struct Connector {
    dial: Option<Arc<Dial>>,
}

type Dial = dyn Fn(Peer) -> BoxFuture<'static, io::Result<TokioIo<Box<dyn Stream>>>> + Send + Sync;

/// What a connection is.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Connector {
    /// Over what `dial` opens to a peer. Of an endpoint's options those of TCP mean nothing then.
    pub fn new<S, F>(dial: impl Fn(Peer) -> F + Send + Sync + 'static) -> Self
    where
        S: Stream + 'static,
        F: Future<Output = io::Result<S>> + Send + 'static,
    {
        let boxed = move |peer| dial(peer).map_ok(|stream| TokioIo::new(Box::new(stream) as _)).boxed();
        Self { dial: Some(Arc::new(boxed)) }
    }

    /// Over TLS, where the peer shows that it is the one that is meant; without `tls` over TCP.
    pub fn over(tls: Option<Tls>) -> Self {
        let Some(tls) = tls else { return Self::default() };
        Self::new(move |peer| {
            let tls = tls.clone();
            async move { tls.connect(dial_tcp(&peer.address).await?, &peer).await }
        })
    }

    /// Connects now. `endpoint` is the peer's, with the options of the connection.
    pub fn connect<'a>(&'a self, peer: &'a Peer, endpoint: &'a Endpoint) -> BoxFuture<'a, Result<Channel, Error>> {
        Box::pin(async move {
            match self.dial_to(peer) {
                None => endpoint.connect().await,
                Some(dial) => endpoint.connect_with_connector(tower::service_fn(move |_| dial())).await,
            }
        })
    }

    /// Connects at the first call, and again whenever the connection has broken.
    pub fn connect_lazy(&self, peer: &Peer, endpoint: &Endpoint) -> Channel {
        match self.dial_to(peer) {
            None => endpoint.connect_lazy(),
            Some(dial) => endpoint.connect_with_connector_lazy(tower::service_fn(move |_| dial())),
        }
    }

    fn dial_to(&self, peer: &Peer) -> Option<impl Fn() -> DialFuture + Clone + Send + Sync + use<>> {
        let (dial, peer) = (self.dial.clone()?, peer.clone());
        Some(move || dial(peer.clone()))
    }
}

type DialFuture = BoxFuture<'static, io::Result<TokioIo<Box<dyn Stream>>>>;

impl Peer {
    /// The peer's address as an endpoint. Its scheme says nothing of TLS, which is the connector's.
    pub fn endpoint(&self) -> Result<Endpoint, Error> {
        Endpoint::from_shared(format!("http://{}", self.address))
    }
}

/// For small messages that wait for each other.
pub async fn dial_tcp(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.dial.is_some() { "Connector(injected)" } else { "Connector(TCP)" })
    }
}
