//! Every setting that a document names exists, and every setting that exists is documented.

use std::{collections::BTreeSet, process::Command};

use super::{File, assert_tidy, files, read};

/// The `SEATLOCK_…` names in a text. What ends in `_` is a prefix of several and names none.
fn variables(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("SEATLOCK_") {
        let name: String =
            text[at..].chars().take_while(|&c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_').collect();
        let continues_a_word = text[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        if !continues_a_word && !name.ends_with('_') {
            found.insert(name);
        }
    }
    found
}

fn settings(help: &str, documents: &[File]) -> Vec<String> {
    let real = variables(help);
    let mut complaints = Vec::new();
    let mut named = BTreeSet::new();
    for document in documents {
        let here = variables(&document.text);
        complaints.extend(here.difference(&real).map(|name| format!("{}: --help has no {name}", document.path)));
        named.extend(here);
    }
    complaints.extend(real.difference(&named).map(|name| format!("{name} is in --help and in no document")));
    complaints
}

#[test]
fn documents_and_help_name_the_same_settings() {
    let output = Command::new(env!("CARGO_BIN_EXE_seatlock")).arg("--help").output().unwrap();
    assert!(output.status.success(), "seatlock --help: {}", output.status);
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(variables(&help).len() > 20, "the help names its variables: {help}");
    let mut documents = vec![read("README.md").expect("README.md")];
    if super::root().join("docs").is_dir() {
        documents.extend(files("docs", ".md"));
    }
    assert_tidy(&settings(&help, &documents));
}

#[test]
fn an_invented_and_a_forgotten_setting_are_found() {
    let help = "--listen [env: SEATLOCK_LISTEN=]\n--rate [env: SEATLOCK_RATE_2]\n--lost [env: SEATLOCK_LOST]";
    let readme =
        File::sample("README.md", "`SEATLOCK_LISTEN`, SEATLOCK_RATE_2. MY_SEATLOCK_X, SEATLOCK_*, `SEATLOCK_GONE=1`");
    assert_eq!(
        settings(help, &[readme]),
        ["README.md: --help has no SEATLOCK_GONE", "SEATLOCK_LOST is in --help and in no document",]
    );
}
