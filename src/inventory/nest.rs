//! How a NestJS events-service is asked, whatever the transport: `get-ticket-categories`, then `get-event-by-id`.

use serde_json::Value;

use super::SourceError;
use super::wire::{self, Refusal};
use crate::domain::{EventId, Snapshot};

/// Asks for the categories alone.
const CATEGORIES: &str = "get-ticket-categories";
/// Asks for the whole event.
const EVENT: &str = "get-event-by-id";

/// What a handler said.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// A value; null where JavaScript has `undefined`.
    Value(Value),
    /// An error reply, any JSON.
    Refused(Value),
}

/// A connection to a NestJS service.
pub trait Peer: Send + Sync {
    /// Sends one request and waits for its first reply. Answers in a bounded time.
    fn request(&self, pattern: &'static str, data: EventId)
    -> impl Future<Output = Result<Answer, SourceError>> + Send;
}

/// Asks for an event's stock. The second question is asked when the first one's answer says too little: an error of any
/// sort, nothing, nonsense, or no categories (which an unknown event may also have).
pub async fn snapshot(peer: &impl Peer, event: EventId) -> Result<Snapshot, SourceError> {
    let first = match peer.request(CATEGORIES, event).await? {
        Answer::Value(Value::Null) => Err(Refusal::NotFound.into()),
        Answer::Value(answer) => wire::categories(&answer, event).map_err(SourceError::Malformed),
        Answer::Refused(error) => Err(Refusal::read(&error).into()),
    };
    if let Ok(snapshot) = &first
        && !snapshot.categories.is_empty()
    {
        return first;
    }
    match peer.request(EVENT, event).await? {
        Answer::Value(Value::Null) => Err(SourceError::EventNotFound),
        Answer::Value(answer) => wire::event(&answer, event).map_err(SourceError::Malformed),
        Answer::Refused(error) => match Refusal::read(&error) {
            // A service that has only the first pattern: its answer is the answer.
            Refusal::NoHandler => first,
            refusal @ (Refusal::NotFound | Refusal::Other(_)) => Err(refusal.into()),
        },
    }
}
