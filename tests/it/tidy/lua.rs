//! The header of every script: what it says of keys, arguments and replies is what the body does and what Rust passes.
//!
//! A file whose name begins with `_` is a prelude: it is joined in front of scripts, has no header of this form, and
//! what it uses counts as used by the scripts that it is joined to.

use std::collections::BTreeSet;

use seatlock::ledger::{Arity, Script};

use super::{File, assert_tidy, files};

/// More is two scripts.
const BODY_LINES_MAX: usize = 80;

/// Numbered inputs: how many have a number of their own, and whether the last documented one repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Inputs {
    fixed: usize,
    tail: bool,
}

#[derive(Debug)]
struct Header {
    keys: Inputs,
    args: Inputs,
    replies: BTreeSet<String>,
}

/// Splits a script into its header, without the comment signs, and its body.
fn split(text: &str) -> (Vec<&str>, Vec<&str>) {
    let header: Vec<&str> = text.lines().take_while(|line| line.starts_with("--")).collect();
    let body = text.lines().skip(header.len()).collect();
    (header.into_iter().map(|line| line[2..].strip_prefix(' ').unwrap_or(&line[2..])).collect(), body)
}

/// `KEYS[3] name …` gives `(3, false)`; `KEYS[3..] name …` gives `(3, true)`.
fn numbered(line: &str, kind: &str) -> Option<(usize, bool)> {
    let rest = line.strip_prefix(kind)?.strip_prefix('[')?;
    let (inside, after) = rest.split_once(']')?;
    let described = after.starts_with(' ') && !after.trim().is_empty();
    let (number, tail) = inside.strip_suffix("..").map_or((inside, false), |number| (number, true));
    described.then_some(())?;
    Some((number.parse().ok()?, tail))
}

fn inputs(header: &[&str], kind: &str, complaints: &mut Vec<String>) -> Inputs {
    let mut seen = Inputs { fixed: 0, tail: false };
    for line in header.iter().filter(|line| line.starts_with(&format!("{kind}["))) {
        match numbered(line, kind) {
            Some((number, tail)) if number == seen.fixed + 1 && !seen.tail => {
                if tail {
                    seen.tail = true;
                } else {
                    seen.fixed = number;
                }
            }
            Some((number, _)) => complaints.push(format!("{kind}[{number}] is out of order")),
            None => complaints.push(format!("not understood: {line}")),
        }
    }
    seen
}

/// The words that replies begin with, of the lines from RETURNS on: of `{"word", …}`, or of `"word …"` where it says that
/// they are texts.
pub fn documented_replies(lines: &[&str]) -> BTreeSet<String> {
    let are_texts = lines.first().is_some_and(|line| line.ends_with("texts"));
    let quoted = |line: &&str| -> Vec<String> {
        let parts: Vec<&str> = line.split('"').collect();
        let replies = (1..parts.len()).step_by(2).filter(|&at| are_texts || parts[at - 1].ends_with('{'));
        replies.map(|at| parts[at].split(' ').next().unwrap_or_default().to_owned()).collect()
    };
    lines.iter().flat_map(quoted).collect()
}

fn header(name: &str, lines: &[&str], complaints: &mut Vec<String>) -> Header {
    let end = lines.iter().position(|line| line.trim().is_empty()).unwrap_or(lines.len());
    let title = lines[..end].join(" ");
    if !title.starts_with(&format!("{name}: ")) || !title.ends_with('.') || title.contains("  ") {
        complaints.push(format!("its header does not begin with \"-- {name}: a sentence.\""));
    }
    let keys = inputs(lines, "KEYS", complaints);
    let args = inputs(lines, "ARGV", complaints);
    let returns = lines.iter().position(|line| line.starts_with("RETURNS"));
    let cost = lines.iter().position(|line| line.starts_with("COST "));
    let mut replies = BTreeSet::new();
    match (returns, cost) {
        (Some(from), Some(to)) if from < to => {
            replies = documented_replies(&lines[from..to]);
            if replies.is_empty() {
                complaints.push("no {\"word\"} below RETURNS".to_owned());
            }
        }
        _ => complaints.push("no RETURNS, or no COST after it".to_owned()),
    }
    Header { keys, args, replies }
}

