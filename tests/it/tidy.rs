//! What only people would read drifts; what these tests read stays true.
//!
//! Each check is a function from text to complaints. One test gives it the project and wants none; another gives it a
//! small bad sample and wants exactly the complaints that are due, because a check that cannot fail is worse than none.

mod arrows;
mod documents;
pub mod lua;

mod metrics;
mod source;
mod text;

use std::{fs, path::Path};

/// A file of the project: its path from the root, with forward slashes, and its text.
#[derive(Debug, Clone)]
pub struct File {
    pub path: String,
    pub text: String,
}

impl File {
    fn sample(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// The file's name without folder and ending.
    fn stem(&self) -> &str {
        let name = self.path.rsplit('/').next().unwrap_or(&self.path);
        name.split('.').next().unwrap_or(name)
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below a folder whose name ends so, in a fixed order. None at all is a mistake of the caller.
pub fn files(folder: &str, ending: &str) -> Vec<File> {
    let mut found = Vec::new();
    let mut waiting = vec![root().join(folder)];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            let inside = fs::read_dir(&path).expect("a folder of the project can be listed");
            waiting.extend(
                inside.map(|entry| entry.expect("an entry of it can be read").path()).filter(|path| !is_foreign(path)),
            );
        } else if path.to_string_lossy().ends_with(ending) {
            let text = fs::read_to_string(&path).expect("a file of the project is text");
            found.push(File { path: relative(&path), text });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "no {ending} file in {folder}");
    found
}

fn is_foreign(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "node_modules" || name == "target" || name == ".git")
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("found below the root").to_string_lossy().replace('\\', "/")
}

fn read(path: &str) -> Option<File> {
    let text = fs::read_to_string(root().join(path)).ok()?;
    Some(File { path: path.to_owned(), text })
}

fn assert_tidy(complaints: &[String]) {
    assert!(complaints.is_empty(), "{} complaints:\n  {}", complaints.len(), complaints.join("\n  "));
}
