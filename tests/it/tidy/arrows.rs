//! Who may know whom: the arrows between the crate's modules, and each third-party driver's home.

use super::{
    File, assert_tidy, files,
    source::{Token, tokens},
};

/// A module, and the modules that it may name. Of itself every module may name anything.
const ARROWS: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("metrics", &[]),
    ("telemetry", &[]),
    ("shutdown", &[]),
    ("config", &[]),
    ("callers", &["domain"]),
    ("ledger", &["domain", "metrics", "telemetry"]),
    ("inventory", &["domain", "ledger", "metrics"]),
    ("fanout", &["domain", "ledger", "inventory", "metrics"]),
    ("gateway", &["callers", "domain", "ledger", "inventory", "fanout", "metrics", "telemetry"]),
    ("rpc", &["domain", "ledger", "inventory", "metrics", "telemetry"]),
    ("http", &["callers", "domain", "ledger", "inventory", "metrics", "shutdown"]),
    ("fuzzing", &["callers", "domain", "gateway", "inventory", "ledger", "rpc", "telemetry"]),
    (
        "app",
        &[
            "callers",
            "config",
            "domain",
            "fanout",
            "gateway",
            "http",
            "inventory",
            "ledger",
            "metrics",
            "rpc",
            "shutdown",
            "telemetry",
        ],
    ),
];

/// What only these modules may name, so that replacing it is work in one place.
const HOMES: &[(&str, &[&str])] = &[
    ("axum", &["app", "gateway", "http"]),
    ("clap", &["config"]),
    ("jsonwebtoken", &["gateway", "http"]),
    ("lapin", &["inventory", "rpc"]),
    ("metrics_exporter_prometheus", &["metrics"]),
    ("opentelemetry", &["telemetry"]),
    ("opentelemetry_http", &["telemetry"]),
    ("opentelemetry_otlp", &["telemetry"]),
    ("opentelemetry_sdk", &["telemetry"]),
    ("reqwest", &["gateway", "telemetry"]),
    ("sha1_smol", &["ledger"]),
    ("socketioxide", &["gateway"]),
    ("tower_http", &["app", "gateway", "http"]),
    ("tracing_subscriber", &["config", "telemetry"]),
];

/// Where values are turned into bytes and back. Domain types never are.
const WIRES: &[&str] = &["wire", "stats"];

/// Files of other names that are a wire too, and which.
const ALSO_WIRES: &[(&str, &str)] = &[
    ("src/gateway/handshake.rs", "what a client sends with CONNECT"),
    ("src/inventory/frame.rs", "the frames of NestJS over TCP"),
];

/// A module's own tests, in a file or folder of that name, may use what they like to look at it from outside.
fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// The module of the crate that a file belongs to; `None` for `lib.rs` and `main.rs`.
fn module(path: &str) -> Option<&str> {
    let inside = path.strip_prefix("src/")?;
    let first = inside.split('/').next()?;
    let name = first.strip_suffix(".rs").unwrap_or(first);
    (name != "lib" && name != "main").then_some(name)
}

/// How many `super` lead out of the file to the crate's root.
fn depth(path: &str) -> usize {
    let parts = path.trim_start_matches("src/").split('/').count();
    if path.ends_with("/mod.rs") { parts - 1 } else { parts }
}

/// The names right below `start`, where the path may go on with a name or with a group of names.
fn named_below(tokens: &[Token], start: usize) -> Vec<(String, usize)> {
    let Some(first) = tokens.get(start) else { return Vec::new() };
    if first.text != "{" {
        return vec![(first.text.clone(), first.line)];
    }
    let mut names = Vec::new();
    let mut open = 0_usize;
    let mut expects_name = false;
    for token in &tokens[start..] {
        match token.text.as_str() {
            "{" => {
                open += 1;
                expects_name = open == 1;
            }
            "}" if open == 1 => break,
            "}" => open -= 1,
            "," => expects_name = open == 1,
            name if expects_name => {
                names.push((name.to_owned(), token.line));
                expects_name = false;
            }
            _ => {}
        }
    }
    names
}

fn arrows(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        let Some(own) = module(&file.path) else { continue };
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == own) else {
            complaints.push(format!("{}: the module {own} is not in the table of arrows", file.path));
            continue;
        };
        let tokens = tokens(&file.text);
        let mut supers = 0;
        for (i, token) in tokens.iter().enumerate() {
            let continues = tokens.get(i + 1).is_some_and(|next| next.text == "::");
            match token.text.as_str() {
                "super" => supers += 1,
                "::" => {}
                _ => supers = 0,
            }
            // So many `super` lead to the crate's root, or, inside a test module, to where another module's name would
            // be one that the file itself may use.
            let from_root = token.text == "crate" || supers >= depth(&file.path);
            if !continues || !from_root {
                continue;
            }
            for (name, line) in named_below(&tokens, i + 2) {
                let is_module = ARROWS.iter().any(|(module, _)| *module == name);
                if is_module && name != own && !allowed.contains(&name.as_str()) {
                    complaints.push(format!("{}:{line}: {own} must not know {name}", file.path));
                }
            }
        }
    }
    complaints
}

