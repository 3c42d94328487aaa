//! Errors as OpenAI's clients expect them: one function from our error to status and body.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};

use super::types::{ErrorBody, ErrorDetail};
use crate::core::ApiError;

/// Seconds after which an unready cluster may be asked again.
const UNAVAILABLE_RETRY_S: u64 = 1;

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        respond(self, |param| param)
    }
}

/// `rename` says what a parameter is called where the request came in.
fn respond(error: ApiError, rename: impl Fn(String) -> String) -> Response {
    let (status, kind, code) = class(&error);
    let retry_after_s = match &error {
        ApiError::Full { retry_after_s, .. } | ApiError::Quota { retry_after_s, .. } => Some(*retry_after_s),
        ApiError::Unavailable { .. } => Some(UNAVAILABLE_RETRY_S),
        _ => None,
    };
    let mut body = body(error, kind, code);
    body.error.param = body.error.param.map(rename);
    let mut response = (status, Json(body)).into_response();
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(seconds) = retry_after_s {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// The body alone, for a stream that has begun.
pub fn error_body(error: ApiError) -> ErrorBody {
    let (_, kind, code) = class(&error);
    body(error, kind, code)
}

fn class(error: &ApiError) -> (StatusCode, &'static str, Option<&'static str>) {
    const INVALID: &str = "invalid_request_error";
    match error {
        ApiError::Invalid { .. } => (StatusCode::BAD_REQUEST, INVALID, None),
        ApiError::ContextLength { .. } | ApiError::TextLength { .. } | ApiError::CacheSize { .. } => {
            (StatusCode::BAD_REQUEST, INVALID, Some("context_length_exceeded"))
        }
        ApiError::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("request_too_large")),
        ApiError::UnknownModel { .. } => (StatusCode::NOT_FOUND, INVALID, Some("model_not_found")),
        ApiError::UnknownPath { .. } => (StatusCode::NOT_FOUND, INVALID, Some("unknown_url")),
        ApiError::Method { .. } => (StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_supported")),
        ApiError::SlowBody { .. } => (StatusCode::REQUEST_TIMEOUT, INVALID, Some("request_timeout")),
        ApiError::Exists { .. } => (StatusCode::CONFLICT, INVALID, Some("request_id_in_use")),
        ApiError::Unauthenticated { .. } => (StatusCode::UNAUTHORIZED, INVALID, Some("invalid_api_key")),
        ApiError::Forbidden { .. } => (StatusCode::FORBIDDEN, INVALID, Some("not_allowed")),
        ApiError::Full { .. } | ApiError::Quota { .. } => {
            (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"))
        }
        ApiError::Unavailable { .. } => (StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("unavailable")),
        ApiError::Failed { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", None),
    }
}

fn body(error: ApiError, kind: &'static str, code: Option<&'static str>) -> ErrorBody {
    let message = error.to_string();
    let param = match error {
        ApiError::Invalid { field, .. } => Some(field),
        ApiError::ContextLength { max_tokens: Some(_), .. } | ApiError::CacheSize { generated: true, .. } => {
            Some("max_tokens".into())
        }
        ApiError::ContextLength { .. } | ApiError::TextLength { .. } | ApiError::CacheSize { .. } => {
            Some("prompt".into())
        }
        ApiError::UnknownModel { .. } => Some("model".into()),
        _ => None,
    };
    ErrorBody { error: ErrorDetail { message, r#type: kind, param, code } }
}

/// An error of a chat request, whose prompt is its messages.
pub struct ChatError(ApiError);

impl From<ApiError> for ChatError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for ChatError {
    fn into_response(self) -> Response {
        respond(self.0, |param| if param == "prompt" { "messages".into() } else { param })
    }
}
