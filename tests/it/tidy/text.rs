//! What no file of ours has in it.

use super::{File, assert_tidy, files, source::tokens};

/// Lines of a source file, its own tests not counted. The house aims at half of it: a file this long is asking to be two.
const LINES_MAX: usize = 800;

/// Lines of a file of tests, which is a list of claims and is read one at a time.
const TEST_LINES_MAX: usize = 1200;

/// A file whose length has a reason, and the length it may have.
const LONG: &[(&str, usize, &str)] =
    &[("src/domain/book.rs", 1000, "the model is read as a whole, one transition after the other, beside lua/")];

/// Macros that are written to be taken out again, or that print past the log.
const MACROS: &[&str] = &["dbg", "todo", "unimplemented", "println", "eprintln"];

fn code_words(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        let tokens = tokens(&file.text);
        for (i, token) in tokens.iter().enumerate() {
            let next = |n: usize| tokens.get(i + n).map_or("", |token| token.text.as_str());
            if MACROS.contains(&token.text.as_str()) && next(1) == "!" {
                complaints.push(format!("{}:{}: {}!", file.path, token.line, token.text));
            }
            let is_attribute = token.text == "#" && (next(1) == "[" || next(1) == "!" && next(2) == "[");
            let name = if next(1) == "[" { next(2) } else { next(3) };
            if is_attribute && name == "allow" {
                complaints.push(format!("{}:{}: allow; write expect with a reason", file.path, token.line));
            }
        }
    }
    complaints
}

fn lines(files: &[File]) -> Vec<String> {
    let promises = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
    let mut complaints = Vec::new();
    for file in files {
        for (index, line) in file.text.lines().enumerate() {
            let at = format!("{}:{}", file.path, index + 1);
            if line.ends_with([' ', '\t']) {
                complaints.push(format!("{at}: white space at the end"));
            }
            let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            complaints.extend(words.filter(|word| promises.contains(word)).map(|word| format!("{at}: {word}")));
        }
        if !file.text.is_empty() && !file.text.ends_with('\n') {
            complaints.push(format!("{}: its last line has no end", file.path));
        }
    }
    complaints
}

fn long_files(files: &[File], lines_max: usize) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        let max = LONG.iter().find(|(path, ..)| *path == file.path).map_or(lines_max, |(_, max, _)| *max);
        let count = file.text.lines().take_while(|line| line.trim() != "#[cfg(test)]").count();
        if count > max {
            complaints.push(format!("{}: {count} lines, more than {max}", file.path));
        }
    }
    complaints
}

/// Every module says what it owns.
fn module_docs(files: &[File]) -> Vec<String> {
    let silent = files.iter().filter(|file| !file.text.starts_with("//!"));
    silent.map(|file| format!("{}: no //! that says what it owns", file.path)).collect()
}

#[test]
fn the_code_has_no_leftovers() {
    assert_tidy(&code_words(&files("src", ".rs")));
    assert_tidy(&lines(&files("src", ".rs")));
    assert_tidy(&lines(&files("tests", ".rs")));
    assert_tidy(&lines(&files("tests", ".js")));
}

#[test]
fn no_file_is_too_long() {
    assert_tidy(&long_files(&files("src", ".rs"), LINES_MAX));
    assert_tidy(&long_files(&files("tests", ".rs"), TEST_LINES_MAX));
}

#[test]
fn every_module_says_what_it_owns() {
    assert_tidy(&module_docs(&files("src", ".rs")));
    assert_tidy(&module_docs(&files("tests", ".rs")));
}

#[test]
fn leftovers_are_found() {
    let bad = File::sample(
        "src/a.rs",
        "//! A.\n#![allow(dead_code)]\n#[allow(unused)]\nfn f() { dbg!(1); println!(\"dbg!\"); }\n#[expect(unused)] fn todo() {}\n",
    );
    assert_eq!(
        code_words(&[bad]),
        [
            "src/a.rs:2: allow; write expect with a reason",
            "src/a.rs:3: allow; write expect with a reason",
            "src/a.rs:4: dbg!",
            "src/a.rs:4: println!",
        ]
    );
    let promise = concat!("TO", "DO");
    let bad = File::sample("src/b.rs", &format!("fn f() {{}} \n\t\n// {promise}: later, not TODOS\nend"));
    assert_eq!(
        lines(&[bad]),
        [
            "src/b.rs:1: white space at the end".to_owned(),
            "src/b.rs:2: white space at the end".to_owned(),
            format!("src/b.rs:3: {promise}"),
            "src/b.rs: its last line has no end".to_owned(),
        ]
    );
}

#[test]
fn a_long_file_is_found_and_its_tests_are_not_counted() {
    let body = "x\n".repeat(LINES_MAX);
    let fits = File::sample("src/a.rs", &format!("{body}#[cfg(test)]\n{body}"));
    let long = File::sample("src/b.rs", &format!("{body}x\n"));
    assert_eq!(
        long_files(&[fits, long], LINES_MAX),
        [format!("src/b.rs: {} lines, more than {LINES_MAX}", LINES_MAX + 1)]
    );
}

#[test]
fn a_silent_module_is_found() {
    let files = [File::sample("src/a.rs", "//! Owns a.\n"), File::sample("src/b.rs", "use a;\n")];
    assert_eq!(module_docs(&files), ["src/b.rs: no //! that says what it owns"]);
}
