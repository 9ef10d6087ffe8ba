//! What the events-service's JSON means: categories and events as snapshots, errors as [`SourceError`]s.
//!
//! A category: `id`; `total` is `totalSeats`, else `totalTickets`; `stock` is `availableSeats`, else
//! `availableTickets`, else `total - reservedSeats` (`reservedTickets`). Numbers may be texts (`"100"`, `"100.00"`), a
//! negative one counts as zero (oversold is not less than nothing left). `isActive: false` closes. When the total is
//! missing the stock stands for it; when the stock is above a stated total, the total bounds it: fewer tickets can be
//! sold by mistake than more. Anything else that is missing or makes no sense spoils the whole answer, because half an
//! answer would close the other half of the event.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::SourceError;
use crate::domain::{CategoryId, CategoryStock, EventId, Snapshot};

/// The largest number of tickets believed: what JavaScript keeps exact, 2^53 - 1.
const NUMBER_MAX: u64 = (1 << 53) - 1;
/// How much of a stranger's text goes into an error.
const TEXT_MAX: usize = 200;

/// Reads the answer to `get-ticket-categories`: a list, or an event that holds one.
///
/// # Errors
/// A description of what makes no sense.
pub fn categories(answer: &Value, event: EventId) -> Result<Snapshot, String> {
    match answer {
        Value::Array(list) => Ok(Snapshot { open: true, categories: list_of_categories(list, event)? }),
        Value::Object(_) => self::event(answer, event),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            Err(format!("{} instead of a list of categories", kind(answer)))
        }
    }
}

/// Reads an event with its `ticketCategories`: the answer to `get-event-by-id`, or an event of a catalogue.
///
/// # Errors
/// A description of what makes no sense.
pub fn event(answer: &Value, event: EventId) -> Result<Snapshot, String> {
    let Value::Object(fields) = answer else { return Err(format!("{} instead of an event", kind(answer))) };
    let id = event_id(fields)?;
    if id != event {
        return Err(format!("event {id} instead of event {event}"));
    }
    let open = flag(fields, "isActive")?;
    match fields.get("ticketCategories") {
        Some(Value::Array(list)) => Ok(Snapshot { open, categories: list_of_categories(list, event)? }),
        Some(other) => Err(format!("ticketCategories is {}", kind(other))),
        None => Err("an event without ticketCategories".to_owned()),
    }
}

/// The id of an event: `idEvent`, else `id`.
///
/// # Errors
/// A description of what makes no sense.
pub fn event_id(fields: &Map<String, Value>) -> Result<EventId, String> {
    let id = first_number(fields, &["idEvent", "id"])?.ok_or("an event without id")?;
    EventId::new(id).map_err(|error| format!("id of the event: {error}"))
}

fn list_of_categories(list: &[Value], event: EventId) -> Result<Vec<CategoryStock>, String> {
    if list.len() > Snapshot::CATEGORIES_MAX {
        return Err(format!("{} categories, more than {}", list.len(), Snapshot::CATEGORIES_MAX));
    }
    let mut seen = HashSet::with_capacity(list.len());
    let mut categories = Vec::with_capacity(list.len());
    for (position, item) in list.iter().enumerate() {
        let category = category(item, event).map_err(|error| format!("category number {}: {error}", position + 1))?;
        if !seen.insert(category.category) {
            return Err(format!("category {} twice", category.category));
        }
        categories.push(category);
    }
    Ok(categories)
}

fn category(item: &Value, event: EventId) -> Result<CategoryStock, String> {
    let Value::Object(fields) = item else { return Err(format!("{} instead of a category", kind(item))) };
    let id = first_number(fields, &["id"])?.ok_or("no id")?;
    let category = CategoryId::new(id).map_err(|error| error.to_string())?;
    if let Some(other) = first_number(fields, &["eventId"])?
        && other != event.value()
    {
        return Err(format!("of event {other} instead of event {event}"));
    }
    let total = first_number(fields, &["totalSeats", "totalTickets"])?;
    let stock = if let Some(stock) = first_number(fields, &["availableSeats", "availableTickets"])? {
        stock
    } else {
        let total = total.ok_or("neither availableSeats nor totalSeats")?;
        let reserved = first_number(fields, &["reservedSeats", "reservedTickets"])?
            .ok_or("neither availableSeats nor reservedSeats")?;
        total.saturating_sub(reserved)
    };
    let total = total.unwrap_or(stock);
    Ok(CategoryStock { category, total, stock: stock.min(total), open: flag(fields, "isActive")? })
}

