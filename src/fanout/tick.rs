//! The tick: what a room is told and when. Pure: no tasks, no clock, no ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::agenda::Agenda;
use super::{Summary, Sums};
use crate::domain::{Availability, CategoryId, ChangeKind, EventId, Notice, ReleaseReason, Snapshot};

/// Categories remembered of one event: those of two whole snapshots.
const CELLS_MAX: usize = 2 * Snapshot::CATEGORIES_MAX;
/// Versions remembered of one category, to tell a doubled notice from a late one. Notices of a channel come in order;
/// what is doubled or late is so by a reconnect's worth, not by more.
const SEEN_MAX: usize = 64;
/// Amounts of single users summed up in one event and tick: below a megabyte, and more than a replica serves users of
/// one event who could act within a tick.
const AMOUNTS_MAX: usize = 20_000;
/// The longest that a room waits for news because telling the rooms takes long.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// After a round as long as `d` there is none for `d / 4`: of one processor's time at most four fifths are spent on telling
/// rooms. Requests have their turn within a round too, after each portion; this is so that what they cause is taken in. A
/// longer pause makes the next change wait: ten thousand watchers are told in some 70 ms.
const PAUSE_DIVISOR: u32 = 4;
/// A round as long as this, five ticks by default, is more than the rooms can be told in full.
const STRAIN: Duration = Duration::from_millis(250);
/// How long that says something about the next round: the pauses between rounds that follow one another are shorter.
const STRAIN_TTL: Duration = Duration::from_secs(2);

/// The latest value of every category of an event and what of it the room has not been told.
#[derive(Debug)]
pub(super) struct Board {
    tick: Duration,
    cells: BTreeMap<CategoryId, Cell>,
    sums: Sums,
    amounts: usize,
    shed: u64,
    /// Since when there is something to tell.
    since: Option<Instant>,
    /// When the room may be told again.
    not_before: Option<Instant>,
}

#[derive(Debug)]
struct Cell {
    latest: Availability,
    /// The room has not been told of `latest`, or somebody in it was given something older since.
    untold: bool,
    /// The highest versions whose changes were summed up.
    seen: BTreeSet<u64>,
}

/// What the room is told at once.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Emission {
    pub(super) changed: Vec<Availability>,
    pub(super) summaries: Vec<Summary>,
    /// Tickets of summaries that are left out.
    pub(super) shed: u64,
    /// For how long the room has waited for the first of it.
    pub(super) waited: Duration,
}

impl Board {
    pub(super) fn new(tick: Duration) -> Self {
        Self { tick, cells: BTreeMap::new(), sums: Sums::new(), amounts: 0, shed: 0, since: None, not_before: None }
    }

    /// When the room may be told next: at once, or a tick after the last time.
    pub(super) fn ready_at(&self, now: Instant) -> Instant {
        self.not_before.map_or(now, |at| at.max(now))
    }