fn homes(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| !is_test(&file.path)) {
        let own = module(&file.path).unwrap_or("main");
        let tokens = tokens(&file.text);
        for (i, token) in tokens.iter().enumerate() {
            let Some((driver, homes)) = HOMES.iter().find(|(driver, _)| *driver == token.text) else { continue };
            let begins_path = i == 0 || tokens[i - 1].text != "::";
            let is_path = tokens.get(i + 1).is_some_and(|next| next.text == "::" || next.text == ";");
            if begins_path && is_path && !homes.contains(&own) {
                complaints.push(format!("{}:{}: {driver} is at home in {}", file.path, token.line, homes.join(", ")));
            }
        }
    }
    complaints
}

fn wires(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    let is_wire = |file: &File| WIRES.contains(&file.stem()) || ALSO_WIRES.iter().any(|(path, _)| *path == file.path);
    for file in files.iter().filter(|file| !is_wire(file) && !is_test(&file.path)) {
        let tokens = tokens(&file.text);
        for (i, token) in tokens.iter().enumerate() {
            if token.text != "derive" || tokens.get(i + 1).is_none_or(|next| next.text != "(") {
                continue;
            }
            let derived = tokens[i..].iter().take_while(|inside| inside.text != ")");
            for name in derived.filter(|name| name.text == "Serialize" || name.text == "Deserialize") {
                complaints
                    .push(format!("{}:{}: derives {} outside a wire.rs or stats.rs", file.path, name.line, name.text));
            }
        }
    }
    complaints
}

#[test]
fn modules_know_only_whom_they_may() {
    assert_tidy(&arrows(&files("src", ".rs")));
}

#[test]
fn every_driver_stays_at_home() {
    assert_tidy(&homes(&files("src", ".rs")));
}

#[test]
fn only_wires_are_serialised() {
    assert_tidy(&wires(&files("src", ".rs")));
}

#[test]
fn a_forbidden_arrow_is_found_however_it_is_written() {
    let bad = [
        File::sample("src/domain/lock.rs", "use crate::ledger::Ledger;\n// crate::rpc\n"),
        File::sample("src/gateway/mod.rs", "use crate::{domain::{self, Lock}, ledger, rpc::{Rpc, http}};\n"),
        File::sample("src/rpc/wire.rs", "fn f() -> crate::gateway::wire::Lock { todo!() }\n"),
        File::sample("src/fanout/tick.rs", "use super::super::gateway::Gateway;\nuse super::Feed;\n"),
        File::sample("src/fanout/mod.rs", "use super::gateway;\n"),
        File::sample("src/surprise.rs", ""),
        File::sample("src/app.rs", "use crate::{gateway, rpc};\n"),
        File::sample("src/main.rs", "use seatlock::app;\n"),
    ];
    assert_eq!(
        arrows(&bad),
        [
            "src/domain/lock.rs:1: domain must not know ledger",
            "src/gateway/mod.rs:1: gateway must not know rpc",
            "src/rpc/wire.rs:1: rpc must not know gateway",
            "src/fanout/tick.rs:1: fanout must not know gateway",
            "src/fanout/mod.rs:1: fanout must not know gateway",
            "src/surprise.rs: the module surprise is not in the table of arrows",
        ]
    );
}

#[test]
fn the_table_of_arrows_has_no_circle() {
    // A module's arrows point only at modules that can be removed before it, again and again until none is left.
    let mut left: Vec<_> = ARROWS.to_vec();
    while !left.is_empty() {
        let names: Vec<_> = left.iter().map(|(name, _)| *name).collect();
        let before = left.len();
        left.retain(|(_, allowed)| allowed.iter().any(|name| names.contains(name)));
        assert!(left.len() < before, "a circle among {names:?}");
    }
}

#[test]
fn a_driver_away_from_home_is_found() {
    let bad = [
        File::sample("src/rpc/mod.rs", "use sha1_smol::Sha1;\nuse lapin::Channel;\n"),
        File::sample("src/http/stats.rs", "fn f(s: socketioxide::SocketIo) {}\n// lapin::x\nlet sha1_smol = 1;\n"),
        File::sample("src/main.rs", "use axum::Router;\n"),
    ];
    assert_eq!(
        homes(&bad),
        [
            "src/rpc/mod.rs:1: sha1_smol is at home in ledger",
            "src/http/stats.rs:1: socketioxide is at home in gateway",
            "src/main.rs:1: axum is at home in app, gateway, http",
        ]
    );
}

#[test]
fn a_serialised_domain_type_is_found() {
    let bad = [
        File::sample(
            "src/domain/lock.rs",
            "#[derive(Debug,\n    Clone, Serialize)]\nstruct Lock;\n#[derive(Debug)]\nstruct Serialize;\n",
        ),
        File::sample("src/gateway/wire.rs", "#[derive(Serialize, Deserialize)]\nstruct Lock;\n"),
    ];
    assert_eq!(wires(&bad), ["src/domain/lock.rs:2: derives Serialize outside a wire.rs or stats.rs"]);
}
