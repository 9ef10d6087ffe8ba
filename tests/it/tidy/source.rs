//! Rust text, seen as its code: no comments, no text of literals.

/// The same text with every comment and every literal's inside blanked out. Lines stay where they are.
pub fn code(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let rest = &chars[i..];
        let end = i + match rest {
            ['/', '/', ..] => rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => block_comment(rest),
            ['"', ..] => quoted(rest),
            ['r' | 'b', ..] if !out.ends_with(is_word) => raw_or_byte(rest),
            ['\'', ..] => char_literal(rest),
            _ => 0,
        };
        if end > i {
            out.extend(chars[i..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            i = end;
        } else {
            out.push(chars[i]);
            i += 1;
        }
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn block_comment(rest: &[char]) -> usize {
    let mut depth = 0_usize;
    let mut i = 0;
    while i < rest.len() {
        match rest[i..] {
            ['/', '*', ..] => {
                depth += 1;
                i += 2;
            }
            ['*', '/', ..] => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    rest.len()
}

fn quoted(rest: &[char]) -> usize {
    let mut i = 1;
    while i < rest.len() {
        match rest[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    rest.len()
}

/// `r"…"`, `r#"…"#`, `b"…"`, `br#"…"#`, `b'…'`: the length, or 0 when it is only a word that begins so.
fn raw_or_byte(rest: &[char]) -> usize {
    let prefix = rest.iter().take(2).take_while(|&&c| c == 'r' || c == 'b').count();
    let hashes = rest[prefix..].iter().take_while(|&&c| c == '#').count();
    let is_raw = rest[..prefix].contains(&'r');
    match rest.get(prefix + hashes) {
        Some('"') if is_raw => {
            let start = prefix + hashes + 1;
            let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
            let found = rest[start..].windows(close.len()).position(|window| window == close);
            found.map_or(rest.len(), |at| start + at + close.len())
        }
        Some('"') if hashes == 0 => prefix + quoted(&rest[prefix..]),
        Some('\'') if hashes == 0 && !is_raw => prefix + char_literal(&rest[prefix..]),
        _ => 0,
    }
}

/// `'x'` or `'\n'`; 0 for a lifetime.
fn char_literal(rest: &[char]) -> usize {
    match rest {
        ['\'', '\\', ..] => rest.iter().skip(3).position(|&c| c == '\'').map_or(0, |at| at + 4),
        ['\'', _, '\'', ..] => 3,
        _ => 0,
    }
}

/// A word, `::`, or one other character that is not white space; with its line, from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

/// The tokens of [`code`]. White space inside a path, which rustfmt writes nowhere, would hide nothing.
pub fn tokens(text: &str) -> Vec<Token> {
    let mut tokens: Vec<Token> = Vec::new();
    for (index, line) in code(text).lines().enumerate() {
        let mut chars = line.chars().peekable();
        while let Some(c) = chars.next() {
            let mut token = String::from(c);
            if is_word(c) {
                while let Some(next) = chars.next_if(|&next| is_word(next)) {
                    token.push(next);
                }
            } else if c == ':' && chars.next_if_eq(&':').is_some() {
                token.push(':');
            } else if c.is_whitespace() {
                continue;
            }
            tokens.push(Token { text: token, line: index + 1 });
        }
    }
    tokens
}

#[test]
fn comments_and_literals_are_not_code() {
    let text = r##"
use crate::a; // crate::no
/* crate::no /* nested */ crate::no */
let s = "crate::no \" crate::no"; let r = r#"crate::no " crate::no"#; let b = br"crate::no";
let c = '"'; let d: &'static str = "crate::no"; let e = b'"'; let f = '\''; use crate::b;
let road = br_like; bar"crate::no";
"##;
    let left = code(text);
    assert!(!left.contains("no"), "{left}");
    assert_eq!(left.matches("crate::").count(), 2, "{left}");
    assert!(left.contains("&'static str"), "{left}");
    assert_eq!(left.lines().count(), text.lines().count());
}

#[test]
fn tokens_are_words_paths_and_characters() {
    let all: Vec<String> = tokens("use a::b_1;\n  x:y").into_iter().map(|token| token.text).collect();
    assert_eq!(all, ["use", "a", "::", "b_1", ";", "x", ":", "y"]);
    assert_eq!(tokens("a\n\nb")[1].line, 3);
}
