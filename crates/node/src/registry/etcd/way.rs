//! How etcd is reached: in the clear, or over TLS with this node's own certificate, as it is when the connection is made.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use etcd_client::{Channel, Client, ConnectOptions, Error};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tonic::transport::Endpoint;

use super::{CALL_TIMEOUT, KEEPALIVE_INTERVAL};
use crate::connect::dial_tcp;
use crate::tls::Tls;

pub enum Way {
    Plain,
    Tls {
        tls: Tls,
        /// Of etcd's certificate; the cluster's if unset.
        authorities: Option<RootCertStore>,
    },
}

impl Way {
    pub(super) async fn connect(self, endpoints: &[String]) -> Result<Client, Error> {
        match self {
            Self::Plain => {
                let options = ConnectOptions::new()
                    .with_connect_timeout(CALL_TIMEOUT)
                    .with_keep_alive(KEEPALIVE_INTERVAL, CALL_TIMEOUT)
                    .with_keep_alive_while_idle(true);
                Client::connect(endpoints, Some(options)).await
            }
            Self::Tls { tls, authorities } => {
                let doors =
                    Arc::new(Doors { addresses: endpoints.to_vec(), next: AtomicUsize::new(0), tls, authorities });
                let dial = move |_| {
                    let doors = doors.clone();
                    async move { doors.open().await.map(TokioIo::new) }
                };
                // The scheme and the name mean nothing: `dial` knows where to go.
                let endpoint = Endpoint::from_static("http://etcd.invalid")
                    .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                    .keep_alive_timeout(CALL_TIMEOUT)
                    .keep_alive_while_idle(true);
                let channel = endpoint.connect_with_connector_lazy(tower::service_fn(dial));
                Client::from_channel(Channel::Tonic(channel), None).await
            }
        }
    }
}

/// etcd's members. They take turns: a connection that breaks is made anew to the next one.
struct Doors {
    addresses: Vec<String>,
    next: AtomicUsize,
    tls: Tls,
    authorities: Option<RootCertStore>,
}

impl Doors {
    async fn open(&self) -> io::Result<TlsStream<TcpStream>> {
        let mut failed = io::Error::other("no address is given");
        for _ in &self.addresses {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            let address = &self.addresses[turn % self.addresses.len()];
            match timeout(CALL_TIMEOUT, self.open_at(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failed = io::Error::new(error.kind(), format!("{address}: {error}")),
                Err(_) => failed = io::Error::new(io::ErrorKind::TimedOut, format!("{address} does not answer")),
            }
        }
        Err(failed)
    }

    async fn open_at(&self, address: &str) -> io::Result<TlsStream<TcpStream>> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        self.tls.connect_by_name(dial_tcp(address).await?, host, self.authorities.as_ref()).await
    }
}
