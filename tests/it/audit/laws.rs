//! The laws, one answer at a time.

use std::collections::HashMap;

use seatlock::domain::{
    Availability, CategoryId, ConfirmOutcome, EventId, Grant, Lock, LockId, LockOutcome, LockRequest, LockStatus,
    OrderId, ReleaseOutcome, Releaser, UserId, ValidateOutcome, ValidateRequest,
};

use super::facts::{Facts, Life, TOMBSTONE_MS, ms};
use super::{Deed, When};

/// What an answer proves broken, and whether it does.
type Findings = Vec<(&'static str, bool)>;

/// What is wrong with one answer.
pub fn of(facts: &Facts, when: &When, deed: &Deed) -> Vec<&'static str> {
    let findings = match deed {
        Deed::Lock(request, Some(answer)) => lock(facts, when, request, answer),
        Deed::Validate(request, Some(answer)) => validate(facts, when, request, *answer),
        Deed::Confirm { lock, user, order, answer: Some(answer) } => {
            confirm(facts, when, *lock, *user, order.as_ref(), *answer)
        }
        Deed::Release { lock, by, answer: Some(answer) } => release(facts, when, *lock, *by, answer),
        Deed::Availability(event, rows) => rows.iter().flat_map(|row| reading(facts, when, *event, row)).collect(),
        Deed::Find(lock, found) => find(facts, when, *lock, found.as_ref()),
        Deed::Holds { event, user, locks } => holds(facts, when, *event, *user, locks),
        Deed::Lock(_, None)
        | Deed::Validate(_, None)
        | Deed::Confirm { .. }
        | Deed::Release { .. }
        | Deed::Leave { .. }
        | Deed::Ask { .. }
        | Deed::Accept { .. }
        | Deed::Order(..) => Vec::new(),
    };
    findings.into_iter().filter(|(_, broken)| *broken).map(|(law, _)| law).collect()
}

/// What each snapshot that may be in force says of a category: its stock, `None` when it is closed.
#[expect(clippy::option_option, reason = "not named, closed, open")]
fn told(facts: &Facts, when: &When, event: EventId, category: CategoryId) -> Vec<Option<Option<u64>>> {
    let snapshots = facts.snapshots(event, when);
    let of = |(_, snapshot): &(u64, &seatlock::domain::Snapshot)| {
        let told = snapshot.categories.iter().find(|told| told.category == category)?;
        Some((snapshot.open && told.open).then_some(told.stock))
    };
    snapshots.iter().map(of).collect()
}

fn lock(facts: &Facts, when: &When, request: &LockRequest, answer: &LockOutcome) -> Findings {
    let event = request.event();
    let told = || told(facts, when, event, request.category);
    match answer {
        LockOutcome::Granted(grant) => granted(facts, when, request, grant),
        LockOutcome::GrantedBefore(grant) => {
            let Some(life) = facts.lives.get(&grant.lock) else { return vec![("a repeat of no request", true)] };
            let same = (life.request.user, life.request.category, life.request.quantity, &life.request.request)
                == (request.user, request.category, request.quantity, &request.request);
            vec![
                ("a repeat answered with another request's lock", !same || request.request.is_none()),
                (
                    "a repeat answered with another fencing token",
                    life.grant.is_some_and(|first| first.version != grant.version),
                ),
                ("a repeat answered with an ended lock", facts.ended(life, when)),
            ]
        }
        LockOutcome::RequestEnded { lock } => {
            let active = facts.lives.get(lock).is_some_and(|life| facts.active(life, when));
            vec![("an active lock called ended", active)]
        }
        LockOutcome::RequestMismatch => {
            let differs =
                |other: &LockRequest| (other.category, other.quantity) != (request.category, request.quantity);
            vec![("a mismatch with nothing", !namesakes(facts, request).any(|(_, other, _)| differs(other)))]
        }
        LockOutcome::AlreadyLocked { lock } => match facts.lives.get(lock) {
            None => vec![("locked already by a lock that nobody asked for", true)],
            Some(life) => {
                let own = (life.request.user, life.request.category) == (request.user, request.category);
                vec![
                    ("locked already by another's lock", !own),
                    ("locked already by a lock that has ended", facts.ended(life, when)),
                ]
            }
        },
        LockOutcome::Insufficient { available } => vec![
            ("refused though it says that enough is free", *available >= request.quantity.wide()),
            ("refused though enough is free", least_free(facts, when, request) >= request.quantity.wide()),
        ],
        LockOutcome::SoldOut => vec![("sold out though something is free", least_free(facts, when, request) > 0)],
        LockOutcome::StockUnknown => {
            let young = |at: u64| when.until_ms.saturating_sub(at) <= ms(request.stock_age_max);
            vec![("a young snapshot is not known", facts.stored_ms(event, when).is_some_and(young))]
        }
        LockOutcome::Closed => {
            // A category that a later snapshot no longer names is closed too.
            let open = told().iter().all(|told| matches!(told, Some(Some(_))));
            vec![("closed though every snapshot has it open", open)]
        }
        LockOutcome::CategoryNotFound => {
            let told = told();
            let always = !told.is_empty() && told.iter().all(Option::is_some);
            vec![("a category of every snapshot is not found", always)]
        }
        LockOutcome::LimitExceeded { .. } => vec![("a limit that nobody set", request.per_event_max.is_none())],
        LockOutcome::RateLimited { .. } => vec![("a rate that nobody set", request.rate.is_none())],
    }
}

