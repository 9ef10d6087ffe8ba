//! A static catalogue: events and their stock in a JSON file, for demos and tests and for houses without an
//! events-service. It is read once and never learns of sales.
//!
//! The file is an object with `events` (or just the list). Every event has `idEvent` (or `id`), `eventName` (or `name`),
//! `isActive` and `ticketCategories`; every category has `id`, `categoryName` (or `name`), `price`, `totalSeats`,
//! `reservedSeats` or `availableSeats`, and `isActive`. The numbers are read by the rules of the events-service's answers
//! (module `wire`); names and prices may be missing, unknown fields are ignored.
//!
//! ```json
//! {"events": [{"idEvent": 1, "eventName": "Gala", "isActive": true, "ticketCategories":
//!   [{"id": 4, "categoryName": "Gold", "price": "100.00", "totalSeats": 4, "reservedSeats": 0, "isActive": true}]}]}
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use async_trait::async_trait;
use serde_json::{Map, Value};

use super::{SourceError, StockSource, wire};
use crate::domain::{CategoryId, EventId, Snapshot};

/// The largest file read: ten thousand events of a kilobyte.
const FILE_BYTES_MAX: u64 = 10 * 1024 * 1024;

/// The catalogue that is part of the program.
const DEMO: &str = include_str!("demo.json");

/// Why a catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// The file cannot be read.
    #[error("{file}: {source}")]
    Io {
        /// Which file.
        file: String,
        /// Why not.
        source: io::Error,
    },
    /// The file is larger than any catalogue.
    #[error("{file}: larger than {FILE_BYTES_MAX} bytes")]
    TooLarge {
        /// Which file.
        file: String,
    },
    /// Not JSON.
    #[error("{file}: line {line}, column {column}: {what}")]
    Json {
        /// Which file.
        file: String,
        /// Where, from 1.
        line: usize,
        /// Where, from 1.
        column: usize,
        /// What is wrong there.
        what: String,
    },
    /// JSON that is no catalogue.
    #[error("{file}: {position}: {what}")]
    Content {
        /// Which file.
        file: String,
        /// Where, such as `event number 2`.
        position: String,
        /// What is wrong there.
        what: String,
    },
}

/// An event as a page lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedEvent {
    /// Its id.
    pub event: EventId,
    /// Its name; `Event N` where the catalogue gives none.
    pub name: String,
    /// Its categories, in the catalogue's order.
    pub categories: Vec<ListedCategory>,
}

/// A category as a page lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedCategory {
    /// Its id.
    pub category: CategoryId,
    /// Its name; `Category N` where the catalogue gives none.
    pub name: String,
    /// Its price as the catalogue writes it, where it does.
    pub price: Option<String>,
}

/// A static catalogue.
#[derive(Debug, Clone)]
pub struct Catalogue {
    stock: BTreeMap<EventId, Snapshot>,
    listed: Vec<ListedEvent>,
}

impl Catalogue {
    /// The demo catalogue: three small events.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "the text is part of the program and read by a test")]
    pub fn embedded() -> Self {
        Self::parse("the embedded catalogue", DEMO).expect("the embedded catalogue is valid")
    }