    /// There is something to tell from now on, unless there was before.
    pub(super) fn wait_since(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// Takes a notice. True if there is something to tell.
    pub(super) fn take(&mut self, notice: &Notice) -> bool {
        let (category, version) = (notice.availability.category, notice.availability.version);
        self.make_room(category);
        let cell = self.cells.entry(category).or_insert_with(|| Cell {
            latest: notice.availability,
            untold: true,
            seen: BTreeSet::new(),
        });
        let forgotten = cell.seen.len() >= SEEN_MAX && cell.seen.first().is_some_and(|&oldest| version < oldest);
        if forgotten || !cell.seen.insert(version) {
            return false;
        }
        if cell.seen.len() > SEEN_MAX {
            cell.seen.pop_first();
        }
        if version > cell.latest.version {
            (cell.latest, cell.untold) = (notice.availability, true);
        }
        let untold = cell.untold;
        for change in &notice.changes {
            let sum = self.sums.entry((category, change.kind)).or_default();
            match sum.get_mut(&change.user) {
                Some(amount) => *amount += change.quantity.wide(),
                None if self.amounts < AMOUNTS_MAX => {
                    sum.insert(change.user, change.quantity.wide());
                    self.amounts += 1;
                }
                None => self.shed += change.quantity.wide(),
            }
        }
        untold || !notice.changes.is_empty()
    }

    /// Takes a reading that somebody is given, who is or will be in the room. True if there is something to tell.
    pub(super) fn observe(&mut self, read: &[Availability]) -> bool {
        let mut untold = false;
        for &read in read {
            self.make_room(read.category);
            // The first that anybody here learns of the category: nobody has anything older.
            let cell = self.cells.entry(read.category).or_insert_with(|| Cell {
                latest: read,
                untold: false,
                seen: BTreeSet::new(),
            });
            // Newer: the others have something older. Older: this one has.
            cell.untold |= read.version != cell.latest.version;
            if read.version > cell.latest.version {
                cell.latest = read;
            }
            untold |= cell.untold;
        }
        untold
    }

    /// Takes a reading made to find what notices did not tell. How many categories were news.
    pub(super) fn heal(&mut self, read: &[Availability]) -> u64 {
        let mut healed = 0;
        for &read in read {
            self.make_room(read.category);
            let known = self.cells.get(&read.category).map(|cell| cell.latest.version);
            if known.is_none_or(|version| read.version > version) {
                healed += 1;
                let cell = self.cells.entry(read.category).or_insert_with(|| Cell {
                    latest: read,
                    untold: true,
                    seen: BTreeSet::new(),
                });
                (cell.latest, cell.untold) = (read, true);
            }
        }
        healed
    }

    /// What the room is told now. Under strain the summaries are left out: they are a courtesy, the counts are not.
    pub(super) fn emit(&mut self, now: Instant, strained: bool) -> Emission {
        self.not_before = Some(now + self.tick);
        let mut changed = Vec::new();
        for cell in self.cells.values_mut().filter(|cell| cell.untold) {
            cell.untold = false;
            changed.push(cell.latest);
        }
        self.amounts = 0;
        let mut shed = std::mem::take(&mut self.shed);
        let mut summaries = summaries(std::mem::take(&mut self.sums));
        if strained {
            shed += summaries.drain(..).map(|summary| summary.total).sum::<u64>();
        }
        let waited = self.since.take().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        Emission { changed, summaries, shed, waited }
    }

    /// Forgets the category that changed longest ago, if there is no room for one more.
    fn make_room(&mut self, category: CategoryId) {
        if self.cells.len() >= CELLS_MAX
            && !self.cells.contains_key(&category)
            && let Some((&oldest, _)) = self.cells.iter().min_by_key(|(_, cell)| (cell.untold, cell.latest.at))
        {
            self.cells.remove(&oldest);
        }
    }
}

/// What was moved, in the order in which it is told.
pub(super) fn summaries(sums: Sums) -> Vec<Summary> {
    let sums = sums.into_iter().map(|((category, kind), by_user)| {
        let total = by_user.values().sum();
        Summary { category, kind, total, by_user: by_user.into_iter().collect() }
    });
    let mut summaries: Vec<_> = sums.filter(|summary| summary.total > 0).collect();
    summaries.sort_by_key(|summary| (summary.category, rank(summary.kind)));
    summaries
}

/// The order in which kinds are told.
const fn rank(kind: ChangeKind) -> u8 {
    match kind {
        ChangeKind::Locked => 0,
        ChangeKind::Back(ReleaseReason::Released) => 1,
        ChangeKind::Back(ReleaseReason::Expired) => 2,
        ChangeKind::Back(ReleaseReason::Abandoned) => 3,
        ChangeKind::Back(ReleaseReason::Cancelled) => 4,
    }
}

/// For how long no room is told after rooms were told for `took`.
pub(super) fn pause_after(took: Duration) -> Duration {
    (took / PAUSE_DIVISOR).min(PAUSE_MAX)
}

/// When rooms are told: each at once if it was not told for a tick, none before the pause after the last round is over.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    due: Agenda<EventId>,
    pause_until: Option<Instant>,
    /// When a round was last over that took so long that something has to be left out.
    strained_at: Option<Instant>,
}