/// The body without comments, strings kept.
fn without_comments(body: &[&str]) -> String {
    let mut out = String::new();
    for line in body {
        let mut quote = None;
        let chars: Vec<char> = line.chars().collect();
        let end = (0..chars.len()).find(|&i| {
            match quote {
                Some(open) if chars[i] == open && (i == 0 || chars[i - 1] != '\\') => quote = None,
                None if chars[i] == '\'' || chars[i] == '"' => quote = Some(chars[i]),
                _ => {}
            }
            quote.is_none() && chars[i] == '-' && chars.get(i + 1) == Some(&'-')
        });
        out.extend(&chars[..end.unwrap_or(chars.len())]);
        out.push('\n');
    }
    out
}

/// What a text does with KEYS or ARGV: the literal indices, and whether it also reaches in by a computed one.
fn used(text: &str, kind: &str) -> (BTreeSet<usize>, bool) {
    let mut numbers = BTreeSet::new();
    let mut computed = false;
    for (at, _) in text.match_indices(kind) {
        let after = &text[at + kind.len()..];
        let index = after.strip_prefix('[').and_then(|rest| rest.split(']').next());
        match index.map(|index| index.trim().parse::<usize>()) {
            Some(Ok(number)) => drop(numbers.insert(number)),
            _ => computed = true,
        }
    }
    (numbers, computed)
}

/// The words that replies begin with: the strings in the first element of every table that is returned, or that is made
/// as a local named `reply`, and the first word of every text that is returned. A string that is only compared with is not
/// one.
fn reply_words(text: &str) -> BTreeSet<String> {
    let texts = text.split("return '").skip(1);
    let mut words: BTreeSet<String> =
        texts.filter_map(|rest| rest.split([' ', '\'']).next()).map(str::to_owned).collect();
    for opening in ["return {", "local reply = {"] {
        for (at, _) in text.match_indices(opening) {
            let rest = &text[at + opening.len()..];
            let mut depth = 0_usize;
            let mut word: Option<String> = None;
            let mut before = String::new();
            for c in rest.chars() {
                match (&mut word, c) {
                    (Some(inside), '\'' | '"') => {
                        if !before.trim_end().ends_with(['=', '~']) {
                            words.insert(inside.clone());
                        }
                        word = None;
                        before.clear();
                    }
                    (Some(inside), c) => inside.push(c),
                    (None, '\'' | '"') => word = Some(String::new()),
                    (None, ',' | '}') if depth == 0 => break,
                    (None, c) => {
                        match c {
                            '(' | '{' | '[' => depth += 1,
                            ')' | '}' | ']' => depth = depth.saturating_sub(1),
                            _ => {}
                        }
                        before.push(c);
                    }
                }
            }
        }
    }
    words
}

fn compare_inputs(kind: &str, documented: Inputs, body: &str, prelude: &str, complaints: &mut Vec<String>) {
    let (mut numbers, computed) = used(body, kind);
    for number in numbers.iter().filter(|&&number| number > documented.fixed && !documented.tail) {
        complaints.push(format!("{kind}[{number}] is used and not documented"));
    }
    if computed && !documented.tail {
        complaints.push(format!("{kind} is used by a computed index, and the header has no {kind}[n..]"));
    }
    if documented.tail && !computed && !numbers.iter().any(|&number| number > documented.fixed) {
        complaints.push(format!("{kind}[{}..] is documented and not used", documented.fixed + 1));
    }
    numbers.extend(used(prelude, kind).0);
    for number in (1..=documented.fixed).filter(|number| !numbers.contains(number) && !computed) {
        complaints.push(format!("{kind}[{number}] is documented and not used"));
    }
}

