//! Taking connections in: the one loop that both servers, for gRPC and for HTTP, stand on.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// After accept has failed (no file descriptors left).
const RETRY: Duration = Duration::from_millis(50);
/// Connections that the kernel holds until they are accepted; more than net.core.somaxconn has no effect. The standard
/// library asks for 128: a burst of clients overflows that, and those beyond it wait a second, or for ever.
const BACKLOG: u32 = 4096;

/// Takes a port; 0 takes any free one.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart does not wait for the old connections' last packets.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    /// None is turned away and none is forgotten, though nobody has accepted yet.
    #[tokio::test]
    async fn a_burst_of_clients_waits_in_the_backlog() {
        const CLIENTS: usize = 300;
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let mut clients = Vec::new();
        for client in 0..CLIENTS {
            let connected = tokio::time::timeout(Duration::from_millis(900), TcpStream::connect(address)).await;
            clients.push(connected.unwrap_or_else(|_| panic!("client {client} is not let in")).unwrap());
        }
        for _ in 0..CLIENTS {
            tokio::time::timeout(Duration::from_secs(5), next(&listener)).await.expect("each is accepted");
        }
    }
}
