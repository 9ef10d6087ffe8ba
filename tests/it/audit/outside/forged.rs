//! Histories that break a promise, each of which the auditor must refuse, beside those that only look so.

use super::{Rules, Seen, Span, Told, Validity, complaints};

const RULES: Rules = Rules { grace: 10_000, window: 15_000, shown: 5_000 };
const TTL: u64 = 20_000;

type History = Vec<(Span, Seen)>;

fn span(began: u64, ended: u64) -> Span {
    Span { began, ended }
}

fn told(lock: &str, quantity: u64, at: u64) -> Told {
    Told { lock: lock.to_owned(), category: 1, quantity, expires: at + TTL }
}

/// Ten tickets, and a lock of some of them by each user, granted within two milliseconds.
fn granted(all: &[(u64, &str, u64, u64)]) -> History {
    let mut history = vec![(Span::at(0), Seen::Tickets { category: 1, total: 10 })];
    for &(user, lock, quantity, at) in all {
        let request = format!("r-{lock}");
        let told = told(lock, quantity, at);
        history.push((span(at - 1, at + 1), Seen::Granted { user, request, told, server: at }));
    }
    history
}

fn with(mut history: History, more: &[(Span, Seen)]) -> History {
    history.extend_from_slice(more);
    history.sort_by_key(|(span, _)| span.began);
    history
}

fn unlock(lock: &str, answer: Option<bool>) -> Seen {
    Seen::Unlock { lock: lock.to_owned(), answer }
}

fn confirm(lock: &str, order: &str, answer: Option<bool>) -> Seen {
    Seen::Confirm { lock: lock.to_owned(), order: order.to_owned(), answer }
}

fn validate(answer: Validity) -> Seen {
    Seen::Validate { user: 1, category: 1, quantity: 2, answer: Some(answer) }
}

fn until(lock: &str, expires: u64) -> Validity {
    Validity::Until { lock: lock.to_owned(), expires }
}

fn none() -> Seen {
    Seen::Listed { user: 1, locks: Vec::new() }
}

#[track_caller]
fn refused(history: &History, why: &str) {
    let found = complaints(history, RULES);
    assert!(found.iter().any(|complaint| complaint.contains(why)), "{why}: {found:#?}");
}

#[track_caller]
fn accepted(history: &History) {
    assert_eq!(complaints(history, RULES), [] as [String; 0]);
}

#[test]
fn more_granted_than_there_is() {
    let both = granted(&[(1, "a", 6, 1000), (2, "b", 6, 2000)]);
    refused(&both, "granted twice");
    let why = "granted twice";
    // The first is not given back by a request that was refused, and not before it was asked.
    refused(&with(both.clone(), &[(span(1100, 1101), unlock("a", Some(false)))]), why);
    refused(&with(both.clone(), &[(span(2001, 2002), unlock("a", Some(true)))]), why);
    accepted(&with(both.clone(), &[(span(1100, 1101), unlock("a", Some(true)))]));
    accepted(&with(both.clone(), &[(span(1100, 1101), unlock("a", None))]));
    accepted(&with(both.clone(), &[(span(1500, 1600), Seen::DataLost)]));
    accepted(&granted(&[(1, "a", 6, 1000), (2, "b", 6, 1000 + TTL)]));
    // Its owner was away for the grace, or just not.
    let late = granted(&[(1, "a", 6, 1000), (2, "b", 6, 12_000)]);
    accepted(&with(late.clone(), &[(span(1500, 11_600), Seen::Away { user: 1 })]));
    refused(&with(late.clone(), &[(span(2500, 11_600), Seen::Away { user: 1 })]), why);
    refused(&with(late, &[(span(1500, 11_600), Seen::Away { user: 2 })]), why);
    // More tickets came.
    accepted(&with(both, &[(Span::at(1500), Seen::Tickets { category: 1, total: 12 })]));
}

#[test]
fn a_sale_counts_for_ever() {
    let both = granted(&[(1, "a", 6, 1000), (2, "b", 6, 60_000)]);
    let paid = with(both, &[(span(1100, 1101), confirm("a", "o", Some(true)))]);
    refused(&paid, "granted twice");
    // Lost with the data before it was sold, but not once the shop's own stock shows it.
    let lost = with(paid, &[(span(2000, 3000), Seen::DataLost)]);
    accepted(&lost);
    refused(&with(lost, &[(Span::at(1200), Seen::Sold { lock: "a".to_owned() })]), "granted twice");
}

#[test]
fn a_lost_lock() {
    let one = granted(&[(1, "a", 2, 1000)]);
    let lists = |at| (span(at, at + 1), none());
    refused(&with(one.clone(), &[lists(2000)]), "not listed");
    refused(&with(one.clone(), &[lists(2000), (span(1500, 9000), Seen::Away { user: 1 })]), "not listed");
    accepted(&with(one.clone(), &[lists(12_000), (span(1500, 12_500), Seen::Away { user: 1 })]));
    accepted(&with(one.clone(), &[lists(12_000), (span(1500, 12_500), Seen::AwayAll)]));
    accepted(&with(one.clone(), &[lists(1000 + TTL)]));
    accepted(&with(one.clone(), &[lists(2000), (span(1900, u64::MAX), unlock("a", None))]));
    refused(&with(one.clone(), &[(span(2000, 2001), validate(Validity::No))]), "not valid");
    refused(&with(one.clone(), &[(span(2000, 2001), confirm("a", "o", Some(false)))]), "not confirmed");
    refused(&with(one.clone(), &[(span(2000, 2001), unlock("a", Some(false)))]), "nothing to unlock");
    // A validated lock lives longer.
    let pinned = with(one, &[(span(20_000, 20_001), validate(until("a", 36_000)))]);
    refused(&with(pinned, &[lists(30_000)]), "not listed");
}