    /// Reads a catalogue from a file.
    ///
    /// # Errors
    /// [`CatalogueError`], which names the file and the position.
    pub fn read(path: &Path) -> Result<Self, CatalogueError> {
        let file = path.display().to_string();
        let failed = |source| CatalogueError::Io { file: file.clone(), source };
        let mut text = String::new();
        File::open(path).map_err(failed)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(CatalogueError::TooLarge { file });
        }
        Self::parse(&file, &text)
    }

    /// Reads a catalogue from a text; `file` names it in errors.
    ///
    /// # Errors
    /// [`CatalogueError`], which names the file and the position.
    pub fn parse(file: &str, text: &str) -> Result<Self, CatalogueError> {
        let file = file.to_owned();
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let value: Value = match serde_json::from_str(text) {
            Ok(value) => value,
            Err(error) => {
                let (line, column) = (error.line(), error.column());
                let what = error.to_string();
                let what = what.split(" at line ").next().unwrap_or_default().to_owned();
                return Err(CatalogueError::Json { file, line, column, what });
            }
        };
        let content = |position: &str, what: String| CatalogueError::Content {
            file: file.clone(),
            position: position.to_owned(),
            what,
        };
        let events = match &value {
            Value::Array(events) => events,
            Value::Object(fields) => match fields.get("events") {
                Some(Value::Array(events)) => events,
                _ => return Err(content("top level", "no list named events".to_owned())),
            },
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
                return Err(content("top level", "neither an object nor a list of events".to_owned()));
            }
        };
        let mut catalogue = Self { stock: BTreeMap::new(), listed: Vec::with_capacity(events.len()) };
        for (index, event) in events.iter().enumerate() {
            catalogue.add(event).map_err(|what| content(&format!("event number {}", index + 1), what))?;
        }
        Ok(catalogue)
    }

    fn add(&mut self, value: &Value) -> Result<(), String> {
        let fields = value.as_object().ok_or("not an object")?;
        let event = wire::event_id(fields)?;
        let snapshot = wire::event(value, event)?;
        let items = fields.get("ticketCategories").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let categories = snapshot
            .categories
            .iter()
            .zip(items)
            .map(|(stock, item)| ListedCategory {
                category: stock.category,
                name: text(item.as_object(), &["categoryName", "name"])
                    .unwrap_or_else(|| format!("Category {}", stock.category)),
                price: text(item.as_object(), &["price"]),
            })
            .collect();
        let name = text(Some(fields), &["eventName", "name"]).unwrap_or_else(|| format!("Event {event}"));
        if self.stock.insert(event, snapshot).is_some() {
            return Err(format!("event {event} twice"));
        }
        self.listed.push(ListedEvent { event, name, categories });
        Ok(())
    }

    /// The events with their names, in the catalogue's order.
    #[must_use]
    pub fn events(&self) -> &[ListedEvent] {
        &self.listed
    }
}

/// The first of these fields that is a text or a number.
fn text(fields: Option<&Map<String, Value>>, names: &[&str]) -> Option<String> {
    names.iter().find_map(|&name| match fields?.get(name)? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    })
}

#[async_trait]
impl StockSource for Catalogue {
    async fn snapshot(&self, event: EventId) -> Result<Snapshot, SourceError> {
        self.stock.get(&event).cloned().ok_or(SourceError::EventNotFound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        Catalogue::parse("events.json", text).expect_err(text).to_string()
    }

    #[test]
    fn the_embedded_catalogue_has_three_events_with_names_and_prices() {
        let catalogue = Catalogue::embedded();
        assert_eq!(catalogue.events().len(), 3);
        for event in catalogue.events() {
            assert!(!event.name.starts_with("Event ") && event.categories.len() >= 2);
            assert!(event.categories.iter().all(|category| category.price.is_some()));
            assert_eq!(catalogue.stock[&event.event].categories.len(), event.categories.len());
        }
    }

    #[test]
    fn names_may_be_missing_and_the_list_may_stand_alone() {
        let catalogue = Catalogue::parse(
            "x",
            r#"[{"id": 7, "ticketCategories": [{"id": 2, "availableSeats": 5, "price": 9.5}], "extra": 1}]"#,
        )
        .expect("a catalogue");
        let event = &catalogue.events()[0];
        assert_eq!((event.name.as_str(), event.categories[0].name.as_str()), ("Event 7", "Category 2"));
        assert_eq!(event.categories[0].price.as_deref(), Some("9.5"));
    }

    #[test]
    fn errors_name_the_file_and_the_position() {
        assert_eq!(problem("{\n \"events\": [}"), "events.json: line 2, column 13: expected value");
        assert_eq!(problem("{}"), "events.json: top level: no list named events");
        assert_eq!(problem("3"), "events.json: top level: neither an object nor a list of events");
        assert_eq!(problem(r#"{"events": [1]}"#), "events.json: event number 1: not an object");
        let good = r#"{"id": 1, "ticketCategories": []}"#;
        assert_eq!(problem(&format!("[{good}, {good}]")), "events.json: event number 2: event 1 twice");
        assert_eq!(
            problem(&format!(r#"[{good}, {{"id": 2, "ticketCategories": [{{"id": 1, "totalSeats": 4}}]}}]"#)),
            "events.json: event number 2: category number 1: neither availableSeats nor reservedSeats"
        );
        let missing = Catalogue::read(Path::new("no/such/file.json")).expect_err("no file").to_string();
        assert!(missing.starts_with("no/such/file.json: "), "{missing}");
    }
}