fn granted(facts: &Facts, when: &When, request: &LockRequest, grant: &Grant) -> Findings {
    let event = request.event();
    let now = grant.now.as_ms();
    // The fencing token says which of two grants of a category was first, also where they overlap.
    let first = |life: &&Life| {
        let token = |other: &Grant| life.request.category == request.category && other.version < grant.version;
        life.request.lock != grant.lock && life.grant.is_some_and(|other| life.when.before(when) || token(other))
    };
    let of_category = facts.of_category.get(&(event, request.category)).into_iter().flatten();
    let others = of_category.map(|lock| &facts.lives[lock]).filter(first);
    let taken: u64 = others.filter(|life| facts.counts(life, when, now)).map(|life| life.request.quantity.wide()).sum();
    let stock = told(facts, when, event, request.category).into_iter().flatten().flatten().max();

    let of_holder = facts.of_holder.get(&(event, request.user)).into_iter().flatten();
    let own: Vec<&Life> = of_holder.map(|lock| &facts.lives[lock]).filter(first).collect();
    let twice = own.iter().any(|life| life.request.category == request.category && facts.active(life, when));
    let held: u64 =
        own.iter().filter(|life| facts.charged(life, when, now)).map(|life| life.request.quantity.wide()).sum();

    let answered = namesakes(facts, request).any(|(at, other, known)| {
        known && at.before(when) && when.until_ms < at.from_ms + ms(other.ttl) + TOMBSTONE_MS
    });
    let snapshots = facts.snapshots(event, when);
    let young = snapshots.iter().any(|(until, _)| now.saturating_sub(*until) <= ms(request.stock_age_max));
    vec![
        ("granted another lock than was asked for", grant.lock != request.lock),
        ("granted at another time than it was asked", now < when.from_ms || now > when.until_ms),
        ("granted for another time than was asked for", grant.deadline.as_ms() != now + ms(request.ttl)),
        (
            "sold twice: more is locked than there is",
            stock.is_some_and(|stock| taken + request.quantity.wide() > stock),
        ),
        ("granted what no open snapshot has", stock.is_none()),
        ("granted on a stock that is too old", !young),
        ("granted a second lock of the category", twice),
        (
            "granted beyond the limit",
            request.per_event_max.is_some_and(|max| held + request.quantity.wide() > max.into()),
        ),
        ("granted a request twice", answered),
    ]
}