#[test]
fn a_lock_that_is_not_handed_back() {
    let one = granted(&[(1, "a", 2, 1000)]);
    let lost = with(one, &[(span(2000, 3000), Seen::DataLost), (span(4000, 4001), none())]);
    refused(&lost, "not handed back");
    accepted(&with(lost.clone(), &[(Span::at(2500), Seen::Expired { lock: "a".to_owned() })]));
    accepted(&with(lost.clone(), &[(span(1900, 2100), Seen::Away { user: 1 })]));
    // One loss just after the grant may have taken it for good, and then a later one did not.
    accepted(&with(lost.clone(), &[(span(1400, 1600), Seen::DataLost)]));
    refused(&with(lost.clone(), &[(span(900, 998), Seen::DataLost)]), "not handed back");
    refused(&with(lost.clone(), &[(span(3100, 3200), Seen::DataLost)]), "not handed back");
    // Its owner did not want it any more, and was told that it is gone.
    accepted(&with(lost.clone(), &[(span(2500, 2501), unlock("a", Some(false)))]));
    // It may have been sold before, by a message that was delivered once more after it.
    accepted(&with(lost.clone(), &[(span(1900, 2900), confirm("a", "o", Some(false)))]));
    refused(&with(lost, &[(span(3100, 3101), confirm("a", "o", Some(false)))]), "not handed back");
}

#[test]
fn a_lock_that_ends_twice() {
    let one = granted(&[(1, "a", 2, 1000)]);
    let back = with(one.clone(), &[(span(1100, 1101), unlock("a", Some(true)))]);
    refused(
        &with(back.clone(), &[(span(1200, 1201), confirm("a", "o", Some(true)))]),
        "confirmed after it had been given back",
    );
    refused(&with(back.clone(), &[(span(1200, 1201), validate(until("a", 30_000)))]), "valid though given back");
    let listed = Seen::Listed { user: 1, locks: vec![told("a", 2, 1000)] };
    let lost_at = |began: u64| with(back.clone(), &[(span(began, began + 50), Seen::DataLost)]);
    refused(&with(lost_at(1700), &[(span(1800, 1801), listed.clone())]), "listed after it had been given back");
    accepted(&with(lost_at(1150), &[(span(1300, 1301), listed.clone())]));
    refused(&with(back, &[(span(1200, 1201), listed.clone())]), "listed after it had been given back");
    refused(&with(one.clone(), &[(span(22_000, 22_001), listed)]), "listed after its deadline");
    refused(
        &with(one.clone(), &[(span(22_000, 22_001), confirm("a", "o", Some(true)))]),
        "confirmed after its deadline",
    );
    let paid = with(one, &[(span(1100, 1101), confirm("a", "o", Some(true)))]);
    refused(&with(paid.clone(), &[(span(1200, 1201), unlock("a", Some(true)))]), "took a sale back");
    refused(&with(paid.clone(), &[(span(1200, 1201), confirm("a", "p", Some(true)))]), "confirmed for two orders");
    refused(
        &with(paid.clone(), &[(span(1200, 1201), confirm("a", "o", Some(false)))]),
        "a repeated confirm was refused",
    );
    let sold = (Span::at(1300), Seen::Sold { lock: "a".to_owned() });
    accepted(&with(paid.clone(), std::slice::from_ref(&sold)));
    refused(&with(paid, &[sold.clone(), sold]), "sold twice");
}

#[test]
fn answers_that_belong_to_somebody_else() {
    let two = granted(&[(1, "a", 2, 1000), (2, "b", 2, 1000)]);
    let others = Seen::Listed { user: 2, locks: vec![told("a", 2, 1000), told("b", 2, 1000)] };
    refused(&with(two.clone(), &[(span(1100, 1101), others)]), "another user's lock is listed");
    refused(&with(two.clone(), &[(span(1100, 1101), validate(until("b", 30_000)))]), "valid by another's lock");
    refused(&with(two.clone(), &[(span(1100, 1101), validate(until("a", 3000)))]), "valid for less than the window");
    let again = |lock: &str, request: &str, user: u64| {
        let seen = Seen::Granted { user, request: request.to_owned(), told: told(lock, 2, 1100), server: 1100 };
        (span(1099, 1101), seen)
    };
    refused(&with(two.clone(), &[again("c", "r-a", 1)]), "a request that was granted has another lock now");
    refused(&with(two.clone(), &[again("c", "r-c", 1)]), "granted a second lock of the category");
    refused(&with(two.clone(), &[again("a", "r-x", 2)]), "one lock was granted to two requests");
    let stranger = Seen::Listed { user: 1, locks: vec![told("a", 2, 1000), told("z", 1, 1000)] };
    refused(&with(two.clone(), &[(span(1100, 1101), stranger.clone())]), "a lock is listed that nobody asked for");
    let wished = (span(900, u64::MAX), Seen::Wished { user: 1, request: "r-z".to_owned() });
    accepted(&with(two, &[(span(1100, 1101), stranger), wished]));
}
