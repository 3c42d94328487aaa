//! Where a command finds a coordinator, and who it says it is: a key, or an operator's certificate.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use moesaic_node::{Connector, Peer, Tls};
use moesaic_proto::v1::Role;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::cli::BadArguments;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct Server {
    /// Any coordinator
    #[arg(long, value_name = "URL", env = "MOESAIC_SERVER", default_value = "http://127.0.0.1:8080")]
    server: String,
    /// An API key, where the cluster has them
    #[arg(long, value_name = "KEY", env = "MOESAIC_KEY", hide_env_values = true)]
    key: Option<String>,
    /// A folder with an operator's certificate, where the cluster has TLS
    #[arg(long, value_name = "DIR", env = "MOESAIC_CLIENT_TLS")]
    tls: Option<PathBuf>,
}

/// A connection that says who it is.
pub type Door = InterceptedService<Channel, Key>;

/// Sent with each call.
#[derive(Clone)]
pub struct Key(Option<MetadataValue<Ascii>>);

impl Interceptor for Key {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl Server {
    pub async fn connect(&self) -> Result<Door> {
        let channel = self.channel()?.await.with_context(|| {
            format!("no coordinator answers at {}; start one with `moesaic up`, or see --server", self.server)
        })?;
        let bearer = |key: &String| {
            let mut value = MetadataValue::try_from(format!("Bearer {key}"))?;
            value.set_sensitive(true);
            Ok(value)
        };
        let value = self.key.as_ref().map(bearer).transpose();
        let value = value.map_err(|_: tonic::metadata::errors::InvalidMetadataValue| {
            BadArguments("--key has characters that no key has".into())
        })?;
        Ok(InterceptedService::new(channel, Key(value)))
    }

    fn channel(&self) -> Result<impl Future<Output = Result<Channel>>> {
        let refuse = |expected: &str| BadArguments(format!("--server is {:?}; expected {expected}", self.server));
        let endpoint = Endpoint::from_shared(self.server.clone()).ok();
        let endpoint = endpoint.filter(|endpoint| matches!(endpoint.uri().scheme_str(), Some("http" | "https")));
        let endpoint = endpoint.ok_or_else(|| refuse("http://HOST:PORT, or https://HOST:PORT with --tls"))?;
        let is_tls = endpoint.uri().scheme_str() == Some("https");
        let tls = match (&self.tls, is_tls) {
            (Some(dir), true) => Some(Tls::open_as(dir, Role::Operator)?),
            (None, true) => return Err(refuse("http://, as --tls is not given").into()),
            (_, false) => None,
        };
        let address = endpoint.uri().authority().map(ToString::to_string).unwrap_or_default();
        let peer = Peer { role: Role::Coordinator, id: None, address };
        Ok(async move {
            let endpoint = peer.endpoint()?.connect_timeout(CONNECT_TIMEOUT);
            Ok(Connector::over(tls).connect(&peer, &endpoint).await?)
        })
    }
}
