//! Who is let in at the front door: a key or a certificate, against the table of `moesaic_node::access`. What is asked
//! for without either is refused, and what has no row as well.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, Method, header};
use moesaic_node::access::{self, Caller, Denied};
use moesaic_node::reload;
use tokio::sync::watch;

use super::grpc::status;
use crate::core::ApiError;
use crate::core::error::shortened;
use crate::core::keys::{Account, InvalidKeys, Keys};

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("keys: {} cannot be read", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("keys: {}", path.display())]
    Invalid { path: PathBuf, source: InvalidKeys },
}

/// Knows the keys. Clones share them.
#[derive(Clone)]
pub struct Doorkeeper {
    path: Option<PathBuf>,
    keys: watch::Sender<Arc<(String, Keys)>>,
}

impl Doorkeeper {
    /// Without a file of keys only certificates count.
    pub fn open(path: Option<&Path>) -> Result<Self, KeysError> {
        let keys = path.map(|path| read(path, &Keys::default())).transpose()?.unwrap_or_default();
        Ok(Self { path: path.map(Path::to_owned), keys: watch::Sender::new(Arc::new(keys)) })
    }

    /// Reads the file again and again, for as long as it is polled.
    pub async fn follow(self) {
        if self.path.is_some() {
            match reload::follow("keys", || self.reload()).await {}
        }
    }

    /// Reads the file again. Whether anything has changed.
    fn reload(&self) -> Result<bool, KeysError> {
        let Some(path) = &self.path else { return Ok(false) };
        let now = self.keys.borrow().clone();
        let next = read(path, &now.1)?;
        let has_changed = next.0 != now.0;
        if has_changed {
            self.keys.send_replace(Arc::new(next));
        }
        Ok(has_changed)
    }

    /// Puts the table in front of the HTTP routes that are there so far.
    pub fn guard_http(self, routes: Router) -> Router {
        async fn check(
            State(keeper): State<Doorkeeper>,
            path: MatchedPath,
            mut request: Request,
            next: Next,
        ) -> Response {
            let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
            let row = format!("{method} {}", path.as_str());
            match keeper.admit(&row, &mut request) {
                Ok(()) => next.run(request).await,
                Err(error) => error.into_response(),
            }
        }
        routes.route_layer(from_fn_with_state(self, check))
    }

    /// The same for gRPC.
    pub fn guard_grpc(self, routes: Router) -> Router {
        async fn check(State(keeper): State<Doorkeeper>, mut request: Request, next: Next) -> Response {
            let row = request.uri().path().to_owned();
            match keeper.admit(&row, &mut request) {
                Ok(()) => next.run(request).await,
                Err(error) => status(error).into_http::<Body>(),
            }
        }
        routes.layer(from_fn_with_state(self, check))
    }

    /// Notes on the request whose key it came with.
    fn admit(&self, row: &str, request: &mut Request) -> Result<(), ApiError> {
        let account = self.check(row, request.headers(), request.extensions().get());
        let account = account.inspect_err(|error| tracing::warn!(row = shortened(row), %error, "refused"))?;
        if let Some(account) = account {
            request.extensions_mut().insert(account);
        }
        Ok(())
    }

    /// A certificate, or else a key, and whose.
    fn check(&self, row: &str, headers: &HeaderMap, caller: Option<&Caller>) -> Result<Option<Arc<Account>>, ApiError> {
        let Err(denied) = access::check(row, caller) else { return Ok(None) };
        let rule = match &denied {
            Denied::NoRule { .. } => return Err(denied.into()),
            Denied::Role { rule, .. } | Denied::Unknown(rule) => *rule,
        };
        let (Some(scope), Some(key)) = (rule.key, bearer(headers)) else { return Err(denied.into()) };
        let unknown = || ApiError::Unauthenticated { reason: "the API key is not known".into() };
        let account = self.keys.borrow().1.find(key).ok_or_else(unknown)?;
        if !account.has(scope) {
            let reason = format!("the key {:?} may not use this: it needs {}", account.name, rule.needed());
            return Err(ApiError::Forbidden { reason });
        }
        Ok(Some(account))
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        let reason = denied.to_string();
        match denied {
            Denied::Unknown(_) => Self::Unauthenticated { reason },
            Denied::NoRule { .. } | Denied::Role { .. } => Self::Forbidden { reason },
        }
    }
}

/// The text and what it says.
fn read(path: &Path, before: &Keys) -> Result<(String, Keys), KeysError> {
    let text = std::fs::read_to_string(path).map_err(|source| KeysError::Read { path: path.to_owned(), source })?;
    let keys = Keys::parse(&text, before).map_err(|source| KeysError::Invalid { path: path.to_owned(), source })?;
    Ok((text, keys))
}

/// `Authorization: Bearer KEY`
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}