/// The other requests under the same name by the same user.
fn namesakes<'a>(
    facts: &'a Facts,
    request: &LockRequest,
) -> impl Iterator<Item = (When, &'a LockRequest, bool)> + use<'a> {
    let (own, name) = (request.lock, request.request.as_ref().map(ToString::to_string).unwrap_or_default());
    let all = facts.of_request.get(&(request.event(), request.user, name)).into_iter().flatten();
    all.filter(move |(_, other, _)| other.lock != own).copied()
}

/// What is surely free for a request: the smallest stock that may be in force without all that may be taken.
fn least_free(facts: &Facts, when: &When, request: &LockRequest) -> u64 {
    let told = told(facts, when, request.event(), request.category);
    let stock = told.into_iter().map(|told| told.flatten().unwrap_or(0)).min().unwrap_or(0);
    let own = facts.lives.get(&request.lock).map_or(0, |life| life.request.quantity.wide());
    stock.saturating_sub(facts.taken_max(request.event(), request.category, when).saturating_sub(own))
}

fn validate(facts: &Facts, when: &When, request: &ValidateRequest, answer: ValidateOutcome) -> Findings {
    let of_holder = facts.of_holder.get(&(request.event, request.user)).into_iter().flatten();
    let own = of_holder.map(|lock| &facts.lives[lock]).filter(|life| life.request.category == request.category);
    let mut active = own.filter(|life| facts.active(life, when));
    match answer {
        ValidateOutcome::Valid { lock, deadline } => {
            let Some(life) = facts.lives.get(&lock) else { return vec![("valid without a lock", true)] };
            let of = (life.request.event(), life.request.user, life.request.category);
            vec![
                ("valid by another's lock", of != (request.event, request.user, request.category)),
                ("valid by a lock of fewer tickets", life.request.quantity < request.quantity),
                ("valid though the lock has ended", facts.ended(life, when)),
                ("valid for less than the window", deadline.as_ms() < when.from_ms + ms(request.window)),
                ("valid with an earlier deadline", deadline.as_ms() < facts.deadline_min(life, when)),
            ]
        }
        ValidateOutcome::NotFound => {
            vec![("a lock is lost: not valid", active.any(|life| life.request.quantity >= request.quantity))]
        }
        ValidateOutcome::Expired => vec![("a lock is lost: called expired", active.next().is_some())],
    }
}

/// What a refusal by owner says, and what "never existed" says.
fn common(facts: &Facts, when: &When, lock: LockId, said: Option<UserId>, refusal: Refusal) -> Findings {
    let Some(life) = facts.lives.get(&lock) else {
        // Nobody asked for it, as far as is known.
        return vec![("something was done to a lock that nobody asked for", !matches!(refusal, Refusal::NotFound))];
    };
    let own = said.is_none_or(|said| said == life.request.user);
    match refusal {
        Refusal::NotFound => {
            let released = life.maybe_released_ms(when);
            let end = released.into_iter().fold(facts.deadline_min(life, when), u64::min);
            let kept = life.granted_before(when) && when.until_ms < end + TOMBSTONE_MS;
            vec![("a lock is lost: not found", kept)]
        }
        Refusal::WrongUser => vec![("its own user was refused", own)],
        Refusal::Expired => vec![
            ("a lock is lost: called expired", facts.active(life, when)),
            ("a sale was called expired", life.confirmed(when) && own),
        ],
        Refusal::Released => {
            let maybe = life.maybe_released_ms(when).is_some();
            vec![("called released though nobody released it", !maybe)]
        }
        Refusal::None => vec![("another user's lock was ended", !own)],
    }
}

#[derive(Clone, Copy)]
enum Refusal {
    NotFound,
    WrongUser,
    Expired,
    Released,
    None,
}

fn confirm(
    facts: &Facts,
    when: &When,
    lock: LockId,
    said: Option<UserId>,
    order: Option<&OrderId>,
    answer: ConfirmOutcome,
) -> Findings {
    let refusal = match answer {
        ConfirmOutcome::NotFound => Refusal::NotFound,
        ConfirmOutcome::WrongUser => Refusal::WrongUser,
        ConfirmOutcome::Expired => Refusal::Expired,
        ConfirmOutcome::Released => Refusal::Released,
        ConfirmOutcome::Confirmed | ConfirmOutcome::AlreadyConfirmed | ConfirmOutcome::OtherOrder => Refusal::None,
    };
    let mut findings = common(facts, when, lock, said, refusal);
    let Some(life) = facts.lives.get(&lock) else { return findings };
    let first = life.confirms.iter().find(|(_, _, answer)| *answer == Some(ConfirmOutcome::Confirmed));
    let differ = |a: Option<&OrderId>, b: Option<&OrderId>| matches!((a, b), (Some(a), Some(b)) if a != b);
    let earlier =
        |(at, ..): &&(When, Option<&OrderId>, Option<ConfirmOutcome>)| at.began != when.began && at.maybe_before(when);
    let maybe = life.confirms.iter().filter(earlier).any(|(_, _, answer)| {
        matches!(answer, None | Some(ConfirmOutcome::Confirmed | ConfirmOutcome::AlreadyConfirmed))
    });
    let maybe = maybe || facts.maybe_reported(life, when);
    match answer {
        ConfirmOutcome::Confirmed => {
            let times = life.confirms.iter().filter(|(_, _, answer)| *answer == Some(ConfirmOutcome::Confirmed));
            findings.push(("a lock was confirmed twice", times.count() > 1));
            findings.push(("confirmed after its deadline", when.from_ms >= facts.deadline_max(life, when)));
            findings.push(("confirmed after it had been given back", life.released(when)));
            findings.push(("confirmed after it had been confirmed", life.confirmed(when)));
        }
        ConfirmOutcome::AlreadyConfirmed => {
            let other = first.is_some_and(|(at, before, _)| at.before(when) && differ(*before, order));
            findings.push(("a second order's confirm was not refused", other));
            findings.push(("called confirmed though nobody confirmed it", !maybe));
        }
        ConfirmOutcome::OtherOrder => {
            let same = first.is_some_and(|(_, before, _)| before.is_some() && *before == order);
            findings.push(("the order that confirmed it was refused", same || order.is_none()));
            findings.push(("called confirmed though nobody confirmed it", !maybe));
        }
        ConfirmOutcome::Released | ConfirmOutcome::NotFound | ConfirmOutcome::WrongUser | ConfirmOutcome::Expired => {}
    }
    findings
}

fn release(facts: &Facts, when: &When, lock: LockId, by: Releaser, answer: &ReleaseOutcome) -> Findings {
    let (said, by_owner) = match by {
        Releaser::Owner { user, .. } => (Some(user), true),
        Releaser::Orders { user } => (user, false),
    };
    let refusal = match answer {
        ReleaseOutcome::NotFound => Refusal::NotFound,
        ReleaseOutcome::WrongUser => Refusal::WrongUser,
        ReleaseOutcome::Expired => Refusal::Expired,
        ReleaseOutcome::AlreadyReleased(_) | ReleaseOutcome::ReleasedByOther => Refusal::Released,
        ReleaseOutcome::Released(_) | ReleaseOutcome::Confirmed => Refusal::None,
    };
    let mut findings = common(facts, when, lock, said, refusal);
    let Some(life) = facts.lives.get(&lock) else { return findings };
    let may_have = |owner: bool| {
        life.releases.iter().any(|(at, by, answer)| {
            at.began != when.began
                && at.maybe_before(when)
                && matches!(by, Releaser::Owner { .. }) == owner
                && matches!(answer, None | Some(ReleaseOutcome::Released(_) | ReleaseOutcome::AlreadyReleased(_)))
        })
    };
    match answer {
        ReleaseOutcome::Released(told) => {
            let late = when.from_ms >= facts.deadline_max(life, when);
            let times =
                life.releases.iter().filter(|(_, _, answer)| matches!(answer, Some(ReleaseOutcome::Released(_))));
            findings.push(("a lock was released twice", times.count() > 1));
            findings.push(("released after its deadline", late && facts.maybe_confirmed(life, when).is_none()));
            let sold = life.confirms.iter().any(|(_, _, answer)| *answer == Some(ConfirmOutcome::Confirmed));
            findings.push(("its owner took a sale back", by_owner && sold));
            findings.push(("released with another lock's facts", !same_facts(life, told)));
        }
        ReleaseOutcome::AlreadyReleased(told) => {
            findings.push(("a repeat of no release", !may_have(by_owner)));
            findings.push(("released with another lock's facts", !same_facts(life, told)));
        }
        ReleaseOutcome::ReleasedByOther => findings.push(("released by nobody else", !may_have(!by_owner))),
        ReleaseOutcome::Confirmed => {
            let maybe = facts.maybe_confirmed(life, when).is_some();
            findings.push(("called confirmed though nobody confirmed it", !maybe));
        }
        ReleaseOutcome::NotFound | ReleaseOutcome::WrongUser | ReleaseOutcome::Expired => {}
    }
    findings
}

fn same_facts(life: &Life, told: &Lock) -> bool {
    (told.user, told.category, told.quantity) == (life.request.user, life.request.category, life.request.quantity)
}

fn reading(facts: &Facts, when: &When, event: EventId, row: &Availability) -> Findings {
    let lives = || {
        let all = facts.of_category.get(&(event, row.category)).into_iter().flatten();
        all.map(|lock| &facts.lives[lock])
    };
    let sum = |of: &dyn Fn(&Life) -> bool| -> u64 {
        lives().filter(|life| of(life)).map(|life| life.request.quantity.wide()).sum()
    };
    let active_min = sum(&|life| facts.active(life, when));
    let active_max = sum(&|life| life.when.maybe_before(when) && !facts.ended(life, when));
    let settling_min = sum(&|life| facts.settling(life, when));
    let snapshots = facts.snapshots(event, when);
    let known = snapshots.iter().any(|(_, snapshot)| {
        let told = snapshot.categories.iter().find(|told| told.category == row.category);
        let told = told.map_or((0, 0, false), |told| (told.total, told.stock, told.open && snapshot.open));
        told == (row.total, row.stock, row.open)
    });
    let free = if row.open { row.stock.saturating_sub(row.active).saturating_sub(row.settling) } else { 0 };
    vec![
        ("available is not what is left", row.available() != free),
        ("active locks are missing from the count", row.active < active_min),
        ("ended locks are in the count", row.active > active_max),
        ("sales are missing from the count", row.settling < settling_min),
        ("a stock that no snapshot has", !known),
        ("read at another time than it was asked", row.at.as_ms() < when.from_ms || row.at.as_ms() > when.until_ms),
    ]
}

fn find(facts: &Facts, when: &When, lock: LockId, found: Option<&Lock>) -> Findings {
    let Some(found) = found else { return common(facts, when, lock, None, Refusal::NotFound) };
    let Some(life) = facts.lives.get(&lock) else { return vec![("found a lock that nobody asked for", true)] };
    let mut findings = vec![
        ("found with another lock's facts", !same_facts(life, found)),
        (
            "found with another fencing token",
            life.grant.is_some_and(|grant| found.version.is_some_and(|version| version != grant.version)),
        ),
    ];
    findings.extend(match found.status {
        LockStatus::Active => vec![
            ("found active though it has ended", facts.ended(life, when)),
            ("found with an earlier deadline", found.deadline.as_ms() < facts.deadline_min(life, when)),
            ("found with a later deadline", found.deadline.as_ms() > facts.deadline_max(life, when)),
        ],
        LockStatus::Confirmed => {
            let maybe = facts.maybe_confirmed(life, when).is_some();
            vec![("called confirmed though nobody confirmed it", !maybe)]
        }
        LockStatus::Released => common(facts, when, lock, None, Refusal::Released),
        LockStatus::Expired => common(facts, when, lock, None, Refusal::Expired),
    });
    findings
}

fn holds(facts: &Facts, when: &When, event: EventId, user: UserId, locks: &[Lock]) -> Findings {
    let of_holder = facts.of_holder.get(&(event, user)).into_iter().flatten().map(|lock| &facts.lives[lock]);
    let mut active = of_holder.filter(|life| facts.active(life, when));
    let lost = active.any(|life| !locks.iter().any(|lock| lock.id == life.request.lock));
    let mut findings = vec![("a lock is lost: not listed", lost)];
    for lock in locks {
        findings.extend(find(facts, when, lock.id, Some(lock)));
        findings.push(("another's lock is listed", lock.user != user || lock.event() != event));
    }
    findings
}

/// A version of a category, and its counts unless it is a grant's.
type Reading<'a> = (When, u64, Option<&'a Availability>);