/// One script: `prelude` is what is joined in front of it, `keys` and `args` what Rust passes.
fn script(file: &File, prelude: &str, keys: Inputs, args: Inputs) -> Vec<String> {
    let mut complaints = Vec::new();
    let (head, body_lines) = split(&file.text);
    let header = header(file.stem(), &head, &mut complaints);
    let body = without_comments(&body_lines);
    let prelude = without_comments(&prelude.lines().collect::<Vec<_>>());
    compare_inputs("KEYS", header.keys, &body, &prelude, &mut complaints);
    compare_inputs("ARGV", header.args, &body, &prelude, &mut complaints);
    for (kind, documented, passed) in [("KEYS", header.keys, keys), ("ARGV", header.args, args)] {
        // "At least n" may count the first of the tail, or let the tail be empty.
        let fits = documented.tail == passed.tail
            && (documented.fixed == passed.fixed || documented.tail && documented.fixed + 1 == passed.fixed);
        if !fits {
            complaints.push(format!("{kind}: the header has {documented:?}, Rust passes {passed:?}"));
        }
    }
    let returned = reply_words(&body);
    complaints
        .extend(returned.difference(&header.replies).map(|word| format!("{word:?} is returned and not documented")));
    complaints
        .extend(header.replies.difference(&returned).map(|word| format!("{word:?} is documented and not returned")));
    let lines = body_lines.iter().filter(|line| !line.trim().is_empty()).count();
    if lines > BODY_LINES_MAX {
        complaints.push(format!("{lines} lines, more than {BODY_LINES_MAX}"));
    }
    if body.contains("math.random") || body.contains("os.time") || body.contains("os.clock") {
        complaints.push("another clock than TIME, or chance".to_owned());
    }
    complaints.into_iter().map(|complaint| format!("{}: {complaint}", file.path)).collect()
}

const fn inputs_of(arity: Arity) -> Inputs {
    match arity {
        Arity::Exactly(fixed) => Inputs { fixed, tail: false },
        Arity::AtLeast(fixed) => Inputs { fixed, tail: true },
    }
}

#[test]
fn every_script_does_what_its_header_says() {
    let (preludes, scripts): (Vec<File>, Vec<File>) =
        files("lua", ".lua").into_iter().partition(|file| file.stem().starts_with('_'));
    let mut complaints = Vec::new();
    for file in &scripts {
        let Some(known) = Script::ALL.iter().find(|known| known.name == file.stem()) else {
            complaints.push(format!("{}: Rust runs no script of that name", file.path));
            continue;
        };
        assert!(known.source().ends_with(&file.text), "{}: Rust runs another text; build again", file.path);
        let prelude = preludes.iter().find(|_| known.of_event > 0);
        let prelude = prelude.map_or("", |prelude| prelude.text.as_str());
        complaints.extend(script(file, prelude, inputs_of(known.keys), inputs_of(known.args)));
    }
    for known in Script::ALL.iter().filter(|known| !scripts.iter().any(|file| file.stem() == known.name)) {
        complaints.push(format!("{}: no such file in lua/", known.name));
    }
    assert_tidy(&complaints);
}

const GOOD: &str = r#"-- give: hand out what is left,
-- or say that nothing is.
--
-- KEYS[1] counts  hash  stock of each category
-- ARGV[1] category  text
-- ARGV[2..] user  text  who may
--
-- RETURNS one of
--   {"given", left}
--   {"none"} {"some"}   nothing changed
--
-- COST O(1); 1 read.

local left = redis.call('HGET', KEYS[1], ARGV[1]) -- KEYS[9] in a comment -- {'no'}
for i = 2, #ARGV do check(ARGV[i], 'a -- b') end
if left == 'x' then return {left == 'y' and 'none' or 'some'} end
return {'given', 'left', {'inner'}}
"#;

const FITS: (Inputs, Inputs) = (Inputs { fixed: 1, tail: false }, Inputs { fixed: 1, tail: true });

fn complaints_of(text: &str) -> Vec<String> {
    let all = script(&File::sample("lua/give.lua", text), "", FITS.0, FITS.1);
    all.into_iter().map(|complaint| complaint.replacen("lua/give.lua: ", "", 1)).collect()
}

#[test]
fn a_good_script_has_no_complaints() {
    assert_eq!(complaints_of(GOOD), Vec::<String>::new());
}

