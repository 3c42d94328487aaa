//! Files that change while a node runs.

use std::convert::Infallible;
use std::error::Error;
use std::time::Duration;

/// How often they are looked at: Kubernetes itself takes a minute to bring a change.
const INTERVAL: Duration = Duration::from_secs(5);

/// Has `reload` look again and again, for as long as this is polled; it says whether anything has changed. What is wrong
/// is logged once, and what was good stays in use.
pub async fn follow<E: Error + 'static>(what: &str, mut reload: impl FnMut() -> Result<bool, E>) -> Infallible {
    let mut refused = None;
    loop {
        tokio::time::sleep(INTERVAL).await;
        match reload() {
            Ok(true) => tracing::info!("new {what} are in use"),
            Ok(false) => refused = None,
            Err(error) => {
                let reason = error.to_string();
                if refused.as_ref() != Some(&reason) {
                    let error = &error as &dyn Error;
                    tracing::error!(error, "{what} cannot be read again; the old ones stay in use");
                }
                refused = Some(reason);
            }
        }
    }
}
