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
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio_util::sync::CancellationToken;

use super::service::Service;
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
    stop: CancellationToken,
}

pub fn router(service: Arc<Service>, body_bytes_max: usize, stop: CancellationToken) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/health", get(health))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .with_state(App { service, body_bytes_max, stop })
}

async fn chat_completions(State(app): State<App>, request: Request) -> Result<Response, ChatError> {
    let progress = Progress::of_headers(request.headers())?;
    let fields = app.fields(request).await?;
    Ok(chat::completions(app.service, fields, progress).await?)
}

async fn text_completions(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let progress = Progress::of_headers(request.headers())?;
    let fields = app.fields(request).await?;
    completions::completions(app.service, fields, progress).await
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

/// 200 only when a token could be produced.
async fn health(State(app): State<App>) -> Result<Response, ApiError> {
    let reason = app.service.workers.not_ready().borrow().clone();
    let reason = reason.or_else(|| app.stop.is_cancelled().then(|| "the coordinator is stopping".into()));
    match reason {
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
    /// Reads the body, bounded in size and time.
    async fn fields(&self, request: Request<Body>) -> Result<Fields, ApiError> {
        let body = Limited::new(request.into_body(), self.body_bytes_max).collect();
        let body = tokio::time::timeout(BODY_READ_TIMEOUT, body)
            .await
            .map_err(|_| ApiError::SlowBody { seconds: BODY_READ_TIMEOUT.as_secs() })?;
        let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => ApiError::TooLarge { limit: self.body_bytes_max },
            None => ApiError::invalid("body", "did not arrive whole"),
        })?;
        Fields::parse(&body.to_bytes())
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
