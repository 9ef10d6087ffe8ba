//! The auditor of a whole fleet. It knows what passes between the service and others, with the times of both ends on one
//! machine's clock: requests and answers of sockets, messages of orders, what was sold. It knows nothing of replicas,
//! scripts or counts.
//!
//! What the answers do not prove it does not claim: a request without an answer may have happened or not; of a user who
//! was out of touch for the grace or longer, locks may be gone; of what was locked before Redis lost its data, too.

mod forged;

use std::collections::{HashMap, HashSet};

/// Milliseconds, from the first to the last instant at which something may have happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub began: u64,
    pub ended: u64,
}

impl Span {
    pub const fn at(ms: u64) -> Self {
        Self { began: ms, ended: ms }
    }

    pub const fn overlaps(&self, other: &Self) -> bool {
        self.began <= other.ended && other.began <= self.ended
    }
}

/// A lock as somebody was told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub lock: String,
    pub category: u64,
    pub quantity: u64,
    pub expires: u64,
}

/// What a validate answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validity {
    Until { lock: String, expires: u64 },
    No,
}

/// What was seen. `None` is an answer that is not known.
#[derive(Debug, Clone)]
pub enum Seen {
    /// A grant, with the service's own time of it.
    Granted {
        user: u64,
        request: String,
        told: Told,
        server: u64,
    },
    /// A request for a lock that may have been granted: nobody knows.
    Wished {
        user: u64,
        request: String,
    },
    /// The owner gives a lock back.
    Unlock {
        lock: String,
        answer: Option<bool>,
    },
    /// Everything that a user holds.
    Listed {
        user: u64,
        locks: Vec<Told>,
    },
    /// The user was last heard of when it began, and greeted again when it ended.
    Away {
        user: u64,
    },
    /// The same for everybody, or for some of whom it is not known who they are.
    AwayAll,
    Validate {
        user: u64,
        category: u64,
        quantity: u64,
        answer: Option<Validity>,
    },
    Confirm {
        lock: String,
        order: String,
        answer: Option<bool>,
    },
    /// The orders-service gives a lock, or an unsettled sale, back.
    Release {
        lock: String,
        answer: Option<bool>,
    },
    /// The events-service sold a lock's tickets.
    Sold {
        lock: String,
    },
    /// A category has so many tickets from now on, sold ones included.
    Tickets {
        category: u64,
        total: u64,
    },
    /// Redis came back without its data; from the loss until what can be restored surely is.
    DataLost,
    /// The owner was told that a lock has expired.
    Expired {
        lock: String,
    },
}

/// What the fleet was set to.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub grace: u64,
    /// The longest that a validate moves a deadline.
    pub window: u64,
    /// From a sale to a stock snapshot that surely shows it, while nothing is broken.
    pub shown: u64,
}

/// Between what one clock says twice.
const SLACK: u64 = 20;

/// Who was granted a lock in the last moment before Redis lost its data may have disconnected without our knowing.
const LOSS_MARGIN: u64 = 500;

/// What an answer proves broken, and whether it does.
type Findings = Vec<(&'static str, bool)>;

type Attempts<T> = Vec<(Span, T)>;

/// One lock's life, as far as it is known.
#[derive(Debug)]
struct Life {
    user: u64,
    request: String,
    told: Told,
    granted: Span,
    server: u64,
    unlocks: Attempts<Option<bool>>,
    releases: Attempts<Option<bool>>,
    confirms: Attempts<(String, Option<bool>)>,
    sold: Option<u64>,
}

pub struct Outside<'a> {
    rules: Rules,
    lives: HashMap<&'a str, Life>,
    of_user: HashMap<u64, Vec<&'a str>>,
    of_category: HashMap<u64, Vec<&'a str>>,
    validates: HashMap<(u64, u64), Attempts<Option<Validity>>>,
    aways: HashMap<Option<u64>, Vec<Span>>,
    wishes: HashMap<u64, Vec<(Span, String)>>,
    tickets: HashMap<u64, Vec<(u64, u64)>>,
    losses: Vec<Span>,
    expired: HashSet<&'a str>,
    complaints: Vec<String>,
}