/// Versions rise with every change of a category, and no two grants have the same.
pub fn versions(deeds: &[(When, Deed)]) -> Vec<String> {
    let mut readings: HashMap<(EventId, CategoryId), Vec<Reading>> = HashMap::new();
    for (when, deed) in deeds {
        if let Deed::Availability(event, rows) = deed {
            for row in rows {
                readings.entry((*event, row.category)).or_default().push((*when, row.version, Some(row)));
            }
        }
        if let Deed::Lock(request, Some(LockOutcome::Granted(grant))) = deed {
            let of = (request.event(), request.category);
            readings.entry(of).or_default().push((*when, grant.version, None));
        }
    }
    let mut complaints = Vec::new();
    for ((event, category), mut readings) in readings {
        let of = format!("category {category} of event {event}");
        let mut over = readings.clone();
        over.sort_by_key(|(when, ..)| when.ended);
        readings.sort_by_key(|(when, ..)| when.began);
        let (mut highest, mut done) = (0, 0);
        for (when, version, row) in &readings {
            while let Some((_, before, _)) = over.get(done).filter(|(before, ..)| before.before(when)) {
                highest = highest.max(*before);
                done += 1;
            }
            if *version < highest || row.is_none() && *version == highest {
                complaints.push(format!("the version does not rise: {version} after {highest} in {of}"));
            }
        }
        let mut seen: HashMap<u64, Option<&Availability>> = HashMap::new();
        for (_, version, row) in &readings {
            let counts = |row: &Availability| (row.total, row.stock, row.active, row.settling, row.open);
            match (seen.get(version), row) {
                (Some(None), None) => complaints.push(format!("two grants have the fencing token {version} in {of}")),
                (Some(Some(other)), Some(row)) if counts(other) != counts(row) => {
                    complaints.push(format!("two counts have the version {version} in {of}"));
                }
                _ => {}
            }
            if row.is_none() || !seen.contains_key(version) {
                seen.insert(*version, *row);
            }
        }
    }
    complaints
}
