//! turmoil's TCP as the services want it: a connector for clients, accepted connections for servers.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::Router;
use axum::serve::Listener;
use futures::Stream;
use futures::stream::unfold;
use moesaic_node::{Connector, Peer, server};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::service::Routes;
use tonic::transport::server::Connected;
use turmoil::net::{TcpListener, TcpStream};

/// Every host serves gRPC here, and a coordinator HTTP on a port of its own.
pub const PORT: u16 = 7000;
pub const HTTP_PORT: u16 = 8000;

pub fn address(host: &str) -> String {
    format!("{host}:{PORT}")
}

pub fn connector() -> Connector {
    Connector::new(|peer: Peer| async move { TcpStream::connect(peer.address.as_str()).await })
}

/// Serves with the product's limits, for as long as it is polled.
pub async fn serve(routes: Routes) -> turmoil::Result {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    Ok(server::builder().add_routes(routes).serve_with_incoming(accepted(listener)).await?)
}

/// The same for HTTP.
pub async fn serve_http(router: Router) -> turmoil::Result {
    let listener = HttpListener(TcpListener::bind(("0.0.0.0", HTTP_PORT)).await?);
    Ok(axum::serve(listener, router).await?)
}

struct HttpListener(TcpListener);

impl Listener for HttpListener {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        self.0.accept().await.expect("turmoil's listeners do not fail")
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

fn accepted(listener: TcpListener) -> impl Stream<Item = io::Result<Accepted>> {
    unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| Accepted(stream));
        Some((accepted, listener))
    })
}

/// tonic wants to know who has connected; nobody here asks.
struct Accepted(TcpStream);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