/// Every promise that what was seen proves broken; empty when there is none.
pub fn complaints(seen: &[(Span, Seen)], rules: Rules) -> Vec<String> {
    let mut outside = Outside {
        rules,
        lives: HashMap::new(),
        of_user: HashMap::new(),
        of_category: HashMap::new(),
        validates: HashMap::new(),
        aways: HashMap::new(),
        wishes: HashMap::new(),
        tickets: HashMap::new(),
        losses: Vec::new(),
        expired: HashSet::new(),
        complaints: Vec::new(),
    };
    for (span, seen) in seen {
        outside.learn_lock(*span, seen);
    }
    for (span, seen) in seen {
        outside.learn(*span, seen);
    }
    for (span, seen) in seen {
        for complaint in outside.judge(*span, seen) {
            let known = outside.known_of(*span, seen);
            outside.complaints.push(format!("{complaint}: {seen:?} at {span:?}; {known}"));
        }
    }
    outside.complaints
}

impl<'a> Outside<'a> {
    fn learn_lock(&mut self, span: Span, seen: &'a Seen) {
        let Seen::Granted { user, request, told, server } = seen else { return };
        if let Some(known) = self.lives.get_mut(told.lock.as_str()) {
            let same = (known.user, known.told.category, known.told.quantity) == (*user, told.category, told.quantity);
            if !same || known.request != *request {
                self.complaints.push(format!("one lock was granted to two requests: {seen:?}"));
            }
            return;
        }
        let lock = told.lock.as_str();
        self.of_user.entry(*user).or_default().push(lock);
        self.of_category.entry(told.category).or_default().push(lock);
        let life = Life {
            user: *user,
            request: request.clone(),
            told: told.clone(),
            granted: span,
            server: *server,
            unlocks: Vec::new(),
            releases: Vec::new(),
            confirms: Vec::new(),
            sold: None,
        };
        self.lives.insert(lock, life);
    }

    fn learn(&mut self, span: Span, seen: &'a Seen) {
        match seen {
            Seen::Unlock { lock, answer } => {
                if let Some(life) = self.lives.get_mut(lock.as_str()) {
                    life.unlocks.push((span, *answer));
                }
            }
            Seen::Release { lock, answer } => {
                if let Some(life) = self.lives.get_mut(lock.as_str()) {
                    life.releases.push((span, *answer));
                }
            }
            Seen::Confirm { lock, order, answer } => {
                if let Some(life) = self.lives.get_mut(lock.as_str()) {
                    life.confirms.push((span, (order.clone(), *answer)));
                }
            }
            Seen::Sold { lock } => {
                if let Some(life) = self.lives.get_mut(lock.as_str())
                    && life.sold.replace(span.ended).is_some()
                {
                    self.complaints.push(format!("lock {lock} was sold twice"));
                }
            }
            Seen::Validate { user, category, answer, .. } => {
                self.validates.entry((*user, *category)).or_default().push((span, answer.clone()));
            }
            Seen::Away { user } => self.aways.entry(Some(*user)).or_default().push(span),
            Seen::AwayAll => self.aways.entry(None).or_default().push(span),
            Seen::Wished { user, request } => self.wishes.entry(*user).or_default().push((span, request.clone())),
            Seen::Tickets { category, total } => {
                self.tickets.entry(*category).or_default().push((span.began, *total));
            }
            Seen::DataLost => self.losses.push(span),
            Seen::Expired { lock } => drop(self.expired.insert(lock.as_str())),
            Seen::Granted { .. } | Seen::Listed { .. } => {}
        }
    }

    /// A lock's deadline for whoever asks at `at` is at least this, if its owner was in touch.
    fn deadline_min(&self, life: &Life, at: u64) -> u64 {
        let validated = self.validates.get(&(life.user, life.told.category)).into_iter().flatten();
        let pinned = validated.filter_map(|(span, answer)| match answer {
            Some(Validity::Until { lock, expires }) if *lock == life.told.lock && span.ended <= at => Some(*expires),
            _ => None,
        });
        pinned.fold(life.told.expires, u64::max)
    }

    /// The latest that it may be.
    fn deadline_max(&self, life: &Life) -> u64 {
        let validated = self.validates.get(&(life.user, life.told.category)).into_iter().flatten();
        let moved = validated.filter_map(|(span, answer)| match answer {
            Some(Validity::Until { lock, expires }) if *lock == life.told.lock => Some(*expires),
            Some(_) => None,
            None => Some(span.ended + self.rules.window),
        });
        moved.fold(life.told.expires, u64::max) + SLACK
    }

    /// Its owner was out of touch, somewhere between its grant and `until`, for so long that it may be abandoned.
    fn maybe_abandoned(&self, life: &Life, until: u64) -> bool {
        let own = self.aways.get(&Some(life.user)).into_iter().flatten();
        own.chain(self.aways.get(&None).into_iter().flatten()).any(|away| {
            away.ended >= life.granted.began
                && away.began < until
                && until.min(away.ended).saturating_sub(away.began) + SLACK >= self.rules.grace
        })
    }