/// The first of these fields that is there and not null.
fn first_number(fields: &Map<String, Value>, names: &[&str]) -> Result<Option<u64>, String> {
    for &name in names {
        let read = match fields.get(name) {
            None | Some(Value::Null) => continue,
            Some(Value::Number(number)) => match (number.as_u64(), number.as_f64()) {
                (Some(whole), _) => Some(whole),
                (None, Some(float)) => whole(float),
                (None, None) => None,
            },
            Some(Value::String(text)) => text.trim().parse().ok().and_then(whole),
            Some(Value::Bool(_) | Value::Array(_) | Value::Object(_)) => None,
        };
        return match read {
            Some(number) if number <= NUMBER_MAX => Ok(Some(number)),
            _ => Err(format!("{name} is no whole number that JavaScript keeps exact")),
        };
    }
    Ok(None)
}

/// A whole number, zero if it is negative.
fn whole(float: f64) -> Option<u64> {
    #[expect(clippy::cast_precision_loss, reason = "2^53 is exact")]
    let fits = float.is_finite() && float.fract() == 0.0 && float <= NUMBER_MAX as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, not negative, below 2^53")]
    fits.then_some(float.max(0.0) as u64)
}

/// A flag that is true when missing.
fn flag(fields: &Map<String, Value>, name: &str) -> Result<bool, String> {
    match fields.get(name) {
        None | Some(Value::Null | Value::Bool(true)) => Ok(true),
        Some(Value::Bool(false)) => Ok(false),
        Some(Value::Number(number)) if number.as_u64() == Some(0) => Ok(false),
        Some(Value::Number(number)) if number.as_u64() == Some(1) => Ok(true),
        Some(other) => Err(format!("{name} is {}", kind(other))),
    }
}

const fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a flag",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// What an error reply means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The service has no handler of this name.
    NoHandler,
    /// The service does not know the event.
    NotFound,
    /// Anything else, in its own words.
    Other(String),
}

impl Refusal {
    /// Reads the `err` of a reply, which may be any JSON.
    pub fn read(error: &Value) -> Self {
        let text = message(error).unwrap_or_default();
        let lower = text.to_lowercase();
        if lower.contains("no matching message handler") {
            Self::NoHandler
        } else if code(error) == Some(404) || lower.contains("not found") {
            Self::NotFound
        } else if text.is_empty() {
            Self::Other(shortened(&error.to_string()))
        } else {
            Self::Other(shortened(&text))
        }
    }
}

impl From<Refusal> for SourceError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoHandler => Self::Refused("no matching message handler".to_owned()),
            Refusal::NotFound => Self::EventNotFound,
            Refusal::Other(text) => Self::Refused(text),
        }
    }
}

