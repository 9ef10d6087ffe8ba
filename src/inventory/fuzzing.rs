//! What an events-service sends, and the file that stands for one.

use serde_json::Value;

use super::{Catalogue, Frames, Reply, wire};
use crate::domain::{EventId, Snapshot};

/// A stream of frames, whole and byte by byte: the same frames come out.
pub fn frames(data: &[u8]) {
    assert_eq!(read(data, data.len().max(1)), read(data, 1));
}

/// The frames, and whether the stream is useless after them.
fn read(data: &[u8], chunk_len: usize) -> (Vec<Value>, bool) {
    let (mut frames, mut found) = (Frames::default(), Vec::new());
    for chunk in data.chunks(chunk_len) {
        frames.push(chunk);
        loop {
            match frames.next_frame() {
                Ok(Some(frame)) => found.push(frame),
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
    }
    (found, false)
}

/// The body of one reply, read as the answer to each question.
pub fn replies(data: &[u8]) {
    let Ok(event) = EventId::new(3) else { return };
    match Reply::read(data) {
        Reply::Error(error) => drop(wire::Refusal::read(&error)),
        Reply::Next { value, .. } => {
            let value = value.unwrap_or_default();
            for snapshot in [wire::categories(&value, event), wire::event(&value, event)] {
                match snapshot {
                    Ok(snapshot) => check(&snapshot),
                    Err(why) => assert!(why.len() < 1_000, "an error repeats little of a stranger's text"),
                }
            }
        }
    }
}

fn check(snapshot: &Snapshot) {
    assert!(snapshot.categories.len() <= Snapshot::CATEGORIES_MAX);
    assert!(snapshot.categories.iter().all(|category| category.stock <= category.total));
}

/// A catalogue.
pub fn catalogues(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    drop(Catalogue::parse("fuzz.json", text));
}
