//! OpenAI-compatible HTTP: routes, bodies and errors. Everything that runs is in `shell::service`.

mod batch;
mod chat;
mod completions;
mod error;
pub mod fields;
mod logprobs;
pub mod progress;
mod types;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio_util::sync::CancellationToken;

use super::access::Doorkeeper;
use super::service::{Client, Service};
use crate::core::ApiError;
use crate::core::error::shortened;
use error::ChatError;
use fields::Fields;
use progress::Progress;
use types::{ModelCard, ModelList, Text, Tokens};

/// Choices of one prompt.
const CHOICES_MAX: i64 = 128;
/// A body that takes longer is refused.
const BODY_READ_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone)]
struct App {
    service: Arc<Service>,
    body_bytes_max: usize,
    /// Callers must say who they are.
    is_guarded: bool,
    stop: CancellationToken,
}

/// One request to run the model.
struct Incoming {
    client: Client,
    progress: Option<Progress>,
    fields: Fields,
}

/// Every route, by its row in the table of who may use it.
fn routes() -> [(&'static str, MethodRouter<App>); 7] {
    [
        ("POST /v1/chat/completions", post(chat_completions)),
        ("POST /v1/completions", post(text_completions)),
        ("GET /v1/models", get(models)),
        ("GET /v1/models/{*id}", get(model)),
        ("POST /tokenize", post(tokenize)),
        ("POST /detokenize", post(detokenize)),
        ("GET /health", get(health)),
    ]
}

/// Every route's row.
pub fn rows() -> Vec<&'static str> {
    routes().into_iter().map(|(row, _)| row).collect()
}

/// `more` routes are guarded as these are: `keeper` lets in whom it knows; without one everybody may use everything.
pub fn router(
    service: Arc<Service>,
    body_bytes_max: usize,
    more: Router,
    keeper: Option<Doorkeeper>,
    stop: CancellationToken,
) -> Router {
    let app = App { service, body_bytes_max, is_guarded: keeper.is_some(), stop };
    let router = routed(routes()).with_state(app).merge(more);
    let router = match keeper {
        Some(keeper) => keeper.guard_http(router),
        None => router,
    };
    router.fallback(unknown_path).method_not_allowed_fallback(unknown_method)
}

/// A router of routes that are named by their rows.
pub(super) fn routed<S>(routes: impl IntoIterator<Item = (&'static str, MethodRouter<S>)>) -> Router<S>
where
    S: Clone + Send + Sync + 'static,
{
    routes.into_iter().fold(Router::new(), |router, (row, handler)| {
        let (_, path) = row.split_once(' ').expect("a row is a method and a path");
        router.route(path, handler)
    })
}

async fn chat_completions(State(app): State<App>, request: Request) -> Result<Response, ChatError> {
    let incoming = app.incoming(request).await?;
    Ok(chat::completions(app.service, incoming).await?)
}

async fn text_completions(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let incoming = app.incoming(request).await?;
    completions::completions(app.service, incoming).await
}

async fn models(State(app): State<App>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![app.card()] })
}

async fn model(State(app): State<App>, Path(id): Path<String>) -> Result<Json<ModelCard>, ApiError> {
    app.service.check_model(&id)?;
    Ok(Json(app.card()))
}

/// A text (`prompt`) as it is, or a conversation (`messages`) through the chat template.
async fn tokenize(State(app): State<App>, request: Request) -> Result<Json<Tokens>, ApiError> {
    let mut fields = app.fields(request).await?;
    let service = &app.service;
    service.check_model(&fields.string("model")?.unwrap_or_default())?;
    let add_special = fields.boolean("add_special_tokens")?.unwrap_or(false);
    let tokens = match fields.string("prompt")? {
        Some(text) => service.tokenize(text, add_special).await?,
        None if fields.get("messages").is_none() => {
            return Err(ApiError::invalid("prompt", "is not set; expected prompt or messages"));
        }
        None => {
            let variables = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
            service.tokenize_chat(&chat::messages(fields.take("messages"))?, &variables).await?.tokens
        }
    };
    Ok(Json(Tokens { count: tokens.len(), max_model_len: service.model.context_max, tokens }))
}

async fn detokenize(State(app): State<App>, request: Request) -> Result<Json<Text>, ApiError> {
    let fields = app.fields(request).await?;
    app.service.check_model(&fields.string("model")?.unwrap_or_default())?;
    let tokens = fields.token_ids("tokens")?;
    if tokens.is_empty() {
        return Err(ApiError::invalid("tokens", "is empty; expected a list of token ids"));
    }
    Ok(Json(Text { prompt: app.service.tokenizer.decode(&tokens) }))
}

/// 200 only when a token could be produced. Anybody may ask, so where callers must say who they are it says no more.
async fn health(State(app): State<App>) -> Result<Response, ApiError> {
    let reason = app.service.workers.not_ready().borrow().clone();
    let reason = reason.or_else(|| app.stop.is_cancelled().then(|| "the coordinator is stopping".into()));
    match reason {
        Some(_) if app.is_guarded => Err(ApiError::Unavailable { reason: "the cluster is not ready".into() }),
        None if app.is_guarded => Ok(Json(serde_json::json!({"status": "ready"})).into_response()),
        Some(reason) => Err(ApiError::Unavailable { reason }),
        None => Ok(Json(serde_json::json!({"status": "ready", "sequences": app.service.sequences()})).into_response()),
    }
}

async fn unknown_path(request: Request) -> ApiError {
    let (method, path) = (shortened(request.method().as_str()), shortened(request.uri().path()));
    ApiError::UnknownPath { method, path }
}

async fn unknown_method(request: Request) -> ApiError {
    let (method, path) = (shortened(request.method().as_str()), shortened(request.uri().path()));
    ApiError::Method { method, path }
}

impl App {
    async fn incoming(&self, request: Request) -> Result<Incoming, ApiError> {
        let client = Client::of(request.extensions(), request.headers());
        let progress = Progress::of_headers(request.headers())?;
        Ok(Incoming { client, progress, fields: self.fields(request).await? })
    }

    async fn fields(&self, request: Request<Body>) -> Result<Fields, ApiError> {
        read_fields(request, self.body_bytes_max).await
    }

    fn card(&self) -> ModelCard {
        let model = &self.service.model;
        ModelCard {
            id: model.name.clone(),
            object: "model",
            created: 0,
            owned_by: "moesaic",
            max_model_len: model.context_max,
        }
    }
}

/// Reads a body, bounded in size and time.
pub(super) async fn read_fields(request: Request<Body>, bytes_max: usize) -> Result<Fields, ApiError> {
    let body = Limited::new(request.into_body(), bytes_max).collect();
    let body = tokio::time::timeout(BODY_READ_TIMEOUT, body)
        .await
        .map_err(|_| ApiError::SlowBody { seconds: BODY_READ_TIMEOUT.as_secs() })?;
    let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
        Some(_) => ApiError::TooLarge { limit: bytes_max },
        None => ApiError::invalid("body", "did not arrive whole"),
    })?;
    Fields::parse(&body.to_bytes())
}
