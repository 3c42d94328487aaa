//! The work that is measured: prompts and generations sent to the attention worker as a coordinator sends them, and
//! completions asked over HTTP as a client asks them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use moesaic_node::{Member, handshake};
use moesaic_proto::WorkerId;
use moesaic_proto::v1::attention_worker_client::AttentionWorkerClient;
use moesaic_proto::v1::{AbortCallRequest, Hello, Role, RunEvent, RunRequest, SamplingParams};
use tonic::Streaming;
use tonic::transport::Channel;

use crate::plan::Plan;

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Measured {
    pub tokens_per_s: f64,
    /// Serving: until a request's first token.
    pub first_token: Vec<Duration>,
    /// Serving: between two tokens of a request.
    pub gaps: Vec<Duration>,
}

impl Measured {
    fn rate(tokens: usize, time: Duration) -> Self {
        let tokens_per_s = tokens as f64 / time.as_secs_f64();
        Self { tokens_per_s, first_token: Vec::new(), gaps: Vec::new() }
    }
}

pub struct Load {
    worker: AttentionWorkerClient<Channel>,
    http: reqwest::Client,
    url: String,
    model: String,
    hello: Hello,
    vocabulary: u32,
}

impl Load {
    pub async fn connect(worker: &Member, plan: &Plan, coordinator: SocketAddr) -> Result<Self> {
        let id = WorkerId::new("bench").context("a fixed id")?;
        let fingerprint = plan.checkpoint.fingerprint();
        Ok(Self {
            worker: AttentionWorkerClient::connect(format!("http://{}", worker.address)).await?,
            http: reqwest::Client::new(),
            url: format!("http://{coordinator}/v1/completions"),
            model: plan.checkpoint.name().to_owned(),
            hello: handshake::hello(&plan.cluster, Role::Coordinator, &id, fingerprint, ""),
            vocabulary: plan.checkpoint.config().vocab_size as u32,
        })
    }

    /// Until the token after a prompt.
    pub async fn prefill(&self, tokens: usize) -> Result<Measured> {
        let start = Instant::now();
        let (_, mut events) = self.start(0, tokens, 1).await?;
        while events.message().await?.is_some() {}
        Ok(Measured::rate(tokens, start.elapsed()))
    }

    /// Tokens of `batch` sequences together, counted from when all of them decode: then `begin` is called.
    pub async fn decode(
        &self,
        batch: usize,
        context: usize,
        tokens: usize,
        slack: usize,
        begin: impl FnOnce(),
    ) -> Result<Measured> {
        let mut begin = Some(begin);
        let (mut streams, mut ids) = (Vec::new(), Vec::new());
        for sequence in 0..batch {
            let (id, events) = self.start(sequence, context, tokens + slack).await?;
            ids.push(id);
            streams.push(events.map(move |event| (sequence, event)));
        }
        let mut streams = futures::stream::select_all(streams);
        let mut begun = vec![false; batch];
        let (mut counted, mut start) = (0, None);
        while let Some((sequence, event)) = streams.next().await {
            if event?.finish.is_some() {
                bail!("sequence {sequence} ended before {tokens} tokens of each were counted: a longer --tg is needed");
            }
            begun[sequence] = true;
            match start {
                None if begun.iter().all(|begun| *begun) => {
                    if let Some(begin) = begin.take() {
                        begin();
                    }
                    start = Some(Instant::now());
                }
                None => {}
                Some(start) => {
                    counted += 1;
                    if counted == tokens * batch {
                        let measured = Measured::rate(counted, Instant::now() - start);
                        return self.abort(ids).await.map(|()| measured);
                    }
                }
            }
        }
        bail!("the worker ended its answers early")
    }

    /// Else the worker would go on with them for a while.
    async fn abort(&self, ids: Vec<String>) -> Result<()> {
        for request_id in ids {
            self.worker.clone().abort(AbortCallRequest { request_id, call: 0 }).await?;
        }
        Ok(())
    }

    /// A request's id and its events.
    async fn start(&self, sequence: usize, prompt: usize, max_tokens: usize) -> Result<(String, Streaming<RunEvent>)> {
        let sampling = SamplingParams {
            temperature: Some(0.0),
            top_p: Some(1.0),
            repetition_penalty: Some(1.0),
            seed: Some(0),
            ..Default::default()
        };
        let request_id = format!("bench-{}", uuid::Uuid::new_v4().simple());
        let run = RunRequest {
            hello: Some(self.hello.clone()),
            request_id: request_id.clone(),
            prompt: self.prompt(sequence, prompt),
            sampling: Some(sampling),
            max_tokens: max_tokens as u32,
            ..Default::default()
        };
        Ok((request_id, self.worker.clone().run(run).await?.into_inner()))
    }

    /// Some tokens, others for each sequence.
    fn prompt(&self, sequence: usize, tokens: usize) -> Vec<u32> {
        let token = |i: usize| {
            let mixed = ((sequence as u64) << 32 | i as u64).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            3 + (mixed >> 33) as u32 % (self.vocabulary - 3)
        };
        (0..tokens).map(token).collect()
    }

    /// `streams` clients, each asking four times; the rate is that of generated tokens.
    pub async fn serve(&self, streams: usize, input: usize, output: usize) -> Result<Measured> {
        const REQUESTS: usize = 4;
        let start = Instant::now();
        let client = |stream: usize| async move {
            let mut all = Vec::new();
            for request in 0..REQUESTS {
                all.push(self.complete(stream * REQUESTS + request, input, output).await?);
            }
            Ok::<_, anyhow::Error>(all)
        };
        let done = futures::future::try_join_all((0..streams).map(client)).await?;
        let mut measured = Measured::rate(streams * REQUESTS * output, start.elapsed());
        for (first, gaps) in done.into_iter().flatten() {
            measured.first_token.push(first);
            measured.gaps.extend(gaps);
        }
        measured.first_token.sort_unstable();
        measured.gaps.sort_unstable();
        Ok(measured)
    }

    /// The time to the first token, and those between tokens.
    async fn complete(&self, number: usize, input: usize, output: usize) -> Result<(Duration, Vec<Duration>)> {
        let body = serde_json::json!({
            "model": self.model, "prompt": self.prompt(number, input), "max_tokens": output, "temperature": 0,
            "ignore_eos": true, "stream": true,
        });
        let asked = Instant::now();
        let answer = self.http.post(&self.url).json(&body).send().await?;
        if !answer.status().is_success() {
            bail!("{}: {}", answer.status(), answer.text().await.unwrap_or_default());
        }
        let mut bytes = answer.bytes_stream();
        let (mut first, mut last, mut gaps) = (None, asked, Vec::new());
        while let Some(chunk) = bytes.next().await {
            let (events, now) = (chunk?.windows(6).filter(|w| w == b"data: ").count(), Instant::now());
            for _ in 0..events {
                match first {
                    None => first = Some(now - asked),
                    Some(_) => gaps.push(now - last),
                }
                last = now;
            }
        }
        // The finish and [DONE] are no tokens.
        gaps.truncate(gaps.len().min(output - 1));
        Ok((first.context("an answer without a token")?, gaps))
    }
}