impl Pulse {
    /// A room has something to be told from `at` on.
    pub(super) fn plan(&mut self, event: EventId, at: Instant) {
        self.due.plan(event, at);
    }

    /// When the next round begins.
    pub(super) fn next(&self) -> Option<Instant> {
        let due = self.due.next()?;
        Some(self.pause_until.map_or(due, |end| end.max(due)))
    }

    /// The next room of the round that began at `now`. Rooms told in a round are not due in it again, so it ends.
    pub(super) fn take(&mut self, now: Instant) -> Option<EventId> {
        if self.pause_until.is_some_and(|end| now < end) {
            return None;
        }
        self.due.take(now)
    }

    /// Takes the room for later news while it is told, if these are due and no other room is due before.
    pub(super) fn take_again(&mut self, event: EventId, now: Instant) -> bool {
        self.due.first() == Some(event) && self.due.take(now).is_some()
    }

    /// A round is over. `lap`: how long it takes to tell every room once. `took`: for how long they were told since the
    /// last pause.
    pub(super) fn rest(&mut self, now: Instant, lap: Duration, took: Duration) {
        self.strained_at = (lap >= STRAIN).then_some(now);
        self.pause_until = Some(now + pause_after(took));
    }

    /// Whether rounds take so long that something has to be left out: the last one did, a moment ago.
    pub(super) fn strained(&self, now: Instant) -> bool {
        self.strained_at.is_some_and(|at| now.saturating_duration_since(at) < STRAIN_TTL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Change, Instant as LedgerInstant, Quantity, UserId};
    use crate::fanout::News;

    const TICK: Duration = Duration::from_millis(50);
    const BACK: ChangeKind = ChangeKind::Back(ReleaseReason::Released);

    fn user(id: u64) -> UserId {
        UserId::new(id).expect("a user id")
    }

    fn category(id: u64) -> CategoryId {
        CategoryId::new(id).expect("a category id")
    }

    fn event(id: u64) -> EventId {
        EventId::new(id).expect("an event id")
    }

    fn counts(id: u64, version: u64) -> Availability {
        Availability {
            event: event(1),
            category: category(id),
            total: 100,
            stock: 100,
            active: version,
            settling: 0,
            open: true,
            version,
            at: LedgerInstant::from_ms(version),
        }
    }

    fn notice(id: u64, version: u64, changes: &[(ChangeKind, u64, u64)]) -> Notice {
        let changes = changes
            .iter()
            .map(|&(kind, quantity, by)| Change {
                kind,
                quantity: Quantity::new(quantity).expect("a quantity"),
                user: user(by),
            })
            .collect();
        Notice { availability: counts(id, version), changes }
    }

    fn told(board: &mut Board) -> Vec<(u64, u64)> {
        let emission = board.emit(Instant::now(), false);
        emission.changed.iter().map(|counts| (counts.category.value(), counts.version)).collect()
    }

    #[test]
    fn the_room_is_told_the_latest_of_each_category_once() {
        let mut board = Board::new(TICK);
        for version in [3, 5, 4, 5, 1] {
            board.take(&notice(1, version, &[]));
        }
        assert!(board.take(&notice(2, 9, &[])));
        assert_eq!(told(&mut board), [(1, 5), (2, 9)]);
        assert_eq!(told(&mut board), []);
        for version in [5, 4, 3, 2] {
            assert!(!board.take(&notice(1, version, &[])), "version {version} is no news");
        }
        assert_eq!(told(&mut board), []);
    }

    #[test]
    fn amounts_are_summed_by_user_and_a_doubled_notice_counts_once_while_a_late_one_counts() {
        let mut board = Board::new(TICK);
        board.take(&notice(1, 1, &[(ChangeKind::Locked, 2, 7)]));
        board.take(&notice(1, 3, &[(ChangeKind::Locked, 1, 7), (BACK, 4, 8)]));
        board.take(&notice(1, 3, &[(ChangeKind::Locked, 1, 7), (BACK, 4, 8)]));
        board.take(&notice(1, 2, &[(ChangeKind::Locked, 5, 9)]));
        let emission = board.emit(Instant::now(), false);
        assert_eq!(emission.changed, [counts(1, 3)]);
        let [locked, back] = emission.summaries.as_slice() else { panic!("{:?}", emission.summaries) };
        assert_eq!(
            (locked.kind, locked.total, &locked.by_user),
            (ChangeKind::Locked, 8, &vec![(user(7), 3), (user(9), 5)])
        );
        assert_eq!((locked.without(user(7)), locked.without(user(9)), locked.without(user(1))), (5, 3, 8));
        assert_eq!((back.kind, back.total, back.without(user(8)), back.without(user(7))), (BACK, 4, 0, 4));
        assert!(board.emit(Instant::now(), false).summaries.is_empty());
    }

    #[test]
    fn who_is_told_two_news_at_once_is_told_the_latest_counts_and_the_sum_of_what_others_did() {
        let mut board = Board::new(TICK);
        let mut news = |notices: &[Notice]| {
            for notice in notices {
                board.take(notice);
            }
            let emission = board.emit(Instant::now(), false);
            News { event: event(1), changed: emission.changed, summaries: emission.summaries }
        };
        let former = news(&[notice(1, 1, &[(ChangeKind::Locked, 2, 7)]), notice(3, 1, &[(ChangeKind::Locked, 9, 7)])]);
        let later = news(&[
            notice(1, 2, &[(ChangeKind::Locked, 1, 6), (ChangeKind::Locked, 1, 7), (BACK, 4, 8)]),
            notice(2, 5, &[]),
        ]);
        let both = former.and(&later);
        assert_eq!((both.event, both.changed), (event(1), vec![counts(1, 2), counts(2, 5), counts(3, 1)]));
        let summary = |id, kind, by_user: &[(u64, u64)]| Summary {
            category: category(id),
            kind,
            total: by_user.iter().map(|(_, amount)| amount).sum(),
            by_user: by_user.iter().map(|&(by, amount)| (user(by), amount)).collect(),
        };
        let locked = summary(1, ChangeKind::Locked, &[(6, 1), (7, 3)]);
        assert_eq!(both.summaries, [locked, summary(1, BACK, &[(8, 4)]), summary(3, ChangeKind::Locked, &[(7, 9)])]);
    }

    #[test]
    fn under_strain_summaries_are_left_out_and_counted_and_counts_are_told() {
        let mut board = Board::new(TICK);
        board.take(&notice(1, 1, &[(ChangeKind::Locked, 2, 7), (BACK, 3, 8)]));
        let emission = board.emit(Instant::now(), true);
        assert_eq!((emission.changed.len(), emission.summaries.len(), emission.shed), (1, 0, 5));
    }

    #[test]
    fn amounts_of_single_users_are_bounded() {
        let mut board = Board::new(TICK);
        for by in 1..=AMOUNTS_MAX as u64 + 10 {
            board.take(&notice(1, by, &[(ChangeKind::Locked, 2, by)]));
        }
        board.take(&notice(1, 1 << 40, &[(ChangeKind::Locked, 1, 1)]));
        let emission = board.emit(Instant::now(), false);
        assert_eq!((emission.summaries[0].by_user.len(), emission.shed), (AMOUNTS_MAX, 20));
        assert_eq!(emission.summaries[0].total, 2 * AMOUNTS_MAX as u64 + 1);
    }

    #[test]
    fn nothing_older_than_a_reading_that_was_observed_is_told() {
        let mut board = Board::new(TICK);
        assert!(!board.observe(&[counts(1, 5)]), "the first reading is nobody else's news");
        assert!(!board.take(&notice(1, 4, &[])));
        assert!(!board.take(&notice(1, 5, &[])));
        assert_eq!(told(&mut board), []);
        // Somebody reads more than the others were told: they are told too.
        assert!(board.observe(&[counts(1, 7)]));
        board.take(&notice(1, 6, &[]));
        assert_eq!(told(&mut board), [(1, 7)]);
        // Somebody read before that and observes only now: told again.
        assert!(board.observe(&[counts(1, 6)]));
        assert_eq!(told(&mut board), [(1, 7)]);
        assert!(!board.observe(&[counts(1, 7)]));
    }

    #[test]
    fn a_healing_reading_is_told_only_where_it_is_newer() {
        let mut board = Board::new(TICK);
        board.take(&notice(1, 5, &[]));
        board.take(&notice(2, 5, &[]));
        told(&mut board);
        assert_eq!(board.heal(&[counts(1, 5), counts(2, 6), counts(3, 1)]), 2);
        assert_eq!(told(&mut board), [(2, 6), (3, 1)]);
        assert_eq!(board.heal(&[counts(1, 4), counts(2, 6)]), 0);
        assert_eq!(told(&mut board), []);
    }

    #[test]
    fn categories_and_versions_are_forgotten_beyond_their_bounds() {
        let mut board = Board::new(TICK);
        for id in 1..=2 * CELLS_MAX as u64 {
            board.take(&notice(id, id, &[]));
        }
        assert_eq!(board.cells.len(), CELLS_MAX);
        let mut board = Board::new(TICK);
        for version in 100..=100 + 2 * SEEN_MAX as u64 {
            board.take(&notice(1, version, &[]));
        }
        assert_eq!(board.cells[&category(1)].seen.len(), SEEN_MAX);
        assert!(!board.take(&notice(1, 99, &[(BACK, 1, 1)])), "too old to know whether it was summed up");
    }

    #[test]
    fn the_first_change_is_told_at_once_and_the_next_ones_a_tick_later() {
        let start = Instant::now();
        let mut board = Board::new(TICK);
        assert_eq!(board.ready_at(start), start);
        board.emit(start, false);
        assert_eq!(board.ready_at(start + TICK / 2), start + TICK);
        assert_eq!(board.ready_at(start + TICK * 2), start + TICK * 2);
    }

    #[test]
    fn a_room_joins_its_own_round_when_it_is_due_and_no_other_is_before_it() {
        let start = Instant::now();
        let mut pulse = Pulse::default();
        pulse.plan(event(1), start + TICK);
        assert!(!pulse.take_again(event(1), start), "not due");
        assert!(pulse.take_again(event(1), start + TICK));
        assert!(!pulse.take_again(event(1), start + TICK), "taken");
        pulse.plan(event(2), start);
        pulse.plan(event(1), start + TICK);
        assert!(!pulse.take_again(event(1), start + TICK), "another has its turn");
        assert_eq!(pulse.take(start + TICK), Some(event(2)));
        assert!(pulse.take_again(event(1), start + TICK));
    }

    #[test]
    fn after_a_long_round_no_room_is_told_for_a_quarter_as_long_up_to_a_second() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut pulse = Pulse::default();
        pulse.plan(event(1), start);
        pulse.plan(event(2), start + ms(10));
        assert_eq!((pulse.take(start), pulse.take(start)), (Some(event(1)), None));
        pulse.rest(start + ms(80), ms(80), ms(80));
        assert!(!pulse.strained(start + ms(80)));
        assert_eq!(pulse.next(), Some(start + ms(100)));
        assert_eq!(pulse.take(start + ms(99)), None);
        assert_eq!(pulse.take(start + ms(100)), Some(event(2)));
        pulse.rest(start + ms(400), ms(280), ms(280));
        assert!(pulse.strained(start + ms(400)));
        assert!(pulse.strained(start + ms(2399)));
        assert!(!pulse.strained(start + ms(2400)), "long ago");
        pulse.rest(start + ms(5000), ms(4600), ms(4600));
        pulse.plan(event(1), start);
        assert!(pulse.strained(start + ms(6000)));
        assert_eq!(pulse.next(), Some(start + ms(6000)));
        pulse.rest(start + ms(7000), ms(1), ms(1));
        assert!(!pulse.strained(start + ms(7000)));
    }
}
