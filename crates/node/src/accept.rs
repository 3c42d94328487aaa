//! Taking connections in: the one loop that both servers, for gRPC and for HTTP, stand on.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

/// After accept has failed (no file descriptors left).
const RETRY: Duration = Duration::from_millis(50);

/// The next connection, for small messages that wait for each other. Nothing is lost when this is dropped.
pub async fn next(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "no nodelay");
                }
                return (stream, from);
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
