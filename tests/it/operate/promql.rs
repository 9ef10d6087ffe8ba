//! What an expression of Prometheus names: metrics, labels, the values of labels. Enough of the language for the expressions here,
//! checked against the program's own declarations.

use std::{collections::BTreeSet, sync::LazyLock};

use seatlock::metrics::{ALL, Kind, Metric};

use crate::tidy::files;

/// What Prometheus itself adds to every series.
const OUTER: &[&str] = &["instance", "job"];

/// Whether the program has this text anywhere: where labels get their values.
fn is_said(value: &str) -> bool {
    static SOURCE: LazyLock<String> = LazyLock::new(|| files("src", ".rs").into_iter().map(|file| file.text).collect());
    SOURCE.contains(&format!("\"{value}\""))
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// The declaration behind a series, and whether it is a histogram's buckets.
fn declared(series: &str) -> Option<(&'static Metric, bool)> {
    if let Some(metric) = ALL.iter().find(|metric| metric.name == series) {
        return (!matches!(metric.kind, Kind::Histogram(_))).then_some((metric, false));
    }
    let (base, part) = series.rsplit_once('_')?;
    let metric = ALL.iter().find(|metric| metric.name == base && matches!(metric.kind, Kind::Histogram(_)))?;
    ["bucket", "sum", "count"].contains(&part).then_some((metric, part == "bucket"))
}

/// Complaints about an expression. `recorded` are the names of recording rules.
pub fn complaints(expr: &str, recorded: &BTreeSet<String>) -> Vec<String> {
    let mut complaints = Vec::new();
    // What may be grouped by, of all that the expression names.
    let mut labels: BTreeSet<&str> = OUTER.iter().copied().collect();
    let mut rest = expr;
    let mut named = false;
    while let Some(at) = rest.find("seatlock") {
        let inside = rest[..at].ends_with(|c: char| is_word(c) || c == '"');
        rest = &rest[at..];
        let len = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let (series, after) = rest.split_at(len);
        rest = after;
        if inside {
            continue;
        }
        named = true;
        let (matchers, after) = match rest.strip_prefix('{').and_then(|open| open.split_once('}')) {
            Some((inside, after)) => (inside, after),
            None => ("", rest),
        };
        rest = after;
        if series.contains(':') {
            if !recorded.contains(series) {
                complaints.push(format!("{series} is not recorded"));
            }
            continue;
        }
        let Some((metric, buckets)) = declared(series) else {
            complaints.push(format!("{series} is not exported"));
            continue;
        };
        labels.extend(metric.labels);
        if buckets {
            labels.insert("le");
        }
        for matcher in matchers.split("\",").filter(|matcher| !matcher.trim().is_empty()) {
            let (label, value) = matcher.trim().split_once(['=', '!']).expect("label=\"value\"");
            if !metric.labels.contains(&label) {
                complaints.push(format!("{series} has no label {label}"));
            }
            let values = value.trim_start_matches(['=', '~', '!']).trim_matches('"');
            let unknown = values.split('|').filter(|value| !is_said(value));
            complaints.extend(unknown.map(|value| format!("no {label} of {series} is {value}")));
        }
    }
    if !named && !expr.contains("up{job=\"seatlock\"}") {
        complaints.push(format!("names no metric of ours: {expr}"));
    }
    for (at, by) in expr.match_indices("by (") {
        let inside = expr[at + by.len()..].split(')').next().unwrap_or_default();
        let unknown = inside.split(',').map(str::trim).filter(|label| !labels.contains(label));
        complaints.extend(unknown.map(|label| format!("nothing here has the label {label}: {expr}")));
    }
    complaints
}

#[test]
fn what_is_not_exported_is_found() {
    let recorded = BTreeSet::from(["seatlock:a:rate".to_owned()]);
    let found = |expr: &str| complaints(expr, &recorded);
    let good = [
        "sum by (outcome) (rate(seatlock_ledger_locks_total{outcome=~\"granted|sold_out\"}[5m]))",
        "histogram_quantile(0.9, sum by (le, script) (rate(seatlock_ledger_call_seconds_bucket[5m])))",
        "seatlock:a:rate > 1 and min(up{job=\"seatlock\"}) == 1",
        "max by (instance) (seatlock_ledger_feed_len)",
    ];
    for expr in good {
        assert_eq!(found(expr), [""; 0], "{expr}");
    }
    for (expr, complaint) in [
        ("rate(seatlock_moon_total[5m])", "seatlock_moon_total is not exported"),
        ("seatlock_ledger_call_seconds", "seatlock_ledger_call_seconds is not exported"),
        ("seatlock_ledger_feed_len_sum", "seatlock_ledger_feed_len_sum is not exported"),
        ("seatlock_ledger_locks_total{user=\"granted\"}", "seatlock_ledger_locks_total has no label user"),
        ("seatlock_ledger_locks_total{outcome!~\"lost|granted\"}", "no outcome of seatlock_ledger_locks_total is lost"),
        ("seatlock:b:rate", "seatlock:b:rate is not recorded"),
    ] {
        assert_eq!(found(expr), [complaint], "{expr}");
    }
    assert_eq!(found("vector(1)").len(), 1);
    assert_eq!(found("sum by (user) (seatlock_ledger_feed_len)").len(), 1);
}
