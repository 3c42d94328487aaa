//! Requests, and answers in a form that can be compared to the last bit.

use futures::future::BoxFuture;
use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::{FinishReason, GenerateRequest, GenerateResponse, SamplingParams, TokenIds, TokenInfo};
use tonic::{Status, Streaming};

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub prompt: Vec<Token>,
    pub tokens: Vec<Token>,
    pub text: String,
    pub reason: i32,
    pub matched_stop: String,
}

/// Log-probabilities as bits: equal means equal.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub id: u32,
    pub logprob: Option<u32>,
    pub top: Vec<(u32, u32)>,
}

impl From<TokenInfo> for Token {
    fn from(info: TokenInfo) -> Self {
        let top = info.top.iter().map(|top| (top.token, top.logprob.to_bits())).collect();
        Self { id: info.token, logprob: info.logprob.map(f32::to_bits), top }
    }
}

impl Token {
    pub fn logprob(&self) -> f32 {
        f32::from_bits(self.logprob.expect("log-probabilities were asked for"))
    }
}

impl Answer {
    /// Each position must come once and in order, and a finish at the end.
    pub fn read(mut stream: Streaming<GenerateResponse>) -> BoxFuture<'static, Result<Self, Status>> {
        Box::pin(async move {
            let mut answer = Self::default();
            let mut finished = false;
            while let Some(part) = stream.message().await? {
                assert!(!finished, "nothing comes after the finish");
                assert!(part.tokens.is_empty() || part.position as usize == answer.tokens.len(), "{part:?}");
                answer.prompt.extend(part.prompt.into_iter().map(Token::from));
                answer.tokens.extend(part.tokens.into_iter().map(Token::from));
                answer.text.push_str(&part.text);
                if let Some(finish) = part.finish {
                    finished = true;
                    assert_eq!(finish.completion_tokens as usize, answer.tokens.len());
                    (answer.reason, answer.matched_stop) = (finish.reason, finish.matched_stop);
                }
            }
            assert!(finished, "an answer has a finish");
            Ok(answer)
        })
    }

    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

/// Greedy from token ids, with log-probabilities of everything.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Tokens(TokenIds { ids: prompt.to_vec() })),
        sampling: Some(SamplingParams { temperature: Some(0.0), ..Default::default() }),
        max_tokens: Some(max_tokens as u32),
        ignore_eos: true,
        logprobs: Some(20),
        prompt_logprobs: Some(0),
        ..Default::default()
    }
}

/// Forty of all kinds: prompts of 1 to 158 tokens, greedy and sampled with all that sampling has.
pub fn forty(vocabulary: usize) -> Vec<GenerateRequest> {
    let request = |i: usize| {
        let prompt: Vec<u32> = (0..1 + i * 4).map(|p| (3 + (p * 37 + i * 101) % (vocabulary - 3)) as u32).collect();
        let request = GenerateRequest { logprobs: Some(3), ..greedy(&prompt, 8 + i % 9) };
        match i % 4 {
            0 => request,
            1 => GenerateRequest { stop: vec!["zq".into(), "\u{fffd}\u{fffd}".into()], ..request },
            2 => GenerateRequest { sampling: Some(sampled(i as u64)), ..request },
            _ => GenerateRequest { sampling: Some(sampled(i as u64)), ignore_eos: false, ..request },
        }
    };
    (0..40).map(request).collect()
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: Some(0.9),
        top_k: 50,
        top_p: Some(0.95),
        min_p: 0.01,
        repetition_penalty: Some(1.1),
        presence_penalty: 0.1,
        frequency_penalty: 0.1,
        logit_bias: [(7, 1.5)].into(),
        seed: Some(seed),
    }
}

/// Whether any answer ended for each of the reasons: a set that only ever ends one way shows little.
pub fn reasons(answers: &[Answer]) -> Vec<FinishReason> {
    let mut reasons: Vec<i32> = answers.iter().map(|answer| answer.reason).collect();
    reasons.sort_unstable();
    reasons.dedup();
    reasons.into_iter().map(|reason| FinishReason::try_from(reason).unwrap()).collect()
}
