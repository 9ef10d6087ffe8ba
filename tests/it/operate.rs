//! What operators work with: metrics, their reference, alerts, dashboard, container and cluster files. All of it is checked
//! against the program itself, so that none of it drifts.

mod alerts;
mod counted;
mod deploy;
mod ends;
mod manifests;
mod promql;
mod reference;
mod scrape;
#[cfg(feature = "otlp")]
mod spans;

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::Value;

/// A file of the project, by its path from the root.
fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A YAML document as JSON.
fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The items of a list; none where there is no list.
fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The anchors of a document's headings, as they are linked to.
fn anchors(document: &str) -> BTreeSet<String> {
    let headings =
        document.lines().filter_map(|line| line.strip_prefix('#')?.trim_start_matches('#').strip_prefix(' '));
    let anchor = |heading: &str| -> String {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
    };
    headings.map(anchor).collect()
}
