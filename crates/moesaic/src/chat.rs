//! `moesaic chat`: a conversation over gRPC, printed as it comes. Keeps the history of this process, nothing else.

use std::io::{BufRead, IsTerminal, Read, Write};

use anyhow::{Context, Result, bail};
use moesaic_proto::v1::generate_request::Prompt;
use moesaic_proto::v1::inference_client::InferenceClient;
use moesaic_proto::v1::{ChatMessage, Conversation, GenerateRequest, SamplingParams};

use crate::server::{Door, Server};

/// Ends the reasoning of R1-style models; what comes before it is thought, not said.
const THINK_END: &str = "</think>";
const THINK_START: &str = "<think>";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: Server,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 to 2; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Tokens an answer may have; what is left of the context if not given
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Ask this and exit. Without it: a conversation on a terminal, else all of standard input is asked
    prompt: Option<String>,
}

pub async fn run(args: Args) -> Result<()> {
    let mut chat = Chat::new(InferenceClient::new(args.server.connect().await?), &args);
    if let Some(prompt) = &args.prompt {
        return chat.turn(prompt).await;
    }
    if !std::io::stdin().is_terminal() {
        let mut prompt = String::new();
        std::io::stdin().lock().read_to_string(&mut prompt).context("cannot read standard input")?;
        return chat.turn(prompt.trim_end()).await;
    }
    eprintln!("Type a message and press Enter; an empty line or Ctrl-D ends the conversation.");
    loop {
        eprint!("> ");
        let Some(line) = tokio::task::spawn_blocking(read_line).await?? else { return Ok(()) };
        match line.trim() {
            "" => return Ok(()),
            line => chat.turn(line).await?,
        }
    }
}

fn read_line() -> std::io::Result<Option<String>> {
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line)?;
    Ok((read > 0).then_some(line))
}

struct Chat {
    client: InferenceClient<Door>,
    temperature: f32,
    max_tokens: Option<u32>,
    messages: Vec<ChatMessage>,
    /// Reasoning is shown dimmed, on a terminal.
    dim: bool,
}

impl Chat {
    fn new(client: InferenceClient<Door>, args: &Args) -> Self {
        let messages = args.system.iter().map(|text| message("system", text)).collect();
        let dim = std::io::stdout().is_terminal();
        Self { client, temperature: args.temperature, max_tokens: args.max_tokens, messages, dim }
    }

    /// Asks, prints the answer as it comes and remembers both.
    async fn turn(&mut self, text: &str) -> Result<()> {
        self.messages.push(message("user", text));
        let request = GenerateRequest {
            prompt: Some(Prompt::Chat(Conversation { messages: self.messages.clone() })),
            sampling: Some(SamplingParams { temperature: Some(self.temperature), ..Default::default() }),
            max_tokens: self.max_tokens,
            ..Default::default()
        };
        let mut stream = self.client.generate(request).await.map_err(refused)?.into_inner();
        let mut answer = String::new();
        let mut out = Painter::new(self.dim);
        while let Some(part) = stream.message().await.map_err(refused)? {
            answer.push_str(&part.text);
            out.show(&part.text)?;
        }
        out.finish()?;
        self.messages.push(message("assistant", &answer));
        Ok(())
    }
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.into(), content: content.into() }
}

fn refused(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}

/// Writes text to standard output, dimmed from `<think>` to `</think>`.
struct Painter {
    dim: bool,
    /// Text that may be the start of a tag.
    held: String,
}

impl Painter {
    fn new(dim: bool) -> Self {
        Self { dim, held: String::new() }
    }

    fn show(&mut self, text: &str) -> Result<()> {
        self.held.push_str(text);
        let keep = [THINK_START, THINK_END].iter().map(|tag| partial(&self.held, tag)).max().unwrap_or(0);
        let ready: String = self.held.drain(..self.held.len() - keep).collect();
        self.write(&ready)
    }

    fn finish(&mut self) -> Result<()> {
        let rest = std::mem::take(&mut self.held);
        self.write(&rest)?;
        self.write(if self.dim { "\x1b[0m\n" } else { "\n" })
    }

    fn write(&self, text: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let text = match self.dim {
            true => text.replace(THINK_START, "\x1b[2m<think>").replace(THINK_END, "</think>\x1b[0m"),
            false => text.to_owned(),
        };
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            bail!("cannot write the answer: {error}");
        }
        Ok(())
    }
}

/// How many bytes at the end of `text` are an unfinished `tag`.
fn partial(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|&n| text.ends_with(&tag[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::partial;

    #[test]
    fn an_unfinished_tag_is_held_back() {
        for (text, expected) in [("a<", 1), ("a</thi", 5), ("a</think>", 0), ("a", 0), ("", 0), ("<<", 1)] {
            assert_eq!(partial(text, "</think>"), expected, "{text:?}");
        }
    }
}
