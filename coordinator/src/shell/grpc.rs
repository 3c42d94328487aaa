//! The public gRPC service: the same requests as HTTP, in `moesaic.v1`'s words.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use moesaic_proto::limits::PUBLIC_MESSAGE_BYTES_MAX;
use moesaic_proto::v1::inference_server::{Inference, InferenceServer};
use moesaic_proto::v1::{
    AbortRequest, AbortResponse, Conversation, Finish, GenerateRequest, GenerateResponse, ListModelsRequest,
    ListModelsResponse, Model, SamplingParams, TokenizeRequest, TokenizeResponse, generate_request::Prompt,
    tokenize_request::Input,
};
use tonic::{Code, Request, Response, Status};

use super::service::{Client, Service, draw_id, draw_seed};
use crate::core::error::shortened;
use crate::core::keys::Account;
use crate::core::{ApiError, Delta, Params};
use crate::text::template::Message;

/// For health and reflection.
pub const NAME: &str = "moesaic.v1.Inference";

pub struct Grpc(Arc<Service>);

pub fn server(service: Arc<Service>) -> InferenceServer<Grpc> {
    InferenceServer::new(Grpc(service)).max_decoding_message_size(PUBLIC_MESSAGE_BYTES_MAX)
}

#[tonic::async_trait]
impl Inference for Grpc {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let client = Client::of(&extensions, &metadata.into_headers());
        Ok(Response::new(self.start(client, message).await.map_err(status)?))
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        let account = request.extensions().get::<Arc<Account>>();
        let aborted = self.0.abort(account.map(|account| account.name.as_str()), &request.get_ref().request_id);
        Ok(Response::new(AbortResponse { aborted }))
    }

    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let (model, identity) = (&self.0.model, self.0.workers.identity());
        let (fingerprint, numerics) = identity.map(|i| (i.fingerprint.clone(), i.numerics())).unwrap_or_default();
        let model = Model {
            name: model.name.clone(),
            family: model.family.clone(),
            context_tokens_max: model.context_max as u32,
            fingerprint,
            numerics,
        };
        Ok(Response::new(ListModelsResponse { models: vec![model] }))
    }

    async fn tokenize(&self, request: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        let request = request.into_inner();
        self.0.check_model(&request.model).map_err(status)?;
        let ids = match request.input {
            None => Err(ApiError::invalid("input", "is not set; expected text or chat")),
            Some(Input::Text(text)) => self.0.tokenize(text, false).await,
            Some(Input::Chat(chat)) => self.chat_tokens(chat).await,
        };
        Ok(Response::new(TokenizeResponse { ids: ids.map_err(status)? }))
    }
}

impl Grpc {
    async fn start(
        &self,
        client: Client,
        mut message: GenerateRequest,
    ) -> Result<<Self as Inference>::GenerateStream, ApiError> {
        let service = &self.0;
        service.check_model(&message.model)?;
        let (prompt, known) = (message.prompt.take(), message.resume_position);
        let mut request_id = std::mem::take(&mut message.request_id);
        match known {
            Some(_) if request_id.is_empty() => {
                return Err(ApiError::invalid("request_id", "is empty; resume_position is of a request that has one"));
            }
            Some(given) if given as usize > service.model.context_max => {
                let context = service.model.context_max;
                let reason = format!("is {given}; the model's context has {context} tokens");
                return Err(ApiError::invalid("resume_position", reason));
            }
            _ if request_id.is_empty() => request_id = draw_id("gen-"),
            _ => {}
        }
        let params = params(message);
        params.check(&service.model)?;
        let ticket = match known {
            Some(_) => service.admit_again(client, request_id.clone(), 1).await?,
            None => service.admit(client, request_id.clone(), 1)?,
        };
        let prompt = match prompt {
            None => return Err(ApiError::invalid("prompt", "is not set; expected tokens, text or chat")),
            Some(Prompt::Tokens(tokens)) => tokens.ids,
            Some(Prompt::Text(text)) => service.tokenize(text, false).await?,
            Some(Prompt::Chat(chat)) => self.chat_tokens(chat).await?,
        };
        let request = service.request(&params, prompt)?;
        let prompt_tokens = request.prompt.len() as u32;
        let seed = params.seed.unwrap_or_else(draw_seed);
        let generation = service.generate(ticket, request, seed, (0, 0), known).await?;
        let mut first = Some(seed);
        let news = generation.into_stream().filter(|news| {
            let is_known = matches!(news, Ok(delta) if delta.is_known);
            std::future::ready(!is_known)
        });
        let answers = news
            .map(move |news| news.map(|delta| answer(&request_id, delta, first.take(), prompt_tokens)).map_err(status));
        Ok(Box::pin(answers))
    }