/// The text itself, `.message` (a text or a list of texts), `.error.message`.
fn message(error: &Value) -> Option<String> {
    let of = |value: &Value| match value.get("message") {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(texts)) => {
            Some(texts.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")).filter(|text| !text.is_empty())
        }
        _ => None,
    };
    match error {
        Value::String(text) => Some(text.clone()),
        Value::Object(_) => of(error).or_else(|| of(error.get("error")?)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => None,
    }
}

/// `.statusCode`, `.error.statusCode`, or the `.status` that some filters write instead.
fn code(error: &Value) -> Option<u64> {
    let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
    let of = |value: &Value| ["statusCode", "status"].iter().find_map(|name| number(value.get(name)?));
    of(error).or_else(|| of(error.get("error")?))
}

/// The beginning of a stranger's text, without control characters.
pub fn shortened(text: &str) -> String {
    text.chars().take(TEXT_MAX).map(|char| if char.is_control() { ' ' } else { char }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn id(value: u64) -> EventId {
        EventId::new(value).expect("an event id")
    }

    fn one(category: &Value) -> Result<(u64, u64, bool), String> {
        let snapshot = categories(&json!([category]), id(3))?;
        assert_eq!(snapshot.categories.len(), 1);
        let read = snapshot.categories[0];
        Ok((read.total, read.stock, read.open))
    }

    #[test]
    fn a_category_is_read_from_any_of_the_field_names() {
        for (category, expected) in [
            (json!({"id": 4, "totalSeats": 9, "availableSeats": 5, "reservedSeats": 1}), (9, 5, true)),
            (json!({"id": 4, "totalSeats": 9, "reservedSeats": 2}), (9, 7, true)),
            (json!({"id": 4, "totalTickets": 9, "availableTickets": 0}), (9, 0, true)),
            (json!({"id": "4", "totalSeats": "9", "availableSeats": "5.00", "isActive": false}), (9, 5, false)),
            (json!({"id": 4, "totalSeats": 9, "availableSeats": null, "reservedSeats": 0}), (9, 9, true)),
            (json!({"id": 4, "availableSeats": 5}), (5, 5, true)),
            (json!({"id": 4, "totalSeats": 3, "availableSeats": 5}), (3, 3, true)),
            (json!({"id": 4, "totalSeats": 3, "availableSeats": -2}), (3, 0, true)),
            (json!({"id": 4, "totalSeats": 3, "reservedSeats": 5}), (3, 0, true)),
            (json!({"id": 4, "totalSeats": 3.0, "reservedSeats": 0, "isActive": 0, "eventId": 3}), (3, 3, false)),
        ] {
            assert_eq!(one(&category), Ok(expected), "{category}");
        }
    }

    #[test]
    fn nonsense_spoils_the_answer() {
        for category in [
            json!(4),
            json!({}),
            json!({"id": 0, "totalSeats": 1, "reservedSeats": 0}),
            json!({"id": 1.5, "totalSeats": 1, "reservedSeats": 0}),
            json!({"id": 1, "totalSeats": 1}),
            json!({"id": 1, "reservedSeats": 1}),
            json!({"id": 1, "totalSeats": "many", "reservedSeats": 0}),
            json!({"id": 1, "totalSeats": 1e300, "reservedSeats": 0}),
            json!({"id": 1, "totalSeats": [1], "reservedSeats": 0}),
            json!({"id": 1, "totalSeats": 1, "reservedSeats": 0, "isActive": "yes"}),
            json!({"id": 1, "totalSeats": 1, "reservedSeats": 0, "eventId": 4}),
        ] {
            assert!(one(&category).is_err(), "{category}");
        }
        for answer in [json!(null), json!(true), json!("x"), json!(3), json!({}), json!({"id": 3})] {
            assert!(categories(&answer, id(3)).is_err(), "{answer}");
        }
        let same = json!({"id": 1, "availableSeats": 1});
        assert!(categories(&json!([same, same]), id(3)).is_err());
        let many: Vec<Value> = (1..=501).map(|id| json!({"id": id, "availableSeats": 1})).collect();
        assert!(categories(&Value::Array(many[..500].to_vec()), id(3)).is_ok());
        assert!(categories(&Value::Array(many), id(3)).is_err());
    }

    #[test]
    fn an_event_is_read_with_its_own_flag_and_must_be_the_one_asked_for() {
        let answer = json!({"idEvent": 3, "isActive": false, "ticketCategories": [{"id": 1, "availableSeats": 1}]});
        let snapshot = event(&answer, id(3)).expect("a snapshot");
        assert!(!snapshot.open && snapshot.categories.len() == 1);
        assert!(event(&answer, id(4)).is_err());
        assert!(event(&json!({"idEvent": 3, "ticketCategories": null}), id(3)).is_err());
    }

    #[test]
    fn every_shape_of_an_error_is_understood() {
        let text = "Event with ID 9 not found";
        for error in [
            json!(text),
            json!({"statusCode": 404, "message": "gone", "error": "x"}),
            json!({"statusCode": "404"}),
            json!({"status": 404, "message": ""}),
            json!({"error": {"statusCode": 404, "message": "m"}, "message": "m"}),
            json!({"message": text}),
            json!({"message": [text]}),
            json!({"error": {"message": text}}),
        ] {
            assert_eq!(Refusal::read(&error), Refusal::NotFound, "{error}");
        }
        assert_eq!(
            Refusal::read(&json!("There is no matching message handler defined in the remote service.")),
            Refusal::NoHandler
        );
        for (error, words) in [
            (json!({"status": "error", "message": "Internal server error"}), "Internal server error"),
            (json!({}), "{}"),
            (json!(7), "7"),
            (json!({"message": []}), r#"{"message":[]}"#),
            (json!("a\nb"), "a b"),
        ] {
            assert_eq!(Refusal::read(&error), Refusal::Other(words.to_owned()), "{error}");
        }
        assert_eq!(shortened(&"é".repeat(5000)).chars().count(), TEXT_MAX);
    }
}
