//! The gRPC server of a worker: nodelay, TLS, health, reflection and limits set on purpose.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use moesaic_proto::FILE_DESCRIPTOR_SET;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::server::HealthReporter;

use crate::accept;
use crate::access::{Caller, guarded};
use crate::connect::Stream;
use crate::tls::{ClientCertificate, Tls};

/// Calls at a time on one connection: a coordinator's running requests, with room.
pub const STREAMS_MAX: u32 = 4096;
/// Bytes of headers a call may have.
pub const HEADER_LIST_BYTES_MAX: u32 = 16 << 10;
/// A peer that does not answer a ping for this long is gone.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// What may be on its way on one stream and on one connection before the receiver has read it: a layer's rows.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
pub const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Large frames, so that rows travel in few pieces.
pub const FRAME_BYTES: u32 = 1 << 20;

/// A client that has not shown who it is by then is sent away.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients that may be showing it at a time; more wait.
pub const HANDSHAKES_MAX: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("the gRPC server on {address} ended")]
    Serve { address: SocketAddr, source: tonic::transport::Error },
}

/// A port that is taken but not served yet.
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
}

/// Takes the port; 0 takes any free one.
pub fn bind(address: SocketAddr) -> Result<Bound, ServerError> {
    let failed = |source| ServerError::Bind { address, source };
    let listener = accept::listen(address).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok(Bound { listener, address })
}

impl Bound {
    /// With the port that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`, then lets running calls finish for at most `grace`. With `tls` a client must show a
    /// certificate, and each call is checked against the table of `access`.
    pub fn serve(
        self,
        routes: Routes,
        tls: Option<Tls>,
        stop: CancellationToken,
        grace: Duration,
    ) -> BoxFuture<'static, Result<(), ServerError>> {
        Box::pin(async move {
            let routes = if tls.is_some() { guarded(routes) } else { routes };
            let (ready, connections) = mpsc::channel(1);
            let server = builder()
                .add_routes(routes)
                .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop.clone().cancelled_owned());
            let patience = async {
                stop.cancelled().await;
                tokio::time::sleep(grace).await;
            };
            tokio::select! {
                served = server => served.map_err(|source| ServerError::Serve { address: self.address, source }),
                () = take_in(self.listener, tls, ready) => unreachable!("accepts until it is dropped"),
                () = patience => {
                    tracing::warn!(address = %self.address, ?grace, "calls were still running when the grace ended");
                    Ok(())
                }
            }
        })
    }
}

/// Takes connections in for ever. Those who are slow to show their certificate hold up nobody.
async fn take_in(listener: TcpListener, tls: Option<Tls>, ready: mpsc::Sender<io::Result<Connection>>) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let (stream, from) = accept::next(&listener).await;
        // Nobody closes it.
        let Ok(place) = places.clone().acquire_owned().await else { continue };
        let (tls, ready) = (tls.clone(), ready.clone());
        tokio::spawn(async move {
            let opened = timeout(HANDSHAKE_TIMEOUT, Connection::open(stream, tls.as_ref())).await;
            drop(place);
            match opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                // It is served, unless the server has ended.
                Ok(connection) => drop(ready.send(Ok(connection)).await),
                Err(error) => tracing::warn!(%from, %error, "a client was sent away"),
            }
        });
    }
}

/// A client's connection, and who it is.
struct Connection {
    stream: Box<dyn Stream>,
    caller: Caller,
}

impl Connection {
    async fn open(stream: TcpStream, tls: Option<&Tls>) -> io::Result<Self> {
        let Some(tls) = tls else { return Ok(Self { stream: Box::new(stream), caller: Caller::default() }) };
        let (stream, identity) = tls.accept(stream, ClientCertificate::Required).await?;
        Ok(Self { stream: Box::new(stream), caller: Caller { identity } })
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// A server with this module's limits.
pub fn builder() -> Server {
    Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADER_LIST_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
}

/// Adds grpc.health.v1 and reflection (v1 and v1alpha, which many clients still ask for). The reporter's services
/// start as not serving; the role says when that changes.
pub fn with_health_and_reflection(routes: Routes, service: &str) -> BoxFuture<'_, (Routes, HealthReporter)> {
    Box::pin(async move {
        let (reporter, health) = tonic_health::server::health_reporter();
        set_serving(&reporter, service, false).await;
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let known = "the descriptors are the ones that this binary was built from";
        let routes = routes
            .add_service(health)
            .add_service(reflection().build_v1().expect(known))
            .add_service(reflection().build_v1alpha().expect(known));
        (routes, reporter)
    })
}

/// Sets the health of a service and of the server as a whole (the empty name).
pub async fn set_serving(reporter: &HealthReporter, service: &str, serving: bool) {
    let status = match serving {
        true => tonic_health::ServingStatus::Serving,
        false => tonic_health::ServingStatus::NotServing,
    };
    for name in ["", service] {
        reporter.set_service_status(name, status).await;
    }
}