    fn maybe_lost(&self, from: u64, until: u64) -> bool {
        self.losses.iter().any(|loss| loss.overlaps(&Span { began: from, ended: until }))
    }

    /// Something other than the attempt that began at `own` may have ended it before `until`.
    fn maybe_ended(life: &Life, until: u64, own: Option<u64>) -> bool {
        let other = |span: &Span| span.began < until && own != Some(span.began);
        let given = |attempts: &Attempts<Option<bool>>| {
            attempts.iter().any(|(span, answer)| *answer != Some(false) && other(span))
        };
        let sold = life.confirms.iter().any(|(span, (_, answer))| *answer != Some(false) && other(span));
        given(&life.unlocks) || given(&life.releases) || sold
    }

    /// Active through all of `span`, whatever happened to what was not answered.
    fn surely_active(&self, life: &Life, span: Span, own: Option<u64>) -> bool {
        life.granted.ended <= span.began
            && span.ended + SLACK < self.deadline_min(life, span.began)
            && !Self::maybe_ended(life, span.ended, own)
            && !self.maybe_abandoned(life, span.ended)
            && !self.maybe_lost(life.granted.began, span.ended)
    }

    /// It was active when Redis lost its data, and its owner was connected all the time: it must be there again, unless
    /// its owner was told that it cannot be, or wanted to give it back meanwhile and was told that it is gone.
    fn to_be_handed_back(&self, life: &Life, span: Span) -> bool {
        // The first that may have taken it: who lost it then, for a reason or not, has nothing that a later one takes.
        let Some(lost) = self.losses.iter().find(|loss| life.granted.began <= loss.ended) else { return false };
        if lost.began <= life.granted.ended + LOSS_MARGIN || span.began <= lost.ended {
            return false;
        }
        let own = self.aways.get(&Some(life.user)).into_iter().flatten();
        let mut aways = own.chain(self.aways.get(&None).into_iter().flatten());
        span.ended + SLACK < life.told.expires
            && !Self::maybe_ended(life, span.ended, None)
            && !aways.any(|away| away.overlaps(&Span { began: lost.began, ended: span.ended }))
            && !life.unlocks.iter().any(|(unlock, _)| unlock.ended >= lost.began)
            // The broker may have delivered it twice: the first time it was confirmed, which a restored sale is as well,
            // the second time, after the loss, it was not known.
            && !life.confirms.iter().any(|(confirm, _)| confirm.overlaps(lost))
            && !self.expired.contains(life.told.lock.as_str())
    }

    /// Surely in the way of a grant made at `server`.
    fn counts(&self, life: &Life, server: u64) -> bool {
        if life.server >= server {
            return false;
        }
        let given = |attempts: &Attempts<Option<bool>>| {
            attempts.iter().any(|(span, answer)| *answer != Some(false) && span.began <= server)
        };
        if given(&life.unlocks) || given(&life.releases) {
            return false;
        }
        let confirmed = life.confirms.iter().find(|(span, (_, answer))| *answer == Some(true) && span.ended <= server);
        if let Some((confirm, _)) = confirmed {
            let shown = life.sold.is_some_and(|sold| sold + self.rules.shown <= server);
            return shown || !self.maybe_lost(confirm.began.min(life.granted.began), server);
        }
        life.granted.ended <= server && self.surely_active(life, Span::at(server), None)
    }

    /// For good: a replica that did not hear of it before Redis lost its data may have brought the lock back.
    fn surely_given_back(&self, life: &Life, before: u64) -> bool {
        let unheard = |span: &Span| {
            let late = Span { began: span.began, ended: span.ended + LOSS_MARGIN };
            self.losses.iter().any(|loss| loss.began < before && late.overlaps(&Span::at(loss.began)))
        };
        let given = |attempts: &Attempts<Option<bool>>| {
            attempts.iter().any(|(span, answer)| *answer == Some(true) && span.ended < before && !unheard(span))
        };
        given(&life.unlocks) || given(&life.releases)
    }

    fn lives_of(&self, user: u64) -> impl Iterator<Item = &Life> {
        self.of_user.get(&user).into_iter().flatten().map(|lock| &self.lives[lock])
    }

