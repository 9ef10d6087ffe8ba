//! `docs/metrics.md` is what the code says of its metrics.

use std::fmt::Write;

use seatlock::metrics::{ALL, Kind, Metric};

/// The document, from the declarations.
fn reference() -> String {
    let mut text = String::from(
        "# Metrics\n\n\
         Every replica exports these on `/metrics`, each for itself: sum them over the fleet, but take the largest of gauges\n\
         that say what is the same everywhere. This file is written by the code; a test compares them, and\n\
         `UPDATE_DOCS=1 cargo nextest run --test it operate::reference` writes it anew.\n\n\
         Labels have few values, which the code lists; none is ever an event, a user, a lock or a socket. A series with labels\n\
         appears when it is first counted. Histograms have the usual `_bucket`, `_sum` and `_count`.\n",
    );
    let mut module = "";
    for metric in ALL {
        let of = metric.name.split('_').nth(1).expect("seatlock_<module>_…");
        if of != module {
            write!(text, "\n## {of}\n\n| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n")
                .expect("a text");
            module = of;
        }
        let help: Vec<&str> = metric.help.split_whitespace().collect();
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        writeln!(text, "| `{}` | {} | {} | {} |", metric.name, kind(metric), labels.join(" "), help.join(" "))
            .expect("a text");
    }
    text.push_str("\n## Buckets\n\n");
    let mut told: Vec<&[f64]> = Vec::new();
    for metric in ALL {
        let Kind::Histogram(bounds) = metric.kind else { continue };
        if told.contains(&bounds) {
            continue;
        }
        told.push(bounds);
        let same = ALL.iter().filter(|other| matches!(other.kind, Kind::Histogram(others) if others == bounds));
        let names: Vec<String> = same.map(|metric| format!("`{}`", metric.name)).collect();
        let bounds: Vec<String> = bounds.iter().map(ToString::to_string).collect();
        writeln!(text, "- {} of {}", bounds.join(", "), names.join(", ")).expect("a text");
    }
    text
}

fn kind(metric: &Metric) -> &'static str {
    match metric.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram(_) => "histogram",
    }
}

#[test]
fn the_document_is_what_the_code_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
    let due = reference();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &due).expect("the document can be written");
    }
    let is = std::fs::read_to_string(path).expect("docs/metrics.md");
    assert_eq!(is, due, "docs/metrics.md is old: UPDATE_DOCS=1 cargo nextest run --test it operate::reference");
}
