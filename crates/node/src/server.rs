//! The gRPC server of a worker: nodelay, health, reflection and limits set on purpose.

use std::net::SocketAddr;
use std::time::Duration;

use moesaic_proto::FILE_DESCRIPTOR_SET;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::server::HealthReporter;

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

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("the gRPC server on {address} ended")]
    Serve { address: SocketAddr, source: tonic::transport::Error },
}

/// A port that is taken but not served yet.
pub struct Bound {
    incoming: TcpIncoming,
    address: SocketAddr,
}

/// Takes the port; 0 takes any free one.
pub async fn bind(address: SocketAddr) -> Result<Bound, ServerError> {
    let failed = |source| ServerError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok(Bound { incoming: TcpIncoming::from(listener).with_nodelay(Some(true)), address })
}

impl Bound {
    /// With the port that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`, then lets running calls finish for at most `grace`.
    pub async fn serve(self, routes: Routes, stop: CancellationToken, grace: Duration) -> Result<(), ServerError> {
        let server =
            builder().add_routes(routes).serve_with_incoming_shutdown(self.incoming, stop.clone().cancelled_owned());
        let patience = async {
            stop.cancelled().await;
            tokio::time::sleep(grace).await;
        };
        tokio::select! {
            served = server => served.map_err(|source| ServerError::Serve { address: self.address, source }),
            () = patience => {
                tracing::warn!(address = %self.address, ?grace, "calls were still running when the grace ended");
                Ok(())
            }
        }
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
pub async fn with_health_and_reflection(routes: Routes, service: &str) -> (Routes, HealthReporter) {
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