    /// Everything that was known of the user's locks in the minute before, for whoever reads a complaint.
    fn known_of(&self, span: Span, seen: &Seen) -> String {
        let user = match seen {
            Seen::Granted { user, .. } | Seen::Listed { user, .. } | Seen::Validate { user, .. } => Some(*user),
            Seen::Confirm { lock, .. } | Seen::Unlock { lock, .. } | Seen::Sold { lock } => {
                self.lives.get(lock.as_str()).map(|life| life.user)
            }
            Seen::Release { .. }
            | Seen::Wished { .. }
            | Seen::Away { .. }
            | Seen::AwayAll
            | Seen::Tickets { .. }
            | Seen::DataLost
            | Seen::Expired { .. } => None,
        };
        let near = |at: u64| (span.began.saturating_sub(60_000)..=span.ended).contains(&at);
        let spans = |of: &[Span]| of.iter().copied().filter(|span| near(span.ended)).collect::<Vec<_>>();
        let aways = |of| spans(self.aways.get(of).map_or(&[], Vec::as_slice));
        let lives: Vec<_> = self.lives_of(user.unwrap_or_default()).filter(|life| near(life.granted.began)).collect();
        let expired: Vec<_> = lives.iter().map(|life| self.expired.contains(life.told.lock.as_str())).collect();
        let (away, all_away, lost) = (aways(&user), aways(&None), spans(&self.losses));
        format!("lost {lost:?}, away {away:?}, all away {all_away:?}, told of the end {expired:?} of {lives:#?}")
    }

