//! Builds that wait in hooks of ours for a slot, and builds that do not stay where they began.

use super::{Event, What, World};
use crate::site::{Site, clock};
use nix_offload::plan::turn;
use nix_offload::plan::{Because, Verdict};
use std::collections::BTreeMap;
use std::time::SystemTime;

/// How often a build that waits looks again even if nothing happens.
const LOOK_AGAIN: f64 = 2.0;

/// The machines that a build waits for, one bit for each. Fleets have 64 at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Wish(u64);

impl Wish {
    pub(super) fn of(sites: &[usize]) -> Self {
        Self(sites.iter().fold(0, |wish, site| wish | 1_u64.checked_shl(*site as u32).expect("64 machines")))
    }

    fn contains(self, site: usize) -> bool {
        self.0 & (1 << site) != 0
    }

    /// Whether it is for some of the other's machines only.
    fn is_narrower(self, other: Self) -> bool {
        self != other && self.0 & !other.0 == 0
    }
}

/// Builds that will have slots of each machine before one of which this is asked.
pub(super) struct Ahead {
    pub(super) of: Vec<u64>,
    /// Whether it waits itself.
    pub(super) is_waiting: bool,
}

/// A build that waits in a hook of ours, in the line of those that wait for the same machines.
pub(super) struct Place {
    job: usize,
    /// What it waits for: one of these machines.
    wish: Wish,
    /// When it counts as having come.
    ticket: SystemTime,
    /// When it came to this line, as a number.
    number: u64,
    /// When it became the first of its line, which it stays.
    turn: Option<u64>,
    is_held_back: bool,
}

impl World<'_> {
    /// The build waits for one of these machines.
    pub(super) fn wait_for(&mut self, job: usize, wish: Wish, is_held_back: bool) {
        let since = clock(self.jobs[job].asked.unwrap_or(self.now));
        let ticket = turn::ticket(since, self.tails[job]);
        self.places += 1;
        let place = Place { job, wish, ticket, number: self.places, turn: None, is_held_back };
        self.waiting.push(place);
        self.look_later();
    }

    /// The first of each line is served, as far as there is what it wants; the one that has been that for longer before the
    /// others. One that is held back for a machine goes to the line of that, so that the next one may take what is free.
    pub(super) fn serve_waiting(&mut self) {
        while self.sites.iter().any(Site::is_free) {
            self.give_turns();
            let mut first: Vec<(u64, usize)> =
                self.waiting.iter().enumerate().filter_map(|(at, place)| Some((place.turn?, at))).collect();
            first.sort_unstable();
            if !first.into_iter().any(|(_, at)| self.serve(at)) {
                break;
            }
        }
        self.look_later();
    }

    /// Whether this one goes somewhere: to a machine or to another line.
    fn serve(&mut self, at: usize) -> bool {
        let job = self.waiting[at].job;
        match self.decide(job) {
            (Verdict::Accept(site), _) => {
                self.waiting.remove(at);
                self.start(job, site);
                true
            }
            (Verdict::Wait(wish), because) => {
                let (place, wish) = (&self.waiting[at], Wish::of(&wish));
                let holds_back = because == Because::HeldBack;
                if holds_back == place.is_held_back || place.wish == wish {
                    return false;
                }
                self.waiting.remove(at);
                self.wait_for(job, wish, holds_back);
                true
            }
            _ => false,
        }
    }

    /// Lines without a first one get one.
    fn give_turns(&mut self) {
        let mut first: BTreeMap<Wish, usize> = BTreeMap::new();
        let key = |place: &Place| (place.turn.is_none(), place.ticket, place.number);
        for (at, place) in self.waiting.iter().enumerate() {
            let first = first.entry(place.wish).or_insert(at);
            if key(place) < key(&self.waiting[*first]) {
                *first = at;
            }
        }
        for at in first.into_values().collect::<Vec<_>>() {
            if self.waiting[at].turn.is_none() {
                self.places += 1;
                self.waiting[at].turn = Some(self.places);
            }
        }
    }

    /// What is new comes behind all that wait for a machine; one that waits comes behind those that cannot go anywhere
    /// else.
    pub(super) fn ahead(&self, job: usize) -> Ahead {
        let own = self.waiting.iter().find(|place| place.job == job).map(|place| place.wish);
        let mut of = vec![0; self.sites.len()];
        for place in self.waiting.iter().filter(|place| own.is_none_or(|own| place.wish.is_narrower(own))) {
            let wished = of.iter_mut().enumerate().filter(|(site, _)| place.wish.contains(*site));
            wished.for_each(|(_, ahead)| *ahead += 1);
        }
        Ahead { of, is_waiting: own.is_some() }
    }

    /// What a hook says to Nix. Where nothing is free and nobody may wait it need not be asked.
    pub(super) fn answer(&mut self, job: usize) -> (Verdict, Because) {
        let may_wait = !self.contender.is_stock() && self.may_wait(self.all());
        match may_wait || self.sites.iter().any(Site::is_free) {
            true => self.decide(job),
            false => (Verdict::Postpone(Vec::new()), Because::Full),
        }
    }

    pub(super) fn all(&self) -> Wish {
        Wish::of(&(0..self.sites.len()).collect::<Vec<_>>())
    }

    /// Whether one build more may wait for these machines.
    pub(super) fn may_wait(&self, wish: Wish) -> bool {
        let same = self.waiting.iter().filter(|place| place.wish == wish).count() as u64;
        same < self.rules.max_waiting
    }

    /// Builds on machines that are slow or crowded begin anew on better ones for which nobody waits.
    pub(super) fn move_builds(&mut self) {
        for from in 0..self.sites.len() {
            let jobs: Vec<usize> = self.sites[from].builds.users().collect();
            for job in jobs {
                let is_any_free = self.sites.iter().any(Site::is_free);
                if !is_any_free || !self.waiting.is_empty() || !self.postponed.is_empty() {
                    return;
                }
                let Some(to) = self.better_place(job, from) else { continue };
                self.advance(from, What::Build);
                self.sites[from].builds.remove(job);
                self.go_on(from, What::Build);
                self.jobs[job].attempt += 1;
                self.jobs[job].was_moved = true;
                self.outcome.moved += 1;
                self.give_back(job, from);
                self.start(job, to);
            }
        }
    }

    pub(super) fn look_later(&mut self) {
        if !self.waiting.is_empty() && !self.is_looking {
            self.is_looking = true;
            self.after(LOOK_AGAIN, Event::Look);
        }
    }
}
