//! Alerts and dashboard: each alert fires when it should and not otherwise, leads to a runbook, and names what the service
//! exports.

use std::{collections::BTreeSet, process::Command};

use serde_json::Value;

use super::{anchors, items, path, promql, text, word, yaml};

const ALERTS: &str = "deploy/prometheus/alerts.yaml";
const TESTS: &str = "deploy/prometheus/alerts.test.yaml";
const DASHBOARD: &str = "deploy/grafana/dashboard.json";

pub fn rules() -> Vec<Value> {
    let alerts = yaml(&text(ALERTS));
    items(&alerts["groups"]).iter().flat_map(|group| items(&group["rules"]).to_vec()).collect()
}

pub fn recorded() -> BTreeSet<String> {
    rules().iter().filter_map(|rule| rule["record"].as_str().map(str::to_owned)).collect()
}

/// The panels' expressions, each with its panel's title.
pub fn panels() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(&text(DASHBOARD)).expect("JSON");
    let of = |panel: &Value| -> Vec<(String, String)> {
        let title = word(&panel["title"]).to_owned();
        items(&panel["targets"]).iter().map(|target| (title.clone(), word(&target["expr"]).to_owned())).collect()
    };
    items(&dashboard["panels"]).iter().flat_map(of).collect()
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    for command in [["check", "rules", ALERTS], ["test", "rules", TESTS]] {
        let ran = Command::new("promtool").args(command).current_dir(path("")).output();
        let ran = ran.expect("promtool is installed (tests/run installs Debian's prometheus)");
        let said = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert!(ran.status.success(), "promtool {command:?}: {said}");
    }
    let tests = yaml(&text(TESTS));
    let (mut firing, mut silent) = (BTreeSet::new(), BTreeSet::new());
    for test in items(&tests["tests"]) {
        for case in items(&test["alert_rule_test"]) {
            let set = if items(&case["exp_alerts"]).is_empty() { &mut silent } else { &mut firing };
            set.insert(word(&case["alertname"]).to_owned());
        }
    }
    let alerts: BTreeSet<String> =
        rules().iter().filter_map(|rule| rule["alert"].as_str().map(str::to_owned)).collect();
    assert!(alerts.len() > 20, "{alerts:?}");
    assert_eq!(alerts, firing, "every alert is shown firing");
    assert_eq!(alerts, silent, "every alert is shown silent");
}

/// An alert says how urgent it is, what has happened, and where to read on.
#[test]
fn every_alert_leads_to_its_runbook() {
    let anchors = anchors(&text("docs/operations.md"));
    let mut linked = BTreeSet::new();
    for alert in rules().iter().filter(|rule| rule["alert"].is_string()) {
        let name = word(&alert["alert"]);
        assert!(["page", "ticket", "notice"].contains(&word(&alert["labels"]["severity"])), "{name}: its severity");
        assert!(word(&alert["annotations"]["summary"]).ends_with('.'), "{name}: its summary is a sentence");
        let runbook = word(&alert["annotations"]["runbook"]).strip_prefix("docs/operations.md#");
        let anchor = runbook.unwrap_or_else(|| panic!("{name}: its runbook is a heading of docs/operations.md"));
        assert!(anchors.contains(anchor), "{name}: docs/operations.md has no heading {anchor}");
        linked.insert(anchor.to_owned());
    }
    let orphans: Vec<_> =
        anchors.iter().filter(|anchor| anchor.starts_with("seatlock") && !linked.contains(*anchor)).collect();
    assert!(orphans.is_empty(), "runbooks of no alert: {orphans:?}");
}

/// An alert on a series that nobody exports never fires, and its panel is empty without saying why.
#[test]
fn alerts_and_panels_name_what_is_exported() {
    let recorded = recorded();
    let mut wrong = Vec::new();
    for rule in rules() {
        let name = rule["alert"].as_str().or(rule["record"].as_str()).expect("a name").to_owned();
        wrong
            .extend(promql::complaints(word(&rule["expr"]), &recorded).into_iter().map(|why| format!("{name}: {why}")));
    }
    let panels = panels();
    assert!(panels.len() > 40, "the dashboard has panels");
    for (title, expr) in panels {
        wrong.extend(promql::complaints(&expr, &recorded).into_iter().map(|why| format!("panel {title}: {why}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Runbooks tell people to look at series; those exist too.
#[test]
fn runbooks_name_what_is_exported() {
    let document = text("docs/operations.md");
    let quoted = document.split('`').skip(1).step_by(2).filter(|code| code.contains("seatlock_"));
    let code: Vec<&str> = quoted.collect();
    assert!(code.len() > 10, "{code:?}");
    let names = |code: &str| -> Vec<String> {
        let words =
            code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| word.starts_with("seatlock_"));
        words.map(str::to_owned).collect()
    };
    let exported = |name: &str| {
        let parts = ["_bucket", "_sum", "_count"];
        let base = parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name);
        seatlock::metrics::ALL.iter().any(|metric| metric.name == base || metric.name == name)
    };
    let unknown: Vec<_> = code.iter().flat_map(|code| names(code)).filter(|name| !exported(name)).collect();
    assert!(unknown.is_empty(), "docs/operations.md: {unknown:?}");
}