    async fn chat_tokens(&self, chat: Conversation) -> Result<Vec<u32>, ApiError> {
        let message = |(i, message): (usize, moesaic_proto::v1::ChatMessage)| match message.role.as_str() {
            "system" | "user" | "assistant" | "tool" => {
                Ok(Message { role: message.role, content: message.content, name: None, reasoning_content: None })
            }
            other => {
                let reason = format!("is {:?}; expected system, user, assistant or tool", shortened(other));
                Err(ApiError::invalid(format!("chat.messages[{i}].role"), reason))
            }
        };
        let messages = chat.messages.into_iter().enumerate().map(message).collect::<Result<Vec<_>, _>>()?;
        Ok(self.0.tokenize_chat(&messages, &serde_json::Map::new()).await?.tokens)
    }
}

/// A message's parameters as they were given: nothing is checked yet.
pub fn params(message: GenerateRequest) -> Params {
    let s: SamplingParams = message.sampling.unwrap_or_default();
    Params {
        temperature: s.temperature.map(f64::from),
        top_k: Some(i64::from(s.top_k)),
        top_p: s.top_p.map(f64::from),
        min_p: Some(f64::from(s.min_p)),
        repetition_penalty: s.repetition_penalty.map(f64::from),
        presence_penalty: Some(f64::from(s.presence_penalty)),
        frequency_penalty: Some(f64::from(s.frequency_penalty)),
        logit_bias: s.logit_bias.into_iter().map(|(id, bias)| (id, f64::from(bias))).collect(),
        seed: s.seed,
        max_tokens: message.max_tokens.map(i64::from),
        stop: message.stop,
        stop_token_ids: message.stop_token_ids,
        ignore_eos: message.ignore_eos,
        logprobs: message.logprobs.map(i64::from),
        prompt_logprobs: message.prompt_logprobs.map(i64::from),
    }
}

fn answer(request_id: &str, delta: Delta, seed: Option<u64>, prompt_tokens: u32) -> GenerateResponse {
    let finish = delta.ending.map(|ending| Finish {
        reason: ending.reason.into(),
        prompt_tokens,
        completion_tokens: ending.completion_tokens,
        matched_stop: ending.matched_stop,
    });
    GenerateResponse {
        request_id: request_id.to_owned(),
        position: delta.position,
        tokens: delta.tokens,
        text: delta.text,
        prompt: delta.prompt,
        seed,
        finish,
    }
}

/// What an error is called in gRPC.
pub(super) fn status(error: ApiError) -> Status {
    let code = match &error {
        ApiError::Invalid { .. }
        | ApiError::ContextLength { .. }
        | ApiError::TextLength { .. }
        | ApiError::CacheSize { .. } => Code::InvalidArgument,
        ApiError::TooLarge { .. } => Code::OutOfRange,
        ApiError::UnknownModel { .. } | ApiError::UnknownPath { .. } => Code::NotFound,
        ApiError::Method { .. } => Code::Unimplemented,
        ApiError::SlowBody { .. } => Code::DeadlineExceeded,
        ApiError::Exists { .. } => Code::AlreadyExists,
        ApiError::Unauthenticated { .. } => Code::Unauthenticated,
        ApiError::Forbidden { .. } => Code::PermissionDenied,
        ApiError::Full { .. } | ApiError::Quota { .. } => Code::ResourceExhausted,
        ApiError::Unavailable { .. } => Code::Unavailable,
        ApiError::Failed { .. } => Code::Internal,
    };
    let mut status = Status::new(code, error.to_string());
    if let ApiError::Full { retry_after_s, .. } | ApiError::Quota { retry_after_s, .. } = error {
        status.metadata_mut().insert("retry-after", retry_after_s.into());
    }
    status
}
