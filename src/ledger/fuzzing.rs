//! What Redis sends: notices and the replies of scripts.

use std::time::Duration;

use super::driver::{self, Reply};
use super::notice::{read_change, read_expired, read_personal, write_personal};
use super::reply::{self, Parts};
use super::script::Script;
use crate::domain::{CategoryId, EventId, LockId, LockRequest, Quantity, UserId};

/// Lists within lists that a reply is built with at most.
const DEPTH_MAX: usize = 8;

/// A notice: read as each kind there is; what was understood is written as it is read.
pub fn notices(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(event) = EventId::new(7) else { return };
    drop((read_change(event, text), read_expired(text)));
    if let Some(message) = read_personal(text) {
        assert_eq!(read_personal(&write_personal(&message)).as_ref(), Some(&message), "{text}");
    }
}

/// A script's reply: words apart by spaces, `[` and `]` around lists, `:` before integers, `_` for nothing.
pub fn replies(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut words = text.split(' ');
    let Some(reply) = Reply::of(list(&mut words, 0)) else { return };
    let parts = |script: &'static &'static Script| Parts::new(script, reply.clone());
    let (Ok(event), Ok(user)) = (EventId::new(7), UserId::new(7)) else { return };
    let id = LockId::generate(event);
    let (Ok(category), Ok(quantity)) = (CategoryId::new(7), Quantity::new(7)) else { return };
    let request = LockRequest {
        lock: id,
        user,
        category,
        quantity,
        request: None,
        session: None,
        generation: 0,
        ttl: Duration::ZERO,
        stock_age_max: Duration::ZERO,
        per_event_max: None,
        rate: None,
    };
    if let Some(said) = Reply::of(format!("${}\r\n{text}\r\n", text.len())) {
        drop((reply::lock(&said, &request), reply::release(&said, id), reply::availability(&said, event)));
    }
    for script in Script::ALL {
        let Ok(parts) = parts(script) else { return };
        match script.name {
            "restore" => drop(reply::restore(&parts)),
            "validate" => drop(reply::validate(parts)),
            "confirm" => drop(reply::confirm(parts)),
            "find" => drop(reply::find(parts, id)),
            "locks" => drop(reply::locks(parts, user)),
            "ask" => drop(reply::ask(parts)),
            "accept" => drop(reply::accept(&parts)),
            "order" => drop(reply::order(parts)),
            "sweep" => drop(reply::sweep(parts)),
            "tally" => drop(reply::tally(parts)),
            "due" => drop(reply::due::<EventId>(parts)),
            "plan" => drop(reply::plan(parts)),
            "enter" => drop(reply::entered(parts)),
            "leave" => drop(reply::left(parts)),
            "unhost" => drop(reply::unhosted(parts)),
            "drop" => drop(reply::dropped(&parts)),
            "beat" => drop(reply::alive(parts)),
            _ => drop(reply::said(&parts, "done")),
        }
    }
}

/// What Redis sends to whom has asked as many questions as the first byte says, in pieces as long as the second one does:
/// what passes the limits is read without harm, and the pieces change nothing.
pub fn streams(data: &[u8]) {
    let [questions, length, data @ ..] = data else { return };
    driver::replay(data, usize::from(*length), usize::from(*questions));
}

/// A list, as Redis writes it.
fn list<'a>(words: &mut impl Iterator<Item = &'a str>, depth: usize) -> String {
    let mut parts = Vec::new();
    while let Some(word) = words.next() {
        parts.push(match word {
            "]" => break,
            "[" if depth < DEPTH_MAX => list(words, depth + 1),
            "_" => "_\r\n".to_owned(),
            word => match word.strip_prefix(':').and_then(|digits| digits.parse::<i64>().ok()) {
                Some(number) => format!(":{number}\r\n"),
                None => format!("${}\r\n{word}\r\n", word.len()),
            },
        });
    }
    format!("*{}\r\n{}", parts.len(), parts.concat())
}
