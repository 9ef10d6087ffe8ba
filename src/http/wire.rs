//! The JSON of the routes.

use chrono::{DateTime, SecondsFormat};
use serde::{Deserialize, Serialize};

use super::health::Verdict;
use crate::{
    domain,
    inventory::{ListedCategory, ListedEvent},
};

/// `GET /`.
#[derive(Serialize)]
pub(super) struct Root {
    pub service: &'static str,
    pub status: &'static str,
    pub version: &'static str,
}

/// One category of `GET /events/{id}/availability`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Availability {
    event_id: u64,
    category_id: u64,
    available_tickets: u64,
    locked_tickets: u64,
    total_tickets: u64,
    timestamp: String,
    status: &'static str,
    version: u64,
}

impl From<&domain::Availability> for Availability {
    fn from(counts: &domain::Availability) -> Self {
        Self {
            event_id: counts.event.value(),
            category_id: counts.category.value(),
            available_tickets: counts.available(),
            locked_tickets: counts.locked(),
            total_tickets: counts.total,
            timestamp: iso(counts.at),
            status: counts.status().as_str(),
            version: counts.version,
        }
    }
}

/// An instant as every wire writes it.
fn iso(instant: domain::Instant) -> String {
    let ms = i64::try_from(instant.as_ms()).unwrap_or(i64::MAX);
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// `GET /readyz`.
#[derive(Serialize)]
pub(super) struct Readiness {
    status: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<&'static str>,
    ledger: &'static str,
    rpc: &'static str,
}

impl From<&Verdict> for Readiness {
    fn from(verdict: &Verdict) -> Self {
        let said = |ok| if ok { "connected" } else { "disconnected" };
        let reasons = [
            (verdict.draining, "draining"),
            (!verdict.ledger, "the ledger does not answer"),
            (verdict.starting, "RabbitMQ is not reached yet"),
        ];
        Self {
            status: if verdict.is_ready() { "ready" } else { "not_ready" },
            reasons: reasons.into_iter().filter_map(|(holds, reason)| holds.then_some(reason)).collect(),
            ledger: said(verdict.ledger),
            rpc: verdict.rpc.map_or("off", said),
        }
    }
}

/// `GET /demo/catalogue.json`.
#[derive(Serialize)]
pub(super) struct Catalogue {
    events: Vec<Event>,
}

#[derive(Serialize)]
struct Event {
    id: u64,
    name: String,
    categories: Vec<Category>,
}

#[derive(Serialize)]
struct Category {
    id: u64,
    name: String,
    price: Option<String>,
}

impl From<&[ListedEvent]> for Catalogue {
    fn from(events: &[ListedEvent]) -> Self {
        let category = |listed: &ListedCategory| Category {
            id: listed.category.value(),
            name: listed.name.clone(),
            price: listed.price.clone(),
        };
        let event = |listed: &ListedEvent| Event {
            id: listed.event.value(),
            name: listed.name.clone(),
            categories: listed.categories.iter().map(category).collect(),
        };
        Self { events: events.iter().map(event).collect() }
    }
}

/// What `GET /demo/token` is asked with.
#[derive(Deserialize)]
pub(super) struct TokenQuery {
    pub user: String,
}

/// `GET /demo/token`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GivenToken {
    pub token: String,
    pub user_id: u64,
    pub expires_in_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_have_milliseconds_and_a_z() {
        assert_eq!(iso(domain::Instant::from_ms(1_795_360_507_250)), "2026-11-22T15:15:07.250Z");
        assert_eq!(iso(domain::Instant::from_ms(0)), "1970-01-01T00:00:00.000Z");
    }
}