#[test]
fn replies_may_be_texts() {
    let texts = "--   \"given left\"   all of \"it\"\n--   \"none\" \"some\"   nothing changed\n";
    let good = GOOD
        .replace("RETURNS one of", "RETURNS one of the texts")
        .replace("--   {\"given\", left}\n--   {\"none\"} {\"some\"}   nothing changed\n", texts)
        .replace(
            "return {left == 'y' and 'none' or 'some'} end",
            "return 'none' end\nif left == 'y' then return 'some' end",
        )
        .replace("return {'given', 'left', {'inner'}}", "return 'given ' .. left");
    assert_eq!(complaints_of(&good), ["\"it\" is documented and not returned"]);
    let taken = good.replace(" all of \"it\"", "").replace("'given '", "'taken '");
    let wanted = ["\"taken\" is returned and not documented", "\"given\" is documented and not returned"];
    assert_eq!(complaints_of(&taken), wanted);
}

#[test]
fn each_lie_of_a_header_is_found() {
    let title = "its header does not begin with \"-- give: a sentence.\"";
    for (from, to, wanted) in [
        ("-- give: hand", "-- take: hand", vec![title]),
        ("nothing is.\n", "nothing is\n", vec![title]),
        (
            "-- KEYS[1] counts",
            "-- KEYS[2] counts",
            vec![
                "KEYS[2] is out of order",
                "KEYS[1] is used and not documented",
                "KEYS: the header has Inputs { fixed: 0, tail: false }, Rust passes Inputs { fixed: 1, tail: false }",
            ],
        ),
        ("KEYS[1], ARGV[1])", "KEYS[1], KEYS[3], ARGV[1])", vec!["KEYS[3] is used and not documented"]),
        ("HGET', KEYS[1]", "HGET', KEYS[k]", vec!["KEYS is used by a computed index, and the header has no KEYS[n..]"]),
        ("HGET', KEYS[1]", "HGET', 'x'", vec!["KEYS[1] is documented and not used"]),
        ("for i = 2, #ARGV do check(ARGV[i], 'a -- b') end\n", "", vec!["ARGV[2..] is documented and not used"]),
        (
            "-- ARGV[2..] user  text  who may\n",
            "",
            vec![
                "ARGV is used by a computed index, and the header has no ARGV[n..]",
                "ARGV: the header has Inputs { fixed: 1, tail: false }, Rust passes Inputs { fixed: 1, tail: true }",
            ],
        ),
        (
            "-- ARGV[1] category  text",
            "-- ARGV[1]",
            vec![
                "not understood: ARGV[1]",
                "ARGV[2] is out of order",
                "ARGV[1] is used and not documented",
                "ARGV is used by a computed index, and the header has no ARGV[n..]",
                "ARGV: the header has Inputs { fixed: 0, tail: false }, Rust passes Inputs { fixed: 1, tail: true }",
            ],
        ),
        (
            "return {'given'",
            "return {'gone'",
            vec!["\"gone\" is returned and not documented", "\"given\" is documented and not returned"],
        ),
        (
            "and 'none' or",
            "and 'nothing' or",
            vec!["\"nothing\" is returned and not documented", "\"none\" is documented and not returned"],
        ),
        (
            "-- COST O(1); 1 read.\n",
            "",
            vec![
                "no RETURNS, or no COST after it",
                "\"given\" is returned and not documented",
                "\"none\" is returned and not documented",
                "\"some\" is returned and not documented",
            ],
        ),
        (
            "local left = redis.call(",
            "local left = math.random() or redis.call(",
            vec!["another clock than TIME, or chance"],
        ),
    ] {
        assert!(GOOD.contains(from), "the sample has no {from:?}");
        assert_eq!(complaints_of(&GOOD.replacen(from, to, 1)), wanted, "{from:?} became {to:?}");
    }
    let long = format!("{GOOD}{}", "x = 1\n".repeat(BODY_LINES_MAX));
    assert_eq!(complaints_of(&long), [format!("{} lines, more than {BODY_LINES_MAX}", BODY_LINES_MAX + 4)]);
}

#[test]
fn what_only_the_prelude_uses_counts_as_used() {
    let text = GOOD.replacen("HGET', KEYS[1]", "HGET', 'x'", 1);
    let file = File::sample("lua/give.lua", &text);
    assert_eq!(script(&file, "local k = KEYS[1]\n-- KEYS[2]\n", FITS.0, FITS.1), Vec::<String>::new());
    assert_eq!(script(&file, "-- KEYS[1]\n", FITS.0, FITS.1), ["lua/give.lua: KEYS[1] is documented and not used"]);
}