    fn judge(&self, span: Span, seen: &Seen) -> Vec<&'static str> {
        let life = |lock: &String| self.lives.get(lock.as_str());
        let findings = match seen {
            Seen::Granted { user, request, told, server } => self.granted(span, *user, request, told, *server),
            Seen::Listed { user, locks } => self.listed(span, *user, locks),
            Seen::Validate { user, category, quantity, answer: Some(Validity::Until { lock, expires }) } => {
                match life(lock) {
                    Some(life) => self.valid(span, life, (*user, *category, *quantity), *expires),
                    None => vec![("valid without a lock", true)],
                }
            }
            Seen::Validate { user, category, quantity, answer: Some(Validity::No) } => {
                let held = |life: &Life| {
                    (life.told.category, life.told.quantity >= *quantity) == (*category, true)
                        && self.surely_active(life, span, None)
                };
                vec![("a lock is lost: not valid", self.lives_of(*user).any(held))]
            }
            Seen::Confirm { lock, order, answer: Some(answer) } => match life(lock) {
                Some(life) => self.confirmed(span, life, order, *answer),
                None => vec![("confirmed what nobody locked", *answer)],
            },
            Seen::Unlock { lock, answer: Some(answer) } => {
                life(lock).map_or_else(Vec::new, |life| self.unlocked(span, life, *answer))
            }
            Seen::Sold { lock } => {
                let confirmed = |life: &Life| {
                    life.confirms.iter().any(|(at, (_, answer))| *answer == Some(true) && at.ended <= span.ended)
                };
                vec![("sold without a confirmed lock", !life(lock).is_some_and(confirmed))]
            }
            Seen::Validate { .. }
            | Seen::Confirm { .. }
            | Seen::Unlock { .. }
            | Seen::Release { .. }
            | Seen::Wished { .. }
            | Seen::Away { .. }
            | Seen::AwayAll
            | Seen::Tickets { .. }
            | Seen::DataLost
            | Seen::Expired { .. } => Vec::new(),
        };
        findings.into_iter().filter_map(|(law, broken)| broken.then_some(law)).collect()
    }

    fn granted(&self, span: Span, user: u64, request: &str, told: &Told, server: u64) -> Findings {
        let other = |life: &&Life| life.told.lock != told.lock;
        let twice = self.lives_of(user).filter(other).any(|life| {
            let known = life.granted.ended <= span.began && !self.maybe_lost(life.granted.began, span.ended);
            life.request == *request && known
        });
        let again = ("a request that was granted has another lock now", twice);
        // A repeat says nothing about the time at which it is made.
        if self.lives[told.lock.as_str()].granted != span {
            return vec![again];
        }
        let of_category = self.of_category.get(&told.category).into_iter().flatten();
        let others = of_category.map(|lock| &self.lives[lock]).filter(other);
        let taken: u64 = others.filter(|life| self.counts(life, server)).map(|life| life.told.quantity).sum();
        let totals = self.tickets.get(&told.category).into_iter().flatten();
        let most = totals.filter(|(at, _)| *at <= span.ended).map(|(_, total)| *total).max();
        let active = |life: &Life| self.surely_active(life, span, None);
        let same = |life: &&Life| other(life) && life.told.category == told.category;
        let now = (span.began.saturating_sub(SLACK)..=span.ended + SLACK).contains(&server);
        vec![
            again,
            ("granted twice: more is taken than there is", taken + told.quantity > most.unwrap_or(0)),
            ("granted a second lock of the category", self.lives_of(user).filter(same).any(active)),
            ("granted at another time than it was asked", !now && !self.repeats(user, request, span)),
        ]
    }

    fn listed(&self, span: Span, user: u64, locks: &[Told]) -> Findings {
        let is_missing = |life: &&Life| !locks.iter().any(|told| told.lock == life.told.lock);
        let missing: Vec<&Life> = self.lives_of(user).filter(is_missing).collect();
        let mut findings = vec![
            ("a lock is lost: not listed", missing.iter().any(|life| self.surely_active(life, span, None))),
            (
                "a lock of a connected user was not handed back",
                missing.iter().any(|life| self.to_be_handed_back(life, span)),
            ),
        ];
        for told in locks {
            let Some(life) = self.lives.get(told.lock.as_str()) else {
                let wished = self.wishes.get(&user).into_iter().flatten().any(|(wish, _)| wish.began < span.ended);
                findings.push(("a lock is listed that nobody asked for", !wished));
                continue;
            };
            findings.push(("another user's lock is listed", life.user != user));
            findings.push(("listed after it had been given back", self.surely_given_back(life, span.began)));
            findings.push(("listed after its deadline", span.began > self.deadline_max(life)));
        }
        findings
    }

    fn valid(&self, span: Span, life: &Life, asked: (u64, u64, u64), expires: u64) -> Findings {
        let (user, category, quantity) = asked;
        let before = || {
            let all = self.validates.get(&(user, category)).into_iter().flatten();
            all.filter(|(at, _)| at.began < span.began).map(|(_, answer)| answer)
        };
        let unknown = before().any(Option::is_none);
        let moved = before().filter_map(|answer| match answer {
            Some(Validity::Until { expires, .. }) => Some(*expires),
            Some(Validity::No) | None => None,
        });
        let late = span.began > moved.fold(life.told.expires, u64::max) + SLACK;
        vec![
            ("valid by another's lock", (life.user, life.told.category) != (user, category)),
            ("valid by a lock of fewer tickets", life.told.quantity < quantity),
            ("valid though given back", self.surely_given_back(life, span.began)),
            ("valid after its deadline", late && !unknown),
            ("valid for less than the window", expires + SLACK < span.began + self.rules.window),
        ]
    }

    fn confirmed(&self, span: Span, life: &Life, order: &str, answer: bool) -> Findings {
        let earlier = || life.confirms.iter().filter(|(at, _)| at.began < span.began);
        let surely = |mine: bool| {
            earlier().any(|(at, (by, answer))| (by == order) == mine && *answer == Some(true) && at.ended < span.began)
        };
        if answer {
            let maybe = earlier().any(|(_, (_, answer))| *answer != Some(false));
            return vec![
                ("confirmed for two orders", surely(false)),
                ("confirmed after it had been given back", self.surely_given_back(life, span.began)),
                ("confirmed after its deadline", !maybe && span.began > self.deadline_max(life)),
            ];
        }
        let kept = surely(true) && !self.maybe_lost(life.granted.began, span.ended);
        let back = life.releases.iter().any(|(at, answer)| *answer != Some(false) && at.began < span.ended);
        vec![
            ("a lock is lost: not confirmed", self.surely_active(life, span, Some(span.began))),
            ("a repeated confirm was refused", kept && !back),
        ]
    }

    fn unlocked(&self, span: Span, life: &Life, answer: bool) -> Findings {
        if !answer {
            return vec![("a lock is lost: nothing to unlock", self.surely_active(life, span, Some(span.began)))];
        }
        let given = |attempts: &Attempts<Option<bool>>| {
            attempts.iter().any(|(at, answer)| *answer != Some(false) && at.began < span.began)
        };
        let back = given(&life.releases);
        let sold = life.confirms.iter().any(|(at, (_, answer))| *answer == Some(true) && at.ended < span.began);
        let late = span.began > self.deadline_max(life);
        vec![
            ("its owner took a sale back", sold && !back),
            ("given back after its deadline", late && !given(&life.unlocks) && !back),
        ]
    }

    /// The request was made before and may have been granted then.
    fn repeats(&self, user: u64, request: &str, span: Span) -> bool {
        self.wishes.get(&user).into_iter().flatten().any(|(wish, of)| of == request && wish.began < span.began)
    }
}
